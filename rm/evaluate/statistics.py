"""Statistics with weights, and the bootstrap: one definition gives a value and its interval.

Shape suffixes: P pairs (or other items), R resamples. `weight` is [..., P]: ones give the value itself, the counts
of R resamples, [R, P], give R values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

RESAMPLES = 1000
CELLS = 4_000_000  # resamples x pairs that are held at once
BINS = 10  # of the calibration error, equally wide
SCALES = (1e-4, 1e4)  # of the margins' root mean square: between these a temperature is looked for


def mean(x_P: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x_P = np.asarray(x_P, dtype=np.float64)
    return x_P[0] + weight @ (x_P - x_P[0]) / weight.sum(-1)  # of equal values exactly that value


def standard_deviation(x_P: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of the population: over n, not n - 1."""
    x_P = x_P - x_P.mean()  # or squares of large rewards would lose the digits
    return np.sqrt(np.maximum(mean(x_P**2, weight) - mean(x_P, weight) ** 2, 0))


def quantiles(x_P: np.ndarray, fractions: Sequence[float], weight: np.ndarray) -> list[np.ndarray]:
    """For each fraction the smallest x that so much of the weight is not above (numpy's `inverted_cdf`)."""
    order = np.argsort(x_P, kind="stable")
    below = np.cumsum(weight[..., order], axis=-1)
    return [x_P[order][(below >= q * below[..., -1:] - 1e-9).argmax(-1)] for q in fractions]


