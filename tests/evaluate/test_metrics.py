"""The metrics of an evaluation against values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from tables import CONFIG, by_margins, table

from rm.config.options import LossOptions
from rm.evaluate.metrics import METRICS, TRAINING_METRICS, Metric, find_metric
from rm.evaluate.statistics import mean, wilson_interval
from rm.evaluate.table import evaluation_intervals, evaluation_metrics


def evaluated(frame, config=CONFIG) -> dict[str, float]:
    metrics = evaluation_metrics(frame, config)
    assert all(find_metric(name).meaning for name in metrics)
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}


def test_pairs_by_hand():
    frame = table([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]], subset=["a", "b", "a"], margin=[0.0, 0.0, 1.0])
    metrics = evaluated(frame.assign(true_margin=np.log([3.0, 1 / 4, 1.0])))
    assert metrics["loss"] == pytest.approx(
        (math.log1p(math.exp(-1)) + math.log1p(math.exp(1)) + math.log1p(math.exp(1))) / 3
    )
    assert metrics["prompt_only_baseline_loss"] == pytest.approx((2 * math.log(2) + math.log1p(math.exp(1))) / 3)
    assert metrics["accuracy"] == 0.5 and metrics["ties"] == pytest.approx(1 / 3)
    assert metrics["a/accuracy"] == 0.75 and metrics["b/accuracy"] == 0.0
    assert metrics["a/comparisons"] == 2 and metrics["comparisons"] == metrics["prompts"] == 3
    assert metrics["reward_chosen"] == 1.0 and metrics["margin"] == 0.0
    assert metrics["accuracy_ceiling"] == pytest.approx((0.75 + 0.8 + 0.5) / 3)
    assert metrics["spearman_true_margin"] == pytest.approx(1.0)
    assert metrics["accuracy_low"] < 0.5 < metrics["accuracy_high"]
    assert (metrics["b/accuracy_low"], metrics["b/accuracy_high"]) == wilson_interval(0.0, 1)
    p = [1 / (1 + math.exp(-m)) for m in (1, -1, 0)]
    assert metrics["brier"] == pytest.approx(sum((1 - x) ** 2 for x in p) / 3)
    # confidence 0.73 in the first two, one right and one wrong; 0.5 for the equal rewards, which are half right
    assert metrics["ece"] == pytest.approx((2 * abs(0.5 - p[0]) + 0) / 3)
    assert metrics["temperature"] == math.inf  # one right and one wrong with the same margin
    assert (metrics["reward_min"], metrics["reward_max"], metrics["reward_mean"]) == (0, 2, 1)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(2 / 6))
    assert [metrics[f"margin_q{q}"] for q in ("05", "25", "50", "75", "95")] == [-1, -1, 0, 1, 1]
    assert "label_ties" not in metrics


def test_lengths_and_prompts_by_hand():
    """The longer answer is chosen in the first two pairs, the shorter one in the third, neither in the fourth."""
    lengths = {"length_chosen": [9, 8, 4, 6], "length_rejected": [5, 7, 8, 6], "prefix_length": [4, 4, 3, 5]}
    metrics = evaluated(table([[4.0, 1.0], [3.0, 2.0], [1.0, 3.0], [2.0, 2.0]], **lengths, prompt=[5, 5, 6, 7]))
    assert metrics["longer_answer_baseline_accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert metrics["margin_length_spearman"] == pytest.approx(1.0)  # 3, 1, -2, 0 and 4, 1, -4, 0
    # answers of 5 4 1 1 and 1 3 5 1 tokens, rewards 4 3 1 2 and 1 2 3 2
    ranks = [[7.5, 6, 2.5, 2.5, 2.5, 5, 7.5, 2.5], [8, 6.5, 1.5, 4, 1.5, 4, 6.5, 4]]
    assert metrics["reward_length_spearman"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert metrics["prompts"] == 3
    # rewards of the prompts 4 1 3 2; 1 3; 2 2: means 2.5, 2, 2 (of all 2.25), sums of squares within 5, 2, 0
    between = (4 * 0.25**2 + 4 * 0.25**2) / 2
    within, size = 7 / 5, (8 - (16 + 4 + 4) / 8) / 2
    assert metrics["prompt_icc"] == pytest.approx((between - within) / (between + (size - 1) * within))


@pytest.mark.parametrize("m", [1e-7, 0.5, 30.0, 1e9])
def test_temperature_by_hand(m):
    """Margins +m in 3 of 4 pairs and -m in one: sigmoid(m / T) = 3/4, so T = m / log 3."""
    assert evaluated(by_margins([m, m, m, -m]))["temperature"] == pytest.approx(m / math.log(3), rel=1e-6)
    assert evaluated(by_margins([m, 2 * m]))["temperature"] == 0  # all are right: the sharper the better
    assert evaluated(by_margins([-m, -m]))["temperature"] == math.inf
    assert math.isnan(evaluated(by_margins([0.0, 0.0]))["temperature"])


def test_calibration_error_by_hand():
    logits = np.log([0.52 / 0.48, 0.48 / 0.52, 0.93 / 0.07, 0.94 / 0.06])  # right, wrong; right, right
    assert evaluated(by_margins(logits))["ece"] == pytest.approx(0.5 * abs(0.5 - 0.52) + 0.5 * abs(1 - 0.935))


def test_intraclass_correlation_by_hand():
    """Two groups of two: MSB = 2 · (2² + 2²) / 1 = 16, MSW = (0.5 + 0.5) / 2 = 0.5; (16 - 0.5) / (16 + 0.5)."""
    assert evaluated(table([[1.5, 2.5], [5.5, 6.5]]))["prompt_icc"] == pytest.approx(15.5 / 16.5)
    noise = np.random.default_rng(0).normal(size=(2000, 2))
    assert evaluated(table(noise))["prompt_icc"] == pytest.approx(0, abs=0.05)
    assert math.isnan(evaluated(table([[1.5, 2.5], [5.5, 6.5]], prompt=0))["prompt_icc"])


def test_a_model_that_sees_only_the_prompt():
    metrics = evaluated(table([[x, x] for x in (1.0, 2.0, 5.0)]))
    assert metrics["accuracy"] == 0.5 and metrics["ties"] == 1 and metrics["prompt_icc"] == 1
    assert metrics["loss"] == metrics["prompt_only_baseline_loss"] == pytest.approx(math.log(2))


def test_swapped_labels():
    rewards = np.random.default_rng(0).normal(size=(37, 2)).round(1)
    metrics, swapped = evaluated(table(rewards)), evaluated(table(rewards[:, ::-1]))
    assert swapped["accuracy"] == 1 - metrics["accuracy"] != 0.5 and swapped["margin"] == -metrics["margin"]


def test_options_of_the_loss():
    config = LossOptions(center_rewards_coefficient=0.1, label_smoothing_factor=0.25)
    want = (math.log1p(math.exp(-1)) + 0.25 * 1 + 0.1 * 3**2 + math.log1p(math.exp(2)) + 0.25 * -2 + 0.1 * 4**2) / 2
    assert evaluated(table([[2.0, 1.0], [1.0, 3.0]]), config)["loss"] == pytest.approx(want)


# ---------------------------------------------------------------- shares, weights, soft labels


def test_a_prompt_with_three_comparisons_counts_once():
    columns = {"share": [1 / 3, 1 / 3, 1 / 3, 1.0], "weight": [3.0, 3.0, 3.0, 1.0], "prompt": [1, 1, 1, 2]}
    frame = table([[3, 2], [2, 1], [1, 3], [4, 1]], **columns)
    metrics, loss = evaluated(frame), lambda m: math.log1p(math.exp(-m))
    assert metrics["accuracy"] == pytest.approx((2 / 3 + 1) / 2) and metrics["margin"] == pytest.approx((0 + 3) / 2)
    assert metrics["loss"] == pytest.approx((3 * (loss(1) + loss(1) + loss(-2)) / 3 + loss(3)) / 2)
    assert metrics["prompt_only_baseline_loss"] == pytest.approx((3 + 1) / 2 * math.log(2))
    assert metrics["reward_chosen"] == pytest.approx((2 + 4) / 2) and metrics["margin_q50"] == 1
    assert metrics["comparisons"] == 4 and metrics["prompts"] == 2
    low, high = evaluation_intervals(frame, CONFIG)["eval/accuracy"]
    assert (low, high) == (pytest.approx(2 / 3), 1) == (metrics["accuracy_low"], metrics["accuracy_high"])
    alone = evaluated(frame[:3])  # a share is a weight: what all rows have in common cancels
    assert alone["accuracy"] == pytest.approx(2 / 3) and alone["margin_q50"] == 1


def test_soft_labels_and_label_ties():
    frame = by_margins([2.0, -1.0, 1.0], p_chosen=[0.75, 1.0, 0.5], length_chosen=[5, 1, 9], true_margin=[0, 0, 9])
    metrics = evaluated(frame)
    assert metrics["label_ties"] == 1 and metrics["comparisons"] == 3
    assert metrics["accuracy"] == metrics["longer_answer_baseline_accuracy"] == 0.5 == metrics["accuracy_ceiling"]
    loss = [math.log1p(math.exp(-2)) + 0.25 * 2, math.log1p(math.exp(1)), math.log1p(math.exp(-1)) + 0.5 * 1]
    assert metrics["loss"] == pytest.approx(sum(loss) / 3)
    p = [1 / (1 + math.exp(-m)) for m in (2, -1, 1)]
    brier = [0.75 * (1 - p[0]) ** 2 + 0.25 * p[0] ** 2, (1 - p[1]) ** 2, ((1 - p[2]) ** 2 + p[2] ** 2) / 2]
    assert metrics["brier"] == pytest.approx(sum(brier) / 3)
    assert metrics["margin"] == pytest.approx(2 / 3)  # label ties are left out of accuracy only
    ties = evaluated(frame.assign(p_chosen=0.5))
    assert math.isnan(ties["accuracy"]) and math.isnan(ties["accuracy_low"]) and math.isfinite(ties["loss"])


# ---------------------------------------------------------------- sets, intervals, what is not finite


def test_several_sets():
    frame = by_margins([1, -1, 2, 3], set=["x", "x", "y", "y"], subset=[None, None, "s", "t"])
    frame["true_margin"] = [np.nan, np.nan, 1.0, 2.0]
    metrics = evaluated(frame)
    assert (metrics["accuracy"], metrics["x/accuracy"], metrics["y/accuracy"]) == (0.75, 0.5, 1.0)
    assert metrics["y/s/comparisons"] == 1 and metrics["x/loss"] > metrics["y/loss"]
    assert "y/accuracy_ceiling" in metrics and not {"accuracy_ceiling", "x/accuracy_ceiling", "s/accuracy"} & set(
        metrics
    )
    one = evaluated(frame[2:])
    assert one == pytest.approx(
        {name[2:]: value for name, value in metrics.items() if name.startswith("y/")}, nan_ok=True
    )


def test_intervals():
    rng = np.random.default_rng(0)
    frame = table(rng.normal(size=(60, 2)) + [0.5, 0], true_margin=rng.normal(size=60), prompt=np.arange(60) // 2)
    frame = frame.assign(length_chosen=rng.integers(5, 20, 60), length_rejected=rng.integers(5, 20, 60))
    metrics, intervals = evaluation_metrics(frame, CONFIG), evaluation_intervals(frame, CONFIG)
    facts = {f"eval/{name}" for name in "comparisons prompts reward_min reward_max accuracy_low accuracy_high".split()}
    assert set(intervals) == set(metrics) - facts
    for name in set(intervals) - {"eval/ece"}:  # an absolute value is larger in a resample
        low, high = intervals[name]
        assert low - 1e-12 <= metrics[name] <= high + 1e-12, name
        assert low < high or name == "eval/prompt_only_baseline_loss", name
    assert intervals["eval/ties"] == wilson_interval(0.0, 30)
    assert intervals["eval/accuracy"] == (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"])
    of_one_prompt = evaluation_intervals(frame.assign(prompt=1), CONFIG)
    assert {METRICS[name.removeprefix("eval/")].unit for name in of_one_prompt} == {"fraction"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_leaves_no_number(bad):
    frame = table([[1.0, 0.0], [bad, 0.5], [2.0, 1.0]], subset=["a", "b", "a"], true_margin=1.0)
    metrics, intervals = evaluated(frame), evaluation_intervals(frame, CONFIG)
    known = "comparisons prompts longer_answer_baseline_accuracy prompt_only_baseline_loss accuracy_ceiling".split()
    known += ["a/comparisons", "b/comparisons", "a/accuracy", "a/accuracy_low", "a/accuracy_high"]
    assert {name for name, value in metrics.items() if math.isfinite(value)} == set(known)
    assert math.isnan(intervals["eval/loss"][0])


def test_one_pair():
    metrics = evaluated(table([[1.0, 0.0]]))
    assert metrics["accuracy"] == 1 and 0 < metrics["accuracy_low"] < metrics["accuracy_high"] <= 1
    assert math.isnan(metrics["margin_length_spearman"])


# ---------------------------------------------------------------- the registry


def test_definitions_of_logged_names():
    assert find_metric("eval/plain/brief/accuracy_low") is METRICS["accuracy"]
    assert find_metric("compare/other_loss") is find_metric("compare/loss_difference") is METRICS["loss"]
    assert find_metric("train/loss") is TRAINING_METRICS["train/loss"] and find_metric("eval/mine").unit == ""
    directions = {"eval/loss": False, "eval/chat/ece": False, "eval/ties": False, "train/accuracy": True}
    directions |= {"eval/margin_q05": True, "eval/rb/rewardbench/score": True, "eval/rewardbench2/ties": True}
    directions |= dict.fromkeys(["eval/temperature", "eval/chat/reward_std", "eval/rewardbench/pairs", "eval/x"])
    assert {name: find_metric(name).higher_is_better for name in directions} == directions
    units = {"", "fraction", "nats", "reward", "score", "prompts", "steps", "epochs", "s", "1/s", "10^9 bytes"}
    for definition in (*METRICS.values(), *TRAINING_METRICS.values()):
        assert definition.meaning and definition.unit in units


def test_a_new_metric_of_the_texts(monkeypatch):
    """One definition gives values of each set, intervals and a direction, for tables that have its column."""
    monkeypatch.setitem(METRICS, "questions", None)  # so that it is removed after the test
    has_column = lambda frame: "asks" in frame  # noqa: E731
    definition = Metric("questions", "fraction", "chosen answers that ask a question", False, only_if=has_column)
    definition(lambda rows, weight: mean(rows["asks"], weight))
    frame = by_margins([1, 2, 3], set=["x", "y", "y"], asks=[0, 1, 0])
    metrics = evaluated(frame)
    assert (metrics["questions"], metrics["y/questions"]) == (pytest.approx(1 / 3), 0.5)
    assert evaluation_intervals(frame, CONFIG)["eval/x/questions"] == wilson_interval(0.0, 1)
    assert find_metric("eval/y/questions").higher_is_better is False
    assert "questions" not in evaluated(frame.drop(columns="asks"))


# ---------------------------------------------------------------- prompts with several answers


def group(rewards: list[float], scores: list[float], index: int) -> list[dict]:
    """The comparisons of a prompt: each two answers with different scores."""
    pairs = [(a, b) for a in range(len(rewards)) for b in range(len(rewards)) if scores[a] > scores[b]]
    columns = {"index": index, "prompt": index, "row": index, "id": str(index), "share": 1 / len(pairs)}
    return [
        columns
        | dict(zip(("chosen", "rejected"), pair, strict=True))
        | {f"reward_{side}": rewards[n] for side, n in zip(("chosen", "rejected"), pair, strict=True)}
        | {f"score_{side}": scores[n] for side, n in zip(("chosen", "rejected"), pair, strict=True)}
        for pair in pairs
    ]


def groups(*prompts) -> pd.DataFrame:
    rows = pd.DataFrame([row for i, prompt in enumerate(prompts) for row in group(*prompt, i)])
    return table(np.zeros((len(rows), 2)), **rows)


def test_best_of_n_and_kendall_by_hand():
    """A perfect ranking of four; a wrong best answer of three with one swap; two highest rewards, one of them right."""
    frame = groups(
        ([4.0, 3.0, 2.0, 1.0], [9.0, 7.0, 5.0, 3.0]),
        ([1.0, 2.0, 0.0], [5.0, 4.0, 1.0]),
        ([1.0, 1.0, 0.0], [2.0, 8.0, 2.0]),
    )
    metrics = evaluated(frame)
    assert metrics["comparisons"] == 6 + 3 + 2 and metrics["prompts"] == 3
    assert metrics["best_of_n_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["best_of_n_regret"] == pytest.approx((0 + 1 + 3) / 3)
    # third prompt: pairs (0, 1) tied in reward, (0, 2) tied in score, (1, 2) concordant: 1 / sqrt(2 x 2)
    assert metrics["kendall_tau"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert metrics["accuracy"] == pytest.approx((1 + 2 / 3 + (0.5 + 1) / 2) / 3)  # each prompt counts once
    intervals = evaluation_intervals(frame, CONFIG)
    assert {"eval/best_of_n_accuracy", "eval/best_of_n_regret", "eval/kendall_tau"} <= set(intervals)


def test_equal_rewards_of_a_prompt():
    metrics = evaluated(groups(([1.0, 1.0, 1.0], [3.0, 2.0, 1.0])))
    assert (metrics["best_of_n_accuracy"], metrics["best_of_n_regret"]) == (pytest.approx(1 / 3), pytest.approx(1))
    assert metrics["kendall_tau"] == 0


def test_pairs_have_no_metrics_of_groups():
    frame = table([[1.0, 0.0], [2.0, 0.0]], score_chosen=1.0, score_rejected=0.0)
    assert not {"best_of_n_accuracy", "best_of_n_regret", "kendall_tau"} & set(evaluated(frame))


def test_the_loss_of_a_ranking():
    """Each prompt counts once: the Plackett-Luce loss of two prompts with two and one choices."""
    frame = groups(([1.0, 0.0, 2.0], [3.0, 2.0, 1.0]), ([0.5, 3.0], [1.0, 0.0]))
    options = LossOptions(loss_type="plackett_luce", center_rewards_coefficient=0.1)
    first = (math.log(1 + math.exp(-1) + math.exp(1)) + math.log(1 + math.exp(2))) / 2 + 0.1 * 2**2
    second = math.log(1 + math.exp(2.5)) + 0.1 * 3.5**2
    metrics = evaluation_metrics(frame, options)
    assert metrics["eval/loss"] == pytest.approx((first + second) / 2)
    equal = (math.log(3) + math.log(2)) / 2
    assert metrics["eval/prompt_only_baseline_loss"] == pytest.approx((equal + math.log(2)) / 2)
    assert evaluated(frame)["loss"] != pytest.approx((first + second) / 2)  # Bradley-Terry


def test_the_intraclass_correlation_counts_every_answer_once():
    """Two prompts with answers 1, 2, 3 and 5, 6, 7: ICC(1) = (MSB - MSW) / (MSB + 2 MSW) = (24 - 1) / (24 + 2)."""
    scores = [3.0, 2.0, 1.0]
    metrics = evaluated(groups(([1.0, 2.0, 3.0], scores), ([5.0, 6.0, 7.0], scores)))
    assert metrics["prompt_icc"] == pytest.approx(23 / 26)
