"""Meters and evaluation metrics against values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from rm.evaluate.metrics import evaluation_intervals, evaluation_metrics, metric_names
from rm.evaluate.slices import breakdowns, reliability
from rm.evaluate.statistics import wilson_interval
from rm.evaluate.terminal import MEANING
from rm.train.meter import Meter


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


def table(rewards, **columns) -> pd.DataFrame:
    n = len(rewards)
    plain = {"set": "toy", "prompt": np.arange(n), "length_chosen": 3, "length_rejected": 3, "prefix_length": 1}
    rewards = dict(zip(("reward_chosen", "reward_rejected"), np.asarray(rewards, dtype=float).T, strict=True))
    return pd.DataFrame({"data_margin": 0.0, **plain, **rewards, **columns}, index=range(n))


def test_evaluation_metrics_by_hand():
    rewards = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    columns = {"subset": ["a", "b", "a"], "true_margin": np.log([3.0, 1 / 4, 1.0]), "data_margin": [0.0, 0.0, 1.0]}
    metrics = evaluation_metrics(table(rewards, **columns))
    by_hand = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1)) + math.log1p(math.exp(1))) / 3
    assert metrics["eval/loss"] == pytest.approx(by_hand)
    assert metrics["eval/null_prompt_loss"] == pytest.approx((2 * math.log(2) + math.log1p(math.exp(1))) / 3)
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/ties"] == pytest.approx(1 / 3)
    assert metrics["eval/a/accuracy"] == 0.75 and metrics["eval/b/accuracy"] == 0.0
    assert metrics["eval/a/pairs"] == 2 and metrics["eval/pairs"] == metrics["eval/prompts"] == 3
    assert metrics["eval/reward_chosen"] == 1.0 and metrics["eval/margin"] == 0.0
    assert metrics["eval/accuracy_ceiling"] == pytest.approx((0.75 + 0.8 + 0.5) / 3)
    assert metrics["eval/spearman_true_margin"] == pytest.approx(1.0)
    assert metrics["eval/accuracy_low"] < 0.5 < metrics["eval/accuracy_high"]
    assert metrics["eval/b/accuracy_low"] < 1e-9 and 0 < metrics["eval/b/accuracy_high"] < 1
    p = [1 / (1 + math.exp(-m)) for m in (1, -1, 0)]
    assert metrics["eval/brier"] == pytest.approx(sum((1 - x) ** 2 for x in p) / 3)
    # 0.73 of the first two, one right and one wrong; 0.5 of the tie, which is half right
    assert metrics["eval/ece"] == pytest.approx((2 * abs(0.5 - p[0]) + 0) / 3)
    assert metrics["eval/temperature"] == math.inf  # one right and one wrong by as much: a coin
    assert (metrics["eval/reward_min"], metrics["eval/reward_max"], metrics["eval/reward_mean"]) == (0, 2, 1)
    assert metrics["eval/reward_std"] == pytest.approx(math.sqrt(2 / 6))
    assert [metrics[f"eval/margin_q{q}"] for q in ("05", "25", "50", "75", "95")] == [-1, -1, 0, 1, 1]


def test_length_and_prompts_by_hand():
    """The longer answer is chosen in the first two pairs, the shorter in the third, neither in the fourth."""
    rewards = [[4.0, 1.0], [3.0, 2.0], [1.0, 3.0], [2.0, 2.0]]
    lengths = {"length_chosen": [9, 8, 4, 6], "length_rejected": [5, 7, 8, 6], "prefix_length": [4, 4, 3, 5]}
    metrics = evaluation_metrics(table(rewards, **lengths, prompt=[5, 5, 6, 7]))
    assert metrics["eval/null_length_accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert metrics["eval/margin_length_spearman"] == pytest.approx(1.0)  # 3, 1, -2, 0 and 4, 1, -4, 0
    # answers of 5 4 1 1 and 1 3 5 1 tokens, rewards 4 3 1 2 and 1 2 3 2
    ranks = [[7.5, 6, 2.5, 2.5, 2.5, 5, 7.5, 2.5], [8, 6.5, 1.5, 4, 1.5, 4, 6.5, 4]]
    assert metrics["eval/reward_length_spearman"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert metrics["eval/prompts"] == 3
    # prompts' rewards 4 1 3 2; 1 3; 2 2: means 2.5, 2, 2 (of all 2.25), sums of squares within 5, 2, 0
    between = (4 * 0.25**2 + 4 * 0.25**2) / 2
    within, size = 7 / 5, (8 - (16 + 4 + 4) / 8) / 2
    assert metrics["eval/prompt_share"] == pytest.approx((between - within) / (between + (size - 1) * within))


def test_a_model_that_sees_the_prompt_alone():
    metrics = evaluation_metrics(table([[x, x] for x in (1.0, 2.0, 5.0)]))
    assert metrics["eval/accuracy"] == 0.5 and metrics["eval/ties"] == 1 and metrics["eval/prompt_share"] == 1
    assert metrics["eval/loss"] == metrics["eval/null_prompt_loss"] == pytest.approx(math.log(2))


def test_swapped_labels_give_one_minus_accuracy():
    rewards = np.random.default_rng(0).normal(size=(37, 2)).round(1)
    metrics, swapped = evaluation_metrics(table(rewards)), evaluation_metrics(table(rewards[:, ::-1]))
    assert swapped["eval/accuracy"] == 1 - metrics["eval/accuracy"] != 0.5
    assert swapped["eval/margin"] == -metrics["eval/margin"]


def test_every_metric_has_an_interval_and_a_meaning():
    rng = np.random.default_rng(0)
    data = table(rng.normal(size=(60, 2)) + [0.5, 0], true_margin=rng.normal(size=60), prompt=np.arange(60) // 2)
    data = data.assign(length_chosen=rng.integers(5, 20, 60), length_rejected=rng.integers(5, 20, 60))
    metrics, intervals = evaluation_metrics(data), evaluation_intervals(data)
    facts = {f"eval/{name}" for name in "pairs prompts reward_min reward_max accuracy_low accuracy_high".split()}
    assert set(intervals) == set(metrics) - facts
    for name, (low, high) in intervals.items():
        if name == "eval/ece":  # the error of a resample is larger, since it is an absolute value
            continue
        assert low - 1e-12 <= metrics[name] <= high + 1e-12, name
        assert low < high or name == "eval/null_prompt_loss", name
    assert intervals["eval/null_prompt_loss"] == (metrics["eval/null_prompt_loss"],) * 2
    assert intervals["eval/ties"] == wilson_interval(0.0, 30)
    assert intervals["eval/accuracy"] == (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"])
    assert {f"eval/{name}" for name in MEANING} == set(metrics) - {"eval/accuracy_low", "eval/accuracy_high"}
    assert evaluation_intervals(data.assign(prompt=1)) == {}
    assert set(metric_names()) == set(metrics)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_leaves_no_number(bad):
    data = table([[1.0, 0.0], [bad, 0.5], [2.0, 1.0]], subset=["a", "b", "a"], true_margin=1.0)
    metrics, intervals = evaluation_metrics(data), evaluation_intervals(data)
    facts = "pairs prompts null_length_accuracy null_prompt_loss accuracy_ceiling a/accuracy a/pairs b/pairs".split()
    for name in metrics:
        if name.removeprefix("eval/") in facts:
            assert math.isfinite(metrics[name]), name
        elif not name.endswith(("_low", "_high", "b/accuracy", "reward_min", "reward_max")):
            assert math.isnan(metrics[name]), name
    assert math.isnan(intervals["eval/loss"][0])
    assert reliability(data)["pairs"].sum() == 2 and len(breakdowns(data)["by_subset"]) == 2


def test_one_pair_has_metrics():
    metrics = evaluation_metrics(table([[1.0, 0.0]]))
    assert metrics["eval/accuracy"] == 1 and 0 < metrics["eval/accuracy_low"] < metrics["eval/accuracy_high"] <= 1
    assert math.isnan(metrics["eval/margin_length_spearman"])