def correlation(x_P: np.ndarray, y_P: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Pearson's; NaN where a side is constant."""
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    covariance = mean(x_P * y_P, weight) - mean(x_P, weight) * mean(y_P, weight)
    product = standard_deviation(x_P, weight) * standard_deviation(y_P, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(product > 0, covariance / product, np.nan)


def ranks(x_P: np.ndarray) -> np.ndarray:
    """From 1, ties get their mean. The correlation of two is Spearman's; resamples keep the ranks of the whole."""
    return pd.Series(x_P).rank().to_numpy()


def accuracy(margin_P: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Fraction of pairs with margin > 0, ties counted half: `margin_P` is r_chosen - r_rejected.

    From the larger side: so swapping all labels gives 1 - accuracy to the last bit. NaN where a margin is NaN.
    """
    weight = np.ones(len(margin_P)) if weight is None else weight
    if np.isnan(margin_P).any():
        return np.full(weight.shape[:-1], np.nan)
    right = (margin_P > 0) + 0.5 * (margin_P == 0)
    right, total = weight @ right, weight.sum(-1)
    larger = np.maximum(right, total - right) / total
    return np.where(2 * right >= total, larger, 1 - larger)


def accuracy_ceiling(true_margin_P: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """The best possible accuracy, mean of max(p, 1 - p) with p = sigmoid(true margin); `true_margin_P`: log-odds."""
    weight = np.ones(len(true_margin_P)) if weight is None else weight
    return mean(sigmoid(np.abs(true_margin_P)), weight)


def calibration_error(p_P: np.ndarray, margin_P: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Expected calibration error (Guo et al. 2017): mean over pairs of |accuracy - confidence| of the pair's bin.

    The confidence is that of the side with the higher reward, max(p, 1 - p), from 0.5 to 1, in `BINS` equal bins.
    """
    error_P = (margin_P > 0) + 0.5 * (margin_P == 0) - np.maximum(p_P, 1 - p_P)
    bin_P = confidence_bin(p_P)
    gaps = [np.abs(weight[..., bin_P == b] @ error_P[bin_P == b]) for b in np.unique(bin_P)]
    return sum(gaps) / weight.sum(-1)


def share_between(x_P: np.ndarray, group_P: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Share of the variance of x that belongs to the group, in the population: the intraclass correlation ICC(1) by a
    one-way analysis of variance (Shrout and Fleiss 1979, for groups of unequal size). About 0 without an effect, where
    the plain share would be 1/2 for groups of two; `weight` is the same for all of a group."""
    of_group = pd.Series(x_P).groupby(group_P)
    mean_P, size_P = of_group.transform("mean").to_numpy(), of_group.transform("size").to_numpy()
    items, groups = weight.sum(-1), weight @ (1 / size_P)
    grand = mean(x_P, weight)[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (weight * (mean_P - grand) ** 2).sum(-1) / (groups - 1)
        within = weight @ (x_P - mean_P) ** 2 / (items - groups)
        size = (items - weight @ size_P / items) / (groups - 1)
        share = (between - within) / (between + (size - 1) * within)
    return np.where((groups > 1.5) & (items > groups), share, np.nan)


def confidence_bin(p_P: np.ndarray) -> np.ndarray:
    return np.minimum((2 * BINS * (np.maximum(p_P, 1 - p_P) - 0.5)).astype(int), BINS - 1)


def temperature(margin_P: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The T that minimises the mean of -log sigmoid(margin / T): above 1, rewards are too far apart, below 1 too near.

    0 where every pair is right (the sharper the better), infinite where they are no better than chance; NaN where all
    are ties. Looked for within `SCALES` times the margins' root mean square.
    """
    unit = math.sqrt(np.mean(np.square(margin_P)))
    if unit == 0:
        return np.full(weight.shape[:-1], np.nan)
    margin_P = margin_P / unit
    grid_K = np.geomspace(1 / SCALES[1], 1 / SCALES[0], 120)  # of s = 1 / T, in which the mean is convex: its slope ...
    slope_K = -(weight @ (margin_P[:, None] * sigmoid(-margin_P[:, None] * grid_K)))
    above = np.argmax(slope_K >= 0, axis=-1)  # ... changes sign once, before this point
    never = slope_K[..., -1] < 0
    low, high = grid_K[np.maximum(above - 1, 0)], grid_K[above]
    scale = np.sqrt(low * high)
    for _ in range(3):  # Newton's steps, inside the bracket
        p_wrong = sigmoid(-scale[..., None] * margin_P)
        slope = -(weight * p_wrong) @ margin_P
        curvature = (weight * p_wrong * (1 - p_wrong)) @ margin_P**2
        scale = np.clip(scale - slope / np.maximum(curvature, 1e-300), low, high)
    return np.where(never, 0, np.where(above == 0, np.inf, unit / scale))


def sigmoid(x_P: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x_P, -700, 700)))  # neither overflow nor 0


# ---------------------------------------------------------------- intervals


def wilson_interval(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% score interval of a proportion `p` of `n` independent items (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def resamples(group_P: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """`RESAMPLES` bootstrap resamples of whole groups, as counts of each pair, [R, P], some at a time.

    Pairs of one prompt are no independent evidence, so that prompts are drawn, with replacement, as many as there are.
    """
    groups, group_P = np.unique(group_P, return_inverse=True)
    rng, at_once = np.random.default_rng(seed), max(1, CELLS // len(group_P))
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(len(groups), size=(min(at_once, RESAMPLES - start), len(groups)))
        cells = drawn + len(groups) * np.arange(len(drawn))[:, None]  # all resamples are counted in one call
        counts = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield counts[:, group_P].astype(np.float64)


def percentiles(values_R: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a statistic from its values over resamples (those that are defined)."""
    values_R = values_R[~np.isnan(values_R)]
    if len(values_R) < RESAMPLES / 2:
        return math.nan, math.nan
    method = "linear" if np.isfinite(values_R).all() else "inverted_cdf"  # there is nothing between 3 and infinity
    low, high = np.quantile(values_R, (0.025, 0.975), method=method)
    return float(low), float(high)


def share_interval(value: float, values_R: np.ndarray, num_prompts: int) -> tuple[float, float]:
    """95% interval of a share of pairs: percentiles of its values over resamples of prompts.

    Where these all agree (every pair is right, say, or there is one prompt) that has no width, and Wilson's is given,
    with the number of prompts for n.
    """
    low, high = percentiles(values_R)
    return wilson_interval(value, num_prompts) if high - low < 1e-12 else (low, high)


def accuracy_interval(margin_P: np.ndarray, prompt_P: np.ndarray) -> tuple[float, float]:
    """95% interval of the accuracy, by `share_interval`."""
    values_R = np.concatenate([accuracy(margin_P, counts) for counts in resamples(prompt_P)])
    return share_interval(float(accuracy(margin_P)), values_R, len(np.unique(prompt_P)))
