"""Weighted statistics by hand, and the bootstrap over prompts."""

import math

import numpy as np
import pytest
from tables import by_margins, table

from rm.evaluate import statistics as st
from rm.evaluate.metrics import METRICS
from rm.evaluate.table import accuracy_of, measures

X, ONES = np.array([1.0, 2.0, 4.0, 9.0]), np.ones(4)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.has_interval])
def test_counts_give_what_repeated_rows_give(name):
    """A value and its interval are one definition: the value for the counts of a resample is that of its rows."""
    rng = np.random.default_rng(0)
    # each prompt text has a pair and a group of three answers with three comparisons
    sides = np.tile([(0, 1), (0, 1), (1, 2), (0, 2)], (10, 1)).T
    index = np.repeat(np.arange(20), np.tile([1, 3], 10))
    columns = {f"{name}_{side}": values[index, n] for name, values in
               (("reward", rng.normal(size=(20, 3))), ("score", rng.integers(0, 3, (20, 3)).astype(float)))
               for side, n in zip(("chosen", "rejected"), sides, strict=True)}  # fmt: skip
    columns |= {"index": index, "chosen": sides[0], "rejected": sides[1]}
    frame = table(np.zeros((40, 2)), prompt=np.repeat(np.arange(10), 4), margin=rng.random(40), **columns)
    frame = frame.assign(length_chosen=rng.integers(4, 9, 40), weight=rng.random(40), p_chosen=rng.random(40))
    frame = frame.assign(true_margin=rng.normal(size=40), share=np.tile([1.0, 1 / 3, 1 / 3, 1 / 3], 10))
    counts = np.repeat(rng.integers(0, 4, (3, 10)), 4, axis=1).astype(float)
    found = measures(frame, counts, [name])[name]
    assert found.shape == (3,)
    for value, row in zip(found, counts, strict=True):
        rows = np.repeat(np.arange(40), row.astype(int))
        again = np.array([np.sum(rows[:i] == r) for i, r in enumerate(rows)])
        drawn = {name: frame[name].to_numpy()[rows] * 100 + again for name in ("prompt", "index")}  # other prompts
        drawn = frame.iloc[rows].assign(**drawn).sort_values(["index", "chosen", "rejected"])
        if not name.endswith(("spearman", "true_margin")):  # which keep the ranks of the whole table
            assert value == pytest.approx(float(measures(drawn, np.ones(len(rows)), [name])[name]), abs=1e-9)


def test_moments_and_quantiles():
    assert st.mean(X, ONES) == 4 and st.standard_deviation(X, ONES) == pytest.approx(math.sqrt(38 / 4))
    assert st.standard_deviation(X + 1e9, ONES) == pytest.approx(math.sqrt(38 / 4))  # no digits are lost
    assert [float(st.quantile(X, q, ONES)) for q in (0.25, 0.5, 0.75, 0.95)] == [1, 2, 4, 9]
    assert st.quantile(X, 0.5, np.array([0.0, 0.0, 3.0, 1.0])) == 4


def test_rank_correlation():
    assert st.rank_correlation(np.arange(4), np.array([10, 20, 40, 30]), ONES) == pytest.approx(0.8)  # 1 - 6*2/(4*15)
    tied = st.rank_correlation(np.array([1, 1, 2]), np.arange(3), np.ones(3))
    assert tied == pytest.approx(math.sqrt(3) / 2)  # ties are averaged


def test_accuracy_swaps_to_the_last_bit():
    assert st.accuracy(np.array([1.0, 0.0, -2.0, 3.0, 0.0]), np.ones(5)) == 3 / 5
    for n in range(1, 60):
        for right in range(n + 1):
            margin = np.array([1.0] * right + [-1.0] * (n - right))
            one, other = st.accuracy(margin, np.ones(n)), st.accuracy(-margin, np.ones(n))
            assert one == 1 - other and other == 1 - one and one == pytest.approx(right / n, abs=1e-15)


def test_bins_of_confidence():
    confidence, bins = st.confidence(np.log([1.0, 0.549 / 0.451, 0.551 / 0.449, 1e-9, 1e9]))
    assert confidence == pytest.approx([0.5, 0.549, 0.551, 1, 1]) and bins.tolist() == [0, 0, 1, 9, 9]


# ---------------------------------------------------------------- intervals


def interval(margins, prompts) -> tuple[float, float]:
    found = accuracy_of(by_margins(margins, prompt=prompts))
    return found["accuracy_low"], found["accuracy_high"]


def test_wilson_interval():
    assert st.wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # the textbook example
    assert st.wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_whole_prompts_are_resampled(monkeypatch):
    prompt = np.array([7, 7, 3, 7, 5])
    counts = np.concatenate(list(st.resamples(prompt)))
    assert counts.shape == (st.RESAMPLES, 5)
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 0] == counts[:, 3]).all()
    assert (counts[:, 0] + counts[:, 2] + counts[:, 4] == 3).all()  # three prompts are drawn from three
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.1)
    monkeypatch.setattr(st, "CELLS", 15)
    np.testing.assert_array_equal(np.concatenate(list(st.resamples(prompt))), counts)  # however many at once


def test_the_interval_is_over_prompts():
    margins = np.where(np.random.default_rng(0).random(400) < 0.7, 1.0, -1.0)
    found = interval(margins, np.arange(400))
    assert found == pytest.approx(st.wilson_interval(np.mean(margins > 0), 400), abs=0.01)  # independent pairs
    copied = interval(np.repeat(margins, 4), np.repeat(np.arange(400), 4))
    assert copied == pytest.approx(found, abs=0.01)  # the same evidence four times is not more evidence


def test_where_all_resamples_agree():
    assert interval(np.ones(8), np.arange(8) // 2) == st.wilson_interval(1.0, 4)
    assert interval([1, 1, -1], [5, 5, 5]) == st.wilson_interval(2 / 3, 1)
    same = {"a": lambda counts: np.full(len(counts), 0.25), "b": lambda counts: np.full(len(counts), 0.25)}
    measure = lambda counts: {name: function(counts) for name, function in same.items()}  # noqa: E731
    found = st.bootstrap(measure, np.arange(50), ["a"])
    assert found == {"a": st.wilson_interval(0.25, 50), "b": (0.25, 0.25)}  # b is not a fraction
    assert st.bootstrap(measure, np.zeros(50), ["a"]) == {"a": st.wilson_interval(0.25, 1)}  # of one prompt


def test_the_interval_covers():
    """About 95% of 200 evaluations of 100 prompts have the true accuracy in their interval."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        easy = np.repeat(rng.random(100) < 0.5, 2)  # the pairs of a prompt are correlated
        margins = np.where(rng.random(200) < np.where(easy, 0.9, 0.5), 1.0, -1.0)
        low, high = interval(margins, np.repeat(np.arange(100), 2))
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199


def test_values_that_are_not_defined_or_infinite():
    def ends(values):
        parts = iter(np.split(np.asarray(values, dtype=float), 10))  # ten resamples at a time
        return st.bootstrap(lambda counts: {"x": next(parts)}, np.arange(st.CELLS // 100))["x"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(st, "resamples", lambda prompt: range(10))
        assert ends([*np.arange(900), *[np.nan] * 100]) == pytest.approx((0.025 * 899, 0.975 * 899))
        assert ends([1.0] * 900 + [math.inf] * 100) == (1.0, math.inf)
        assert all(map(math.isnan, ends([np.nan] * 1000)))
    assert all(map(math.isnan, interval(X * np.nan, X)))
