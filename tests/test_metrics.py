"""Meters and evaluation metrics against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from rm.metrics import Meter, accuracy, evaluation_metrics, spearman, wilson_interval


def test_meter_weighs_pairs_not_micro_batches():
    meter = Meter(torch.device("cpu"))
    meter.update(
        torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0]), torch.ones(3), 30
    )
    meter.update(torch.tensor([5.0]), torch.tensor([4.0]), torch.tensor([0.0]), torch.ones(1), 10)
    meter.update(torch.tensor([99.0]), torch.tensor([9.0]), torch.tensor([0.0]), torch.zeros(1), 10)  # a filler
    means, pairs, tokens = meter.read(lambda sums: sums)
    assert pairs == 4 and tokens == 50
    assert means["train/loss"] == 14 / 4
    assert means["train/accuracy"] == (1 + 0.5 + 0 + 1) / 4  # a tie counts half
    assert means["train/margin"] == (1 + 0 - 1 + 4) / 4
    assert means["train/reward_chosen"] == 7 / 4
    assert meter.read(lambda sums: sums)[1] == 0  # afresh


def test_meter_reduces_sums_over_processes():
    """Two processes with 3 pairs and 1 pair: the mean over 4 pairs, not the mean of two means."""
    meter = Meter(torch.device("cpu"))
    meter.update(torch.tensor([1.0, 1.0, 1.0]), torch.ones(3), torch.zeros(3), torch.ones(3), 1)
    other = Meter(torch.device("cpu"))
    other.update(torch.tensor([5.0]), torch.ones(1), torch.zeros(1), torch.ones(1), 1)
    assert meter.read(lambda sums: sums + other.sums)[0]["train/loss"] == 2.0


def test_accuracy_counts_ties_half_and_swaps_exactly():
    margin = np.array([1.0, 0.0, -2.0, 3.0, 0.0])
    assert accuracy(margin) == (2 + 1) / 5
    assert accuracy(-margin) == 1 - accuracy(margin)


def test_wilson_interval_by_hand():
    low, high = wilson_interval(0.5, 100)  # the textbook example: 0.404, 0.596
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_spearman_by_hand():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30])) == pytest.approx(0.8)  # 1 - 6*2/(4*15)
    assert spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(math.sqrt(3) / 2)  # mean ranks for ties
    assert math.isnan(spearman(np.array([1, 1]), np.array([1, 2])))


def test_evaluation_metrics_by_hand():
    rewards = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    metrics = evaluation_metrics(
        rewards, margin=np.array([0.0, 0.0, 1.0]), subset=["a", "b", "a"], true_margin=np.log([3.0, 1 / 4, 1.0])
    )
    by_hand = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1)) + math.log1p(math.exp(1))) / 3
    assert metrics["eval/loss"] == pytest.approx(by_hand)
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/ties"] == pytest.approx(1 / 3)
    assert metrics["eval/a/accuracy"] == 0.75 and metrics["eval/b/accuracy"] == 0.0
    assert metrics["eval/a/pairs"] == 2
    assert metrics["eval/reward_chosen"] == 1.0 and metrics["eval/margin"] == 0.0
    assert metrics["eval/accuracy_ceiling"] == pytest.approx((0.75 + 0.8 + 0.5) / 3)
    assert metrics["eval/spearman_true_margin"] == pytest.approx(1.0)
    assert metrics["eval/accuracy_low"] < 0.5 < metrics["eval/accuracy_high"]
    swapped = evaluation_metrics(rewards[:, ::-1], margin=np.zeros(3))
    assert swapped["eval/accuracy"] == 1 - metrics["eval/accuracy"]
