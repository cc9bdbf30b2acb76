"""The metrics of an evaluation and of training: function, unit, meaning and direction of each one, defined once.

To add a metric, write a function with the decorator `Metric`. It gets the `Rows` of an evaluation table and weights
[..., C] with a row for each resample, and returns [...]. The metric is then logged for each evaluation set, has an
interval, is in all tables and in the report, and can be `metric_for_best_model`. C comparisons (2C answers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from rm.config.options import LossOptions
from rm.evaluate import statistics as st
from rm.evaluate.statistics import mean
from rm.loss import pairwise_loss, plackett_luce_loss

METRICS: dict[str, Metric] = {}


# ---------------------------------------------------------------- what metrics read
@dataclass(frozen=True)
class Rows:
    """An evaluation table as float64 arrays."""

    table: pd.DataFrame
    options: LossOptions

    def __getitem__(self, column: str) -> np.ndarray:
        return self.table[column].to_numpy(np.float64)

    @cached_property
    def rewards(self) -> np.ndarray:
        """Rewards of the chosen and the rejected answers [2, C]; raises `FloatingPointError` if one is not finite."""
        rewards = np.stack([self["reward_chosen"], self["reward_rejected"]])
        if not np.isfinite(rewards).all():
            raise FloatingPointError("a reward is NaN or infinite, and so are metrics of the rewards")
        return rewards

    @cached_property
    def margin(self) -> np.ndarray:
        """reward_chosen - reward_rejected [C]; the margin in the data is `self["margin"]`."""
        return self.rewards[0] - self.rewards[1]

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of all answers without the common prefix, first the chosen ones [2C]."""
        return np.concatenate([self[f"length_{side}"] - self["prefix_length"] for side in ("chosen", "rejected")])

    @cached_property
    def answers(self) -> pd.DataFrame:
        """Each compared answer once, prompt by prompt [N]: `index`, `reward`, `prompt`, and `score` if there is one.
        Raises as `rewards` does."""
        sides, _ = [], self.rewards
        for side in ("chosen", "rejected"):
            names = {side: "answer", f"reward_{side}": "reward", f"score_{side}": "score"}
            names = {name: new for name, new in names.items() if name in self.table}
            sides.append(self.table[["index", "prompt", *names]].rename(columns=names))
        answers = pd.concat(sides).drop_duplicates(["index", "answer"])
        return answers.sort_values(["index", "answer"], ignore_index=True)

    @cached_property
    def has_highest_reward(self) -> pd.Series:
        """Which of `answers` have the highest reward of their prompt."""
        return self.answers["reward"] == self.answers.groupby("index")["reward"].transform("max")

    def of_prompts(self, values: pd.Series) -> np.ndarray:
        """Values of prompts by their `index` for each comparison [C]: since shares add up to 1, prompts count once."""
        return values.reindex(self.table["index"]).to_numpy(np.float64)

    def losses(self, all_equal: bool = False) -> np.ndarray:
        """Training loss of each comparison [C], times its weight; or what it would be if all rewards were equal."""
        options = self.options.loss_options
        if self.options.loss_type == "plackett_luce":
            counts = self.answers.groupby("index").size()
            columns = ((1 - all_equal) * self.answers["reward"], self.answers["score"], counts)
            loss_P = plackett_luce_loss(*(torch.tensor(column.to_numpy()) for column in columns), **options)
            return self.of_prompts(pd.Series(loss_P.numpy(), counts.index))
        rewards = np.zeros((2, len(self.table))) if all_equal else self.rewards
        columns = map(torch.tensor, (*rewards, self["margin"], self["p_chosen"]))
        return self["weight"] * pairwise_loss(*columns, **options).numpy()

    def decided(self, w: np.ndarray) -> np.ndarray:
        """The weights with 0 for label ties (p_chosen = 0.5)."""
        return np.where(self["p_chosen"] == 0.5, 0, w)


def both(w: np.ndarray) -> np.ndarray:
    """The weights of all answers, first the chosen ones [..., 2C]."""
    return np.concatenate([w, w], axis=-1)


