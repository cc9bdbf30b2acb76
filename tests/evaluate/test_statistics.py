"""Weighted statistics against values worked out by hand, and against numpy's; the bootstrap over prompts."""

import math

import numpy as np
import pytest

from rm.evaluate import statistics as st

X = np.array([1.0, 2.0, 4.0, 9.0])
ONES = np.ones(4)


def test_the_value_and_that_of_resamples_are_one_definition():
    """Counts of a resample give what the repeated items give."""
    rng = np.random.default_rng(0)
    x, y, group = rng.normal(size=40), rng.normal(size=40), np.repeat(np.arange(10), 4)
    counts = np.repeat(rng.integers(0, 4, (3, 10)), 4, axis=1).astype(float)
    functions = [
        lambda x, y, g, w: st.mean(x, w),
        lambda x, y, g, w: st.standard_deviation(x, w),
        lambda x, y, g, w: st.correlation(x, y, w),
        lambda x, y, g, w: st.accuracy(x, w),
        lambda x, y, g, w: st.calibration_error(st.sigmoid(x), x, w),
        lambda x, y, g, w: st.temperature(x + 0.5, w),
        lambda x, y, g, w: st.quantiles(x, [0.3], w)[0],
        lambda x, y, g, w: st.share_between(x, g, w),
    ]
    copies = [np.repeat(np.arange(40), row.astype(int)) for row in counts]
    for number, function in enumerate(functions):
        values = function(x, y, group, counts)
        assert values.shape == (3,)
        for value, rows in zip(values, copies, strict=True):
            if number == 7:  # a group that is drawn twice is two groups
                again = np.array([np.sum(rows[:i] == r) for i, r in enumerate(rows)])
                repeated = function(x[rows], y[rows], group[rows] * 100 + again, np.ones(len(rows)))
            else:
                repeated = function(x[rows], y[rows], group[rows], np.ones(len(rows)))
            assert value == pytest.approx(float(repeated), abs=1e-9), number


def test_moments_and_quantiles_by_hand():
    assert st.mean(X, ONES) == 4 and st.standard_deviation(X, ONES) == pytest.approx(math.sqrt(38 / 4))
    assert st.standard_deviation(X + 1e9, ONES) == pytest.approx(math.sqrt(38 / 4))  # no digits are lost
    assert [float(q) for q in st.quantiles(X, (0.25, 0.5, 0.75, 0.95), ONES)] == [1, 2, 4, 9]
    assert [float(q) for q in st.quantiles(X, (0.5,), np.array([0.0, 0.0, 3.0, 1.0]))] == [4]


def test_spearman_by_hand():
    spearman = lambda x, y: float(st.correlation(st.ranks(np.array(x)), st.ranks(np.array(y)), np.ones(len(x))))  # noqa: E731
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6*2/(4*15)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)  # mean ranks for ties
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_accuracy_counts_ties_half_and_swaps_to_the_last_bit():
    margin = np.array([1.0, 0.0, -2.0, 3.0, 0.0])
    assert st.accuracy(margin) == 3 / 5
    for n in range(1, 60):
        for right in range(n + 1):
            margin = np.array([1.0] * right + [-1.0] * (n - right))
            one, other = st.accuracy(margin), st.accuracy(-margin)
            assert one == 1 - other and other == 1 - one
            assert one == pytest.approx(right / n, abs=1e-15)


def test_calibration_error_by_hand():
    p = np.array([0.52, 0.48, 0.93, 0.94])  # confidences 0.52 and 0.52; 0.93 and 0.94
    margin = np.array([1.0, -1.0, 1.0, 1.0])  # right, wrong; right, right
    assert st.calibration_error(p, margin, ONES) == pytest.approx(0.5 * abs(0.5 - 0.52) + 0.5 * abs(1 - 0.935))
    assert st.calibration_error(np.array([0.5]), np.array([0.0]), np.ones(1)) == 0  # a tie is half right
    assert st.confidence_bin(np.array([0.5, 0.549, 0.551, 0.0, 1.0])).tolist() == [0, 0, 1, 9, 9]


