"""Two models on the same pairs: differences by hand, and intervals that are paired."""

import numpy as np
import pytest
from test_metrics import table

from rm.evaluate.compare import compare_tables, same_pairs
from rm.evaluate.metrics import evaluation_metrics


def rows(margins, **columns):
    return table([[m, 0.0] for m in margins], row=np.arange(len(margins)), **columns)


def test_differences_by_hand():
    both = [1, 2, -1, 0, 3, 0], [1, -1, -1, 2, -2, -1]
    values, _ = compare_tables(*map(rows, both))
    assert values["compare/pairs"] == 6
    found = [values[f"compare/{name}"] for name in ("accuracy", "other_accuracy", "accuracy_difference")]
    assert found == pytest.approx([4 / 6, 2 / 6, 2 / 6])
    assert values["compare/agreement"] == 2 / 6  # the first pair and the third
    assert values["compare/only_this_right"] == 2 / 6 and values["compare/only_other_right"] == 1 / 6  # no ties
    loss = [evaluation_metrics(rows(margins))["eval/loss"] for margins in both]
    assert values["compare/loss_difference"] == pytest.approx(loss[0] - loss[1])


def test_pairs_that_one_of_them_lacks_are_left_out():
    ours, theirs = rows([1, 1, -1, 1]), rows([-1, -1, -1, -1, 5])[1:]  # the other has no row 0, but a row 4
    a, b = same_pairs(ours, theirs)
    assert a["row"].tolist() == b["row"].tolist() == [1, 2, 3] and len(a.columns) == len(ours.columns)
    values, _ = compare_tables(ours, theirs)
    assert values["compare/pairs"] == 3 and values["compare/accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no pair in common"):
        compare_tables(ours, theirs.assign(set="another"))


def test_the_interval_is_of_paired_differences():
    """Two models that agree but for a few pairs differ with more certainty than their own intervals tell."""
    rng = np.random.default_rng(0)
    ours = np.where(rng.random(400) < 0.7, 1.0, -1.0)
    theirs = ours.copy()
    theirs[np.flatnonzero(ours > 0)[:12]] = -1.0
    values, intervals = compare_tables(rows(ours), rows(theirs))
    low, high = intervals["compare/accuracy_difference"]
    assert values["compare/accuracy_difference"] == pytest.approx(12 / 400) and 0.01 < low < 0.03 < high < 0.05
    own = intervals["compare/accuracy"]
    assert own[1] - own[0] > 2 * (high - low)
    swapped, other = compare_tables(rows(theirs), rows(ours))
    assert other["compare/accuracy_difference"] == pytest.approx((-high, -low))
    assert compare_tables(rows(ours, prompt=1), rows(theirs, prompt=1))[1] == {}