# ---------------------------------------------------------------- definitions
@dataclass
class Metric:
    """What a logged number is. As a decorator it adds to `METRICS` how to compute it from (rows, weights).

    `higher_is_better`: None if it has no direction. `only_if`: which tables have it.
    """

    name: str
    unit: str
    meaning: str
    higher_is_better: bool | None = None
    has_interval: bool = True
    only_if: Callable[[pd.DataFrame], bool] = lambda table: True
    function: Callable[[Rows, np.ndarray], Any] | None = None

    def __call__(self, function: Callable[[Rows, np.ndarray], Any]) -> Callable[[Rows, np.ndarray], Any]:
        self.function = function
        METRICS[self.name] = self
        return function


def has_true_margin(table: pd.DataFrame) -> bool:
    return "true_margin" in table and table["true_margin"].notna().all()


def has_groups(table: pd.DataFrame) -> bool:
    """Whether a prompt has several comparisons, and all compared answers have scores."""
    scores = [f"score_{side}" for side in ("chosen", "rejected")]
    return bool((table["share"] < 1).any()) and set(scores) <= set(table) and table[scores].notna().all(axis=None)


Metric("comparisons", "", "comparisons evaluated, each once", None, False)(lambda r, w: len(r.table))
Metric("prompts", "prompts", "different prompts", None, False)(lambda r, w: r.table["prompt"].nunique())
Metric(
    "label_ties",
    "",
    "comparisons labelled as ties (p_chosen = 0.5), left out of accuracy",
    has_interval=False,
    only_if=lambda table: (table["p_chosen"] == 0.5).any(),
)(lambda r, w: int((r["p_chosen"] == 0.5).sum()))
Metric(
    "accuracy", "fraction", "comparisons with a higher reward for the chosen answer; equal rewards count half", True
)(lambda r, w: st.accuracy(r.margin, r.decided(w)))
Metric("accuracy_ceiling", "fraction", "best possible accuracy, given the true rewards", only_if=has_true_margin)(
    lambda r, w: mean(st.sigmoid(np.abs(r["true_margin"])), r.decided(w))
)
Metric("longer_answer_baseline_accuracy", "fraction", "accuracy of preferring the longer answer")(
    lambda r, w: st.accuracy(r["length_chosen"] - r["length_rejected"], r.decided(w))
)
Metric("ties", "fraction", "comparisons with equal rewards", False)(lambda r, w: mean(r.margin == 0, w))
Metric("loss", "nats", "mean of the training loss on these comparisons", False)(lambda r, w: mean(r.losses(), w))
Metric("prompt_only_baseline_loss", "nats", "loss of giving all answers to a prompt the same reward")(
    lambda r, w: mean(r.losses(all_equal=True), w)
)


BEST_OF_N = "score of the answer with the highest reward (of several such answers their mean)"


@Metric("best_of_n_accuracy", "fraction", f"prompts in which the {BEST_OF_N} is the highest", True, only_if=has_groups)
def best_of_n_accuracy(r: Rows, w: np.ndarray) -> np.ndarray:
    is_best = r.answers["score"] == r.answers.groupby("index")["score"].transform("max")
    return mean(r.of_prompts(is_best[r.has_highest_reward].groupby(r.answers["index"]).mean()), w)


@Metric("best_of_n_regret", "score", f"highest score of a prompt minus the {BEST_OF_N}", False, only_if=has_groups)
def best_of_n_regret(r: Rows, w: np.ndarray) -> np.ndarray:
    highest, selected = r.answers.groupby("index")["score"].max(), r.answers[r.has_highest_reward]
    return mean(r.of_prompts(highest - selected.groupby("index")["score"].mean()), w)