def test_temperature_by_hand():
    """Margins +m in 3 of 4 pairs and -m in one: sigmoid(m / T) = 3/4, so T = m / log 3."""
    for m in (0.01, 0.5, 2.0, 30.0):
        assert st.temperature(m * np.array([1.0, 1.0, 1.0, -1.0]), ONES) == pytest.approx(m / math.log(3), rel=1e-6)
    for m in (1e-7, 1e9):  # whatever the unit of the rewards
        assert st.temperature(m * np.array([1.0, 1.0, 1.0, -1.0]), ONES) == pytest.approx(m / math.log(3), rel=1e-6)
    assert st.temperature(X, ONES) == 0  # all are right: the sharper the better
    assert st.temperature(-X, ONES) == math.inf and st.temperature(np.array([1.0, -1.0]), np.ones(2)) == math.inf
    assert math.isnan(st.temperature(np.zeros(4), ONES))


def test_share_between_by_hand():
    """Two groups of two: MSB = 2 · (2² + 2²) / 1 = 16, MSW = (0.5 + 0.5) / 2 = 0.5; (16 - 0.5) / (16 + 0.5)."""
    x, group = np.array([1.5, 2.5, 5.5, 6.5]), np.array([0, 0, 1, 1])
    assert st.share_between(x, group, ONES) == pytest.approx(15.5 / 16.5)
    noise = np.random.default_rng(0).normal(size=4000)
    assert st.share_between(noise, np.repeat(np.arange(2000), 2), np.ones(4000)) == pytest.approx(0, abs=0.05)
    assert math.isnan(st.share_between(x, np.zeros(4), ONES))  # one group
    assert math.isnan(st.share_between(x, np.arange(4), ONES))  # each item a group


def test_wilson_interval_by_hand():
    low, high = st.wilson_interval(0.5, 100)  # the textbook example: 0.404, 0.596
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    assert st.wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_resamples_draw_whole_prompts(monkeypatch):
    prompt = np.array([7, 7, 3, 7, 5])
    counts = np.concatenate(list(st.resamples(prompt)))
    assert counts.shape == (st.RESAMPLES, 5)
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 0] == counts[:, 3]).all()
    assert (counts[:, 0] + counts[:, 2] + counts[:, 4] == 3).all()  # three prompts are drawn from three
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.1)
    monkeypatch.setattr(st, "CELLS", 15)
    np.testing.assert_array_equal(np.concatenate(list(st.resamples(prompt))), counts)  # however many at once


def test_accuracy_interval_is_over_prompts():
    rng = np.random.default_rng(0)
    margin = np.where(rng.random(400) < 0.7, 1.0, -1.0)
    low, high = st.accuracy_interval(margin, np.arange(400))
    expected = st.wilson_interval(float(st.accuracy(margin)), 400)
    assert (low, high) == pytest.approx(expected, abs=0.01)  # independent pairs
    copied = st.accuracy_interval(np.repeat(margin, 4), np.repeat(np.arange(400), 4))
    assert copied == pytest.approx((low, high), abs=0.01)  # the same evidence four times is no more evidence
    assert st.accuracy_interval(np.ones(8), np.arange(8) // 2) == st.wilson_interval(1.0, 4)
    assert st.accuracy_interval(margin, np.zeros(400)) == st.wilson_interval(float(st.accuracy(margin)), 1)


def test_the_interval_covers():
    """Of 200 evaluations of 100 prompts, about 95% hold the true accuracy in their interval."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        easy = np.repeat(rng.random(100) < 0.5, 2)  # the pairs of a prompt go together
        margin = np.where(rng.random(200) < np.where(easy, 0.9, 0.5), 1.0, -1.0)
        low, high = st.accuracy_interval(margin, np.repeat(np.arange(100), 2))
        held += low <= 0.7 <= high
    assert 180 <= held <= 199


def test_the_interval_of_a_share_that_all_resamples_agree_on():
    assert st.share_interval(0.0, np.zeros(st.RESAMPLES), 50) == st.wilson_interval(0.0, 50)
    low, high = st.share_interval(0.5, np.linspace(0, 1, st.RESAMPLES), 50)
    assert (low, high) == pytest.approx((0.025, 0.975))
    assert st.percentiles(np.array([1.0] * 900 + [math.inf] * 100)) == (1.0, math.inf)


def test_nan_is_no_accuracy():
    assert math.isnan(st.accuracy(np.array([1.0, np.nan]))) and math.isnan(st.accuracy_interval(X * np.nan, X)[0])


def test_percentiles_leave_out_what_is_not_defined():
    values = np.concatenate([np.arange(900.0), np.full(100, np.nan)])
    assert st.percentiles(values) == pytest.approx((0.025 * 899, 0.975 * 899))
    assert all(map(math.isnan, st.percentiles(np.full(1000, np.nan))))
