"""Accuracy in slices of an evaluation by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from tables import by_margins

from rm.evaluate.statistics import wilson_interval
from rm.evaluate.table import (
    by_data_margin,
    by_length_difference,
    by_margin,
    by_set,
    by_subset,
    reliability,
    slices,
)

MARGINS = [3.0, 2.0, -2.0, 0.5, -0.1, 0.0]
PAIRS = by_margins(MARGINS)


def bins(frame):
    return frame[["bin", "comparisons", "accuracy"]].to_records(index=False).tolist()


def test_by_margin_of_the_model():
    frame = by_margin(PAIRS, bins=2)  # |0.0|, |0.1|, |0.5| and |2|, |2|, |3|
    assert bins(frame) == [("0 to 0.5", 3, 0.5), ("2 to 3", 3, pytest.approx(2 / 3))]
    assert frame[["low", "high"]].to_numpy().tolist() == [[0.0, 0.5], [2.0, 3.0]]
    assert (frame["accuracy_low"] < frame["accuracy"]).all() and (frame["accuracy"] < frame["accuracy_high"]).all()


def test_by_length_difference_and_margin_of_the_data():
    pairs = PAIRS.assign(length_chosen=[5, 5, 5, 8, 8, 9], length_rejected=[7, 7, 6, 3, 3, 3])
    assert bins(by_length_difference(pairs, bins=2)) == [("-2 to -1", 3, pytest.approx(2 / 3)), ("+5 to +6", 3, 0.5)]
    assert not len(by_data_margin(pairs))
    given = pairs.assign(margin=[0.25, 1, 1, 1, 0.25, 0.25])
    assert bins(by_data_margin(given, bins=2)) == [("0.25 to 0.25", 3, 0.5), ("1 to 1", 3, pytest.approx(2 / 3))]


def test_equal_values_are_in_one_bin():
    assert bins(by_length_difference(PAIRS)) == [("+0 to +0", 6, pytest.approx(3.5 / 6))]
    assert bins(by_margin(PAIRS[:1])) == [("3 to 3", 1, 1.0)]
    many = by_margins([0.0] * 17 + [1.0, 2.0, 3.0])
    assert bins(by_margin(many)) == [("0 to 0", 17, 0.5), ("1 to 3", 3, 1.0)]
    two = pd.concat([many.assign(margin=[0.0] * 10 + [1.0] * 10), many.assign(set="without")], ignore_index=True)
    assert [row[:2] for row in bins(by_data_margin(two))] == [("0 to 0", 10), ("1 to 1", 10)]


def test_by_subset_and_set():
    pairs = PAIRS.assign(subset=["b", "b", "a", "a", "a", None])
    assert bins(by_subset(pairs)) == [("a", 3, pytest.approx(1 / 3)), ("b", 2, 1.0)]
    ends = by_subset(pairs)[["accuracy_low", "accuracy_high"]].to_numpy()[1]
    assert ends.tolist() == list(wilson_interval(1.0, 2))  # all are right
    several = pairs.assign(set=["x", "y", "x", "y", "y", "y"])
    assert [row[:2] for row in bins(by_subset(several))] == [("x/a", 1), ("x/b", 1), ("y/a", 2), ("y/b", 1)]
    assert bins(by_set(several)) == [("x", 2, 0.5), ("y", 4, 0.625)]
    assert not len(by_subset(PAIRS))


def test_reliability():
    frame = reliability(pd.concat([PAIRS, by_margins([np.inf])], ignore_index=True))
    p = 1 / (1 + np.exp(-np.abs(MARGINS)))
    assert frame["bin"].tolist() == ["0.50 to 0.55", "0.60 to 0.65", "0.85 to 0.90", "0.95 to 1.00"]
    assert frame["comparisons"].tolist() == [2, 1, 2, 1] and frame["accuracy"].tolist() == [0.25, 1.0, 0.5, 1.0]
    assert frame["confidence"].tolist() == pytest.approx([(p[4] + p[5]) / 2, p[3], p[1], p[0]])
    assert frame["low"].tolist() == pytest.approx([0.5, 0.6, 0.85, 0.95])


def test_all_of_them_as_json():
    found = json.loads(json.dumps(slices(PAIRS)))
    assert list(found) == ["by_set", "by_margin", "by_length_difference", "reliability"]
    assert set(found["by_margin"][0]) == {
        "bin",
        "low",
        "high",
        "comparisons",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
    }
