"""Weighted statistics, and the one method for 95% intervals: the percentile bootstrap over prompts.

Shape suffixes: C comparisons (or answers), R resamples. A weight is [..., C] and a statistic [...]: ones give the value
itself, the counts of R resamples, [R, C], give R values.
"""

import math
from collections.abc import Callable, Collection, Iterator

import numpy as np
import pandas as pd

RESAMPLES = 1000
CELLS = 4_000_000  # resamples x comparisons that are in memory at once
BINS = 10  # of confidence, equally wide


def sigmoid(x_C: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x_C, -700, 700)))  # neither overflow nor 0


def mean(x_C: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x_C = np.asarray(x_C, dtype=np.float64)
    return x_C[0] + weight @ (x_C - x_C[0]) / weight.sum(-1)  # exact if all values are equal


def standard_deviation(x_C: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Population standard deviation (divided by n, not n - 1)."""
    x_C = x_C - x_C.mean()  # the squares of large rewards would lose digits
    return np.sqrt(np.maximum(mean(x_C**2, weight) - mean(x_C, weight) ** 2, 0))


def quantile(x_C: np.ndarray, fraction: float, weight: np.ndarray) -> np.ndarray:
    """Smallest x with at least this fraction of the weight at or below it (numpy's `inverted_cdf`)."""
    order = np.argsort(x_C, kind="stable")
    below = np.cumsum(weight[..., order], axis=-1)
    return x_C[order][(below >= fraction * below[..., -1:] - 1e-9).argmax(-1)]


def rank_correlation(x_C: np.ndarray, y_C: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Spearman correlation, ties averaged; NaN if one side is constant. Resamples keep the ranks of the whole table."""
    x_C, y_C = (pd.Series(side).rank().to_numpy() - (len(x_C) + 1) / 2 for side in (x_C, y_C))
    covariance = mean(x_C * y_C, weight) - mean(x_C, weight) * mean(y_C, weight)
    product = standard_deviation(x_C, weight) * standard_deviation(y_C, weight)
    return np.where(product > 0, covariance / product, np.nan)


def is_right(difference_C: np.ndarray) -> np.ndarray:
    """1 if chosen has the higher reward (`difference_C` = r_chosen - r_rejected > 0), 0.5 if the rewards are equal."""
    return (difference_C > 0) + 0.5 * (difference_C == 0)


def accuracy(difference_C: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean of `is_right`; NaN if a difference is NaN. Swapping all labels gives exactly 1 - accuracy."""
    if np.isnan(difference_C).any():
        return np.full(weight.shape[:-1], np.nan)
    right, total = weight @ is_right(difference_C), weight.sum(-1)
    larger = np.maximum(right, total - right) / total
    return np.where(2 * right >= total, larger, 1 - larger)


def confidence(difference_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(max(p, 1 - p) with p = sigmoid(difference); its bin, of `BINS` equally wide ones from 0.5 to 1)."""
    p_C = sigmoid(difference_C)
    confidence_C = np.maximum(p_C, 1 - p_C)
    return confidence_C, np.minimum((2 * BINS * (confidence_C - 0.5)).astype(int), BINS - 1)


def bootstrap(
    measure: Callable[[np.ndarray], dict[str, np.ndarray]], prompt_C: np.ndarray, fractions: Collection[str] = ()
) -> dict[str, tuple[float, float]]:
    """95% intervals of what `measure(counts)` returns: percentiles over resamples of prompts (cluster bootstrap).

    If all resamples agree (every comparison is right, or there is one prompt), a metric in `fractions` has Wilson's
    interval with n = the number of prompts. Other metrics have no interval if there is only one prompt.
    """
    parts, num_prompts = [measure(counts) for counts in resamples(prompt_C)], len(np.unique(prompt_C))
    intervals = {}
    for name in parts[0]:
        values_R = np.concatenate([part[name] for part in parts])
        values_R = values_R[~np.isnan(values_R)]
        low = high = math.nan
        if len(values_R) >= RESAMPLES / 2:  # else it is not defined
            method = "linear" if np.isfinite(values_R).all() else "inverted_cdf"  # nothing is between 3 and infinity
            low, high = np.quantile(values_R, (0.025, 0.975), method=method).tolist()
        if name in fractions and high - low < 1e-12:
            low, high = wilson_interval(low, num_prompts)
        if name in fractions or num_prompts > 1:
            intervals[name] = (low, high)
    return intervals


def resamples(group_C: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """`RESAMPLES` resamples of whole groups, as counts of each comparison [R, C], some at a time.

    Comparisons that share a prompt are correlated, so prompts are drawn with replacement, as many as there are.
    """
    groups, group_C = np.unique(group_C, return_inverse=True)
    rng, at_once = np.random.default_rng(seed), max(1, CELLS // len(group_C))
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(len(groups), size=(min(at_once, RESAMPLES - start), len(groups)))
        cells = drawn + len(groups) * np.arange(len(drawn))[:, None]  # all resamples are counted in one call
        counts = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield counts[:, group_C].astype(np.float64)


def wilson_interval(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% score interval of a proportion `p` of `n` independent observations (Wilson 1927)."""
    p = min(max(p, 0.0), 1.0)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return center - half, center + half
