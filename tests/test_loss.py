"""The loss by hand: values, soft labels, gradients, extremes, shapes."""

import math

import pytest
import torch

from rm.loss import pairwise_loss, plackett_luce_loss


def right(difference: float) -> float:
    """-log sigmoid(difference)"""
    return math.log1p(math.exp(-difference))


def losses(chosen: list[float], rejected: list[float], *columns: list[float], **options) -> list[float]:
    return pairwise_loss(*(torch.tensor(values) for values in (chosen, rejected, *columns)), **options).tolist()


def test_bradley_terry_with_a_margin_by_hand():
    assert losses([2.0, 0.0, -1.0], [1.0, 0.0, 1.0]) == pytest.approx([right(1), math.log(2), right(-2)])
    assert losses([2.0, 3.0], [1.0, 0.0], [1.0, -0.5]) == pytest.approx([math.log(2), right(3.5)])
    assert losses([3.0], [0.0])[0] < 0.05 and losses([0.0], [3.0])[0] > 3  # the labels are not the other way round


def test_centering_adds_the_square_of_the_sum():
    added = [0.01 * 9 + right(1), 0.01 * 4 + math.log(2)]
    assert losses([2.0, -1.0], [1.0, -1.0], center_rewards_coefficient=0.01) == pytest.approx(added)


def test_soft_labels_and_smoothing_mix_both_labels():
    """z = 1.5 - 0 - 0.5 = 1; p' = (1 - s) p + s (1 - p)."""
    chosen, rejected, margin = [1.5] * 4, [0.0] * 4, [0.5] * 4
    mixed = [p * right(1) + (1 - p) * right(-1) for p in (1.0, 0.75, 0.5, 0.0)]
    assert losses(chosen, rejected, margin, [1.0, 0.75, 0.5, 0.0]) == pytest.approx(mixed)
    smooth = [p * right(1) + (1 - p) * right(-1) for p in (0.9, 0.7, 0.5, 0.1)]
    assert losses(chosen, rejected, margin, [1.0, 0.75, 0.5, 0.0], label_smoothing=0.1) == pytest.approx(smooth)
    assert losses([1.5], [0.0], label_smoothing=0.1) == pytest.approx([0.9 * right(1.5) + 0.1 * right(-1.5)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_hard_labels_have_the_same_bits_as_no_labels(smoothing):
    torch.manual_seed(0)
    chosen, rejected, margin = 3 * torch.randn(3, 1000)
    options = {"center_rewards_coefficient": 0.01, "label_smoothing": smoothing}
    hard = pairwise_loss(chosen, rejected, margin, torch.ones(1000), **options)
    assert torch.equal(hard, pairwise_loss(chosen, rejected, margin, **options))
    assert torch.equal(hard, pairwise_loss(chosen, rejected, margin, None, **options))


def test_extremes_do_not_overflow():
    rewards = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = pairwise_loss(rewards, -rewards)
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4]))
    loss.sum().backward()
    torch.testing.assert_close(rewards.grad, torch.tensor([0.0, -2.0]))
    soft = losses([1e4, -1e4], [-1e4, 1e4], [0.0, 0.0], [0.75, 0.75], label_smoothing=0.1)
    assert soft == pytest.approx([0.3 * 2e4, 0.7 * 2e4])


def test_gradcheck():
    torch.manual_seed(0)
    inputs = tuple(torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    options = {"center_rewards_coefficient": 0.3, "label_smoothing": 0.2}
    p = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *values: pairwise_loss(*values, **options), (*inputs, p))


@pytest.mark.parametrize("shapes", [
    ((3, 1), (3, 1), (3,)), ((3,), (3,), (3, 1)), ((3,), (3, 1), (3,)), ((3,), (3,), (1,)), ((), (), ()),
    ((3,), (3,), (3,), (3, 1)), ((3,), (3,), (3,), (1,)), ((3, 1), (3, 1)),
])  # fmt: skip
def test_shapes_are_enforced(shapes):
    with pytest.raises(ValueError, match=r"must both have shape \[C\], got \("):
        pairwise_loss(*(torch.zeros(shape) for shape in shapes))


# ---------------------------------------------------------------- Plackett-Luce


def ranking_losses(rewards: list[float], scores: list[float], num_answers: list[int], **options) -> list[float]:
    return plackett_luce_loss(*map(torch.tensor, (rewards, scores, num_answers)), **options).tolist()


def choice(chosen: float, *others: float) -> float:
    """-log softmax of the first reward"""
    return math.log(sum(math.exp(reward - chosen) for reward in (chosen, *others)))


def test_plackett_luce_by_hand():
    """Scores 3 > 2 > 1 with rewards 1, 0, 2: the first answer among three, then the second among two."""
    expected = (choice(1, 0, 2) + choice(0, 2)) / 2
    assert ranking_losses([2.0, 1.0, 0.0], [1.0, 3.0, 2.0], [3]) == pytest.approx([expected])
    two_prompts = ranking_losses([2.0, 1.0, 0.0, 0.5, 3.0], [1.0, 3.0, 2.0, 9.0, -9.0], [3, 2])
    assert two_prompts == pytest.approx([expected, choice(0.5, 3)])
    assert ranking_losses([0.5, 3.0], [1.0, 0.0], [2]) == pytest.approx(losses([0.5], [3.0]))  # Bradley-Terry


def test_answers_with_equal_scores_are_not_compared():
    """Scores 2, 2, 1: each of the two best answers is chosen against the last one alone. All equal: no loss."""
    assert ranking_losses([1.0, 0.0, 2.0], [2.0, 2.0, 1.0], [3]) == pytest.approx([(choice(1, 2) + choice(0, 2)) / 2])
    assert ranking_losses([1.0, 0.0, 2.0], [2.0, 1.0, 1.0], [3]) == pytest.approx([choice(1, 0, 2)])
    assert ranking_losses([1.0, 5.0], [0.0, 0.0], [2]) == [0.0]


def test_centering_of_a_ranking_is_that_of_a_pair():
    options = {"center_rewards_coefficient": 0.1}
    assert ranking_losses([2.0, 1.0], [1.0, 0.0], [2], **options) == pytest.approx(losses([2.0], [1.0], **options))
    added = 0.1 * (2 * (1 + 2 + 6) / 3) ** 2
    plain = ranking_losses([1.0, 2.0, 6.0], [3.0, 2.0, 1.0], [3])
    assert ranking_losses([1.0, 2.0, 6.0], [3.0, 2.0, 1.0], [3], **options) == pytest.approx([plain[0] + added])


def test_gradients_and_extremes_of_a_ranking():
    torch.manual_seed(0)
    rewards = torch.randn(7, dtype=torch.float64, requires_grad=True)
    scores, num_answers = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 4.0]), torch.tensor([4, 3])
    options = {"center_rewards_coefficient": 0.3}
    assert torch.autograd.gradcheck(lambda r: plackett_luce_loss(r, scores.double(), num_answers, **options), rewards)
    extreme = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    loss = plackett_luce_loss(extreme, torch.tensor([1.0, 3.0, 2.0]), torch.tensor([3]))
    torch.testing.assert_close(loss, torch.tensor([(2e4 + 1e4) / 2]))
    loss.sum().backward()
    torch.testing.assert_close(extreme.grad, torch.tensor([1.0, -0.5, -0.5]))


@pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((3,), (3, 1)), ((3,), (2,)), ((), ())])
def test_shapes_of_a_ranking_are_enforced(shapes):
    with pytest.raises(ValueError, match=r"must both have shape \[N\]"):
        plackett_luce_loss(*map(torch.zeros, shapes), torch.tensor([3]))
