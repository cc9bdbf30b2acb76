"""The loss by hand: values, gradients, extremes, shapes."""

import math

import pytest
import torch

from rm.loss import pairwise_loss


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0])
    # -log(1 / (1 + e^-d)) for d = 1, 0, -2
    expected = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2))]
    torch.testing.assert_close(pairwise_loss(chosen, rejected), torch.tensor(expected))


def test_margin_moves_the_difference():
    chosen, rejected, margin = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.5])
    expected = [math.log(2), math.log1p(math.exp(-3.5))]  # differences 1 - 1 and 3 + 0.5
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margin), torch.tensor(expected))


def test_centering_adds_the_square_of_the_sum():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, -1.0])
    plain = pairwise_loss(chosen, rejected)
    centred = pairwise_loss(chosen, rejected, center_rewards_coefficient=0.01)
    torch.testing.assert_close(centred - plain, torch.tensor([0.09, 0.04]))


def test_label_smoothing_mixes_both_labels():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.0])
    right, wrong = math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.5))
    torch.testing.assert_close(
        pairwise_loss(chosen, rejected, label_smoothing=0.1), torch.tensor([0.9 * right + 0.1 * wrong])
    )


def test_swapping_the_labels_is_not_the_same_loss():
    assert pairwise_loss(torch.tensor([3.0]), torch.tensor([0.0])) < 0.05
    assert pairwise_loss(torch.tensor([0.0]), torch.tensor([3.0])) > 3


def test_extremes_do_not_overflow():
    rewards = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = pairwise_loss(rewards, -rewards)
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4]))
    loss.sum().backward()
    torch.testing.assert_close(rewards.grad, torch.tensor([0.0, -2.0]))


def test_gradcheck():
    torch.manual_seed(0)
    chosen, rejected, margin = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.autograd.gradcheck(
        lambda c, r, m: pairwise_loss(c, r, m, center_rewards_coefficient=0.3, label_smoothing=0.2),
        (chosen, rejected, margin),
    )


@pytest.mark.parametrize(
    "shapes", [((3, 1), (3, 1), (3,)), ((3,), (3,), (3, 1)), ((3,), (3, 1), (3,)), ((3,), (3,), (1,)), ((), (), ())]
)
def test_shapes_are_enforced(shapes):
    with pytest.raises(ValueError, match=r"shape \[B\]"):
        pairwise_loss(*(torch.zeros(shape) for shape in shapes))