@Metric("kendall_tau", "", "rank correlation of reward and score (tau-b), mean over prompts", True, only_if=has_groups)
def kendall_tau(r: Rows, w: np.ndarray) -> np.ndarray:
    """Kendall 1945. A prompt whose rewards are all equal has 0; one whose scores are all equal does not count."""
    pairs = r.answers.merge(r.answers, on="index")
    signs = pairs[["index"]].assign(
        reward=np.sign(pairs["reward_x"] - pairs["reward_y"]), score=np.sign(pairs["score_x"] - pairs["score_y"])
    )
    sums = signs.assign(both=signs["reward"] * signs["score"]).groupby("index")
    agree, untied = sums["both"].sum(), sums[["reward", "score"]].agg(lambda sign: sign.abs().sum())
    tau = (agree / np.sqrt(untied["reward"] * untied["score"])).mask(untied["reward"] == 0, 0.0)
    tau_C = r.of_prompts(tau.mask(untied["score"] == 0))
    return mean(np.nan_to_num(tau_C), np.where(np.isnan(tau_C), 0, w))


@Metric("prompt_icc", "fraction", "share of the variance of rewards that is between prompts (intraclass correlation)")
def intraclass_correlation(r: Rows, w: np.ndarray) -> np.ndarray:
    """ICC(1) of a one-way analysis of variance with groups of unequal size (Shrout and Fleiss 1979)."""
    starts, counts = np.unique(r.table["index"], return_index=True)[1], r.answers.groupby("index").size()
    x, group = r.answers["reward"].to_numpy(), r.answers["prompt"]
    w = np.repeat(np.add.reduceat(w, starts, axis=-1), counts, axis=-1)
    sums = pd.DataFrame({"size": 1.0, "total": x}).groupby(group.to_numpy())
    size, total = sums.transform("sum").to_numpy().T
    items, groups = w.sum(-1), w @ (1 / size)
    between = (w * (total / size - mean(x, w)[..., None]) ** 2).sum(-1) / (groups - 1)
    within = w @ (x - total / size) ** 2 / (items - groups)
    mean_size = (items - w @ size / items) / (groups - 1)
    icc = (between - within) / (between + (mean_size - 1) * within)
    return np.where((groups > 1.5) & (items > groups), icc, np.nan)


@Metric("brier", "", "Brier score: mean squared error of p = sigmoid(margin); 0.25 for p = 0.5", False)
def brier(r: Rows, w: np.ndarray) -> np.ndarray:
    p, label = st.sigmoid(r.margin), r["p_chosen"]
    return mean(label * (1 - p) ** 2 + (1 - label) * p**2, w)


@Metric("ece", "fraction", "expected calibration error: mean |accuracy - confidence| in ten bins of confidence", False)
def calibration_error(r: Rows, w: np.ndarray) -> np.ndarray:
    """Guo et al. 2017; bins of equal width."""
    (confidence, bins), w = st.confidence(r.margin), r.decided(w)
    error = st.is_right(r.margin) - confidence
    return sum(np.abs(w[..., bins == b] @ error[bins == b]) for b in np.unique(bins)) / w.sum(-1)


@Metric("temperature", "", "best T for sigmoid(margin / T); above 1: overconfident; inf: no better than chance")
def temperature(r: Rows, w: np.ndarray) -> np.ndarray:
    """Minimizes the mean of -log sigmoid(margin / T); NaN if all margins are 0."""
    unit, w = math.sqrt(np.mean(np.square(r.margin))), r.decided(w)
    if unit == 0:
        return np.full(w.shape[:-1], np.nan)
    z = r.margin / unit
    grid = np.geomspace(1e-4, 1e4, 120)  # of s = 1 / T, in which the loss is convex: its slope ...
    slopes = -(w @ (z[:, None] * st.sigmoid(-z[:, None] * grid)))
    above = np.argmax(slopes >= 0, axis=-1)  # ... changes sign once, before this point
    low, high = grid[np.maximum(above - 1, 0)], grid[above]
    s = np.sqrt(low * high)
    for _ in range(3):  # Newton steps inside the bracket
        p_wrong = st.sigmoid(-s[..., None] * z)
        slope, curvature = -(w * p_wrong) @ z, (w * p_wrong * (1 - p_wrong)) @ z**2
        s = np.clip(s - slope / np.maximum(curvature, 1e-300), low, high)
    return np.where(slopes[..., -1] < 0, 0, np.where(above == 0, np.inf, unit / s))


