"""Two models on the same comparisons: differences by hand, and intervals that are paired."""

import numpy as np
import pytest
from tables import CONFIG, by_margins

from rm.evaluate.table import compare_tables, evaluation_metrics


def test_differences_by_hand():
    both = by_margins([1, 2, -1, 0, 3, 0]), by_margins([1, -1, -1, 2, -2, -1])
    values, _ = compare_tables(*both)
    assert values["compare/comparisons"] == 6
    found = [values[f"compare/{name}"] for name in ("accuracy", "other_accuracy", "accuracy_difference")]
    assert found == pytest.approx([4 / 6, 2 / 6, 2 / 6])
    loss = [evaluation_metrics(table, CONFIG)["eval/loss"] for table in both]
    assert values["compare/loss_difference"] == pytest.approx(loss[0] - loss[1])


def test_comparisons_that_one_of_them_lacks_are_left_out():
    ours, theirs = by_margins([1, 1, -1, 1]), by_margins([-1, -1, -1, -1, 5])[1:]  # the other has no row 0, but a row 4
    values, _ = compare_tables(ours, theirs)
    assert values["compare/comparisons"] == 3 and values["compare/accuracy"] == pytest.approx(2 / 3)
    group = by_margins([1, 1, -1], row=0)  # three comparisons of one prompt
    values, _ = compare_tables(group, group)
    assert values["compare/comparisons"] == 3 and values["compare/loss_difference"] == 0


def test_the_interval_is_of_paired_differences():
    """Two models that agree on all but a few pairs differ with more certainty than their own intervals show."""
    ours = np.where(np.random.default_rng(0).random(400) < 0.7, 1.0, -1.0)
    theirs = ours.copy()
    theirs[np.flatnonzero(ours > 0)[:12]] = -1.0
    values, intervals = compare_tables(by_margins(ours), by_margins(theirs))
    low, high = intervals["compare/accuracy_difference"]
    assert values["compare/accuracy_difference"] == pytest.approx(12 / 400) and 0.01 < low < 0.03 < high < 0.05
    own = intervals["compare/accuracy"]
    assert own[1] - own[0] > 2 * (high - low)
    _, swapped = compare_tables(by_margins(theirs), by_margins(ours))
    assert swapped["compare/accuracy_difference"] == pytest.approx((-high, -low))