Metric("margin", "reward", "mean of reward_chosen - reward_rejected", True)(lambda r, w: mean(r.margin, w))
for percent in (5, 25, 50, 75, 95):
    Metric(f"margin_q{percent:02}", "reward", f"{percent}% quantile of the margin", True)(
        lambda r, w, q=percent / 100: st.quantile(r.margin, q, w)
    )
Metric("spearman_true_margin", "", "rank correlation of the margin and the true one", True, only_if=has_true_margin)(
    lambda r, w: st.rank_correlation(r.margin, r["true_margin"], w)
)
Metric("margin_length_spearman", "", "rank correlation of the margin and the difference in length")(
    lambda r, w: st.rank_correlation(r.margin, r["length_chosen"] - r["length_rejected"], w)
)
Metric("reward_length_spearman", "", "rank correlation of the reward and the length of the answer")(
    lambda r, w: st.rank_correlation(r.rewards.ravel(), r.answer_lengths, both(w))
)
Metric("reward_chosen", "reward", "mean reward of the chosen answers")(lambda r, w: mean(r.rewards[0], w))
Metric("reward_rejected", "reward", "mean reward of the rejected answers")(lambda r, w: mean(r.rewards[1], w))
Metric("reward_mean", "reward", "mean reward of all answers")(lambda r, w: mean(r.rewards.ravel(), both(w)))
Metric("reward_std", "reward", "standard deviation of all rewards")(
    lambda r, w: st.standard_deviation(r.rewards.ravel(), both(w))
)
Metric("reward_min", "reward", "smallest reward", None, False)(lambda r, w: r.rewards.min())
Metric("reward_max", "reward", "largest reward", None, False)(lambda r, w: r.rewards.max())

_TRAINING = (
    Metric("train/loss", "nats", "mean loss since the previous log line", False),
    Metric("train/accuracy", "fraction", "accuracy since the previous log line", True),
    Metric("train/margin", "reward", "mean of reward_chosen - reward_rejected since the previous log line", True),
    Metric("train/reward_chosen", "reward", "mean reward of the chosen answers since the previous log line"),
    Metric("train/reward_rejected", "reward", "mean reward of the rejected answers since the previous log line"),
    Metric("train/epoch", "epochs", "passes over the training data"),
    Metric("train/steps", "steps", "optimizer steps done"),
    Metric("train/best_step", "steps", "step of the best evaluation"),
    Metric("optim/learning_rate", "", "learning rate of all weights but the reward head, at this step"),
    Metric("optim/head_learning_rate", "", "learning rate of the reward head, at this step"),
    Metric("optim/grad_norm", "", "norm of the gradient before clipping, at this step"),
    Metric("optim/skipped_steps", "steps", "steps without an update so far, because a number was not finite"),
    Metric("speed/pairs_per_second", "1/s", "training comparisons (pairs of answers) per second of all processes"),
    Metric("speed/tokens_per_second", "1/s", "training tokens per second of all processes, with padding"),
    Metric("speed/train_seconds", "s", "time in the training loop, without evaluating and saving"),
    Metric("speed/total_seconds", "s", "time since the start of the program"),
    Metric("speed/peak_memory_gb", "10^9 bytes", "peak memory of the main process, on its GPU if it has one"),
)
TRAINING_METRICS = {definition.name: definition for definition in _TRAINING}


def find_metric(name: str) -> Metric:
    """Definition of a logged name, such as `eval/SET/accuracy_low` or `compare/loss_difference`; empty if unknown."""
    *groups, last = name.split("/")
    if groups[-1:] in (["rewardbench"], ["rewardbench2"]) and last not in ("pairs", "prompts"):
        return Metric("rewardbench", "fraction", "published score of this part of RewardBench", True)
    known = TRAINING_METRICS.get(name) or METRICS.get(re.sub("^other_|_(low|high|difference)$", "", last))
    return known or Metric(name, "", "")
