"""The registered columns: where they are read, their ranges, and that one line in the registry adds one."""

import math

import numpy as np
import pytest
from examples import GOOD, HH, options, write

from rm.collate import collate
from rm.config.errors import InputError
from rm.data.columns import COMPARISON_COLUMNS, Column
from rm.data.mixture import load_data
from rm.data.plan import Layout, MicroBatch

ROW = GOOD | {"score_chosen": 3, "score_rejected": 1.5, "margin": 0.25, "true_margin": 0.5, "strength": 2.0}
ROW |= {"id": 7, "subset": "s", "weight": 5.0, "p_chosen": 0.75, "w": 4, "p": 0.875, "m": -1.5}


def values(data, i: int = 0) -> dict[str, list[float]]:
    """Every column of prompt `i` that is not NaN."""
    labels = {name: array.tolist() for name, array in data.labels([i])[1].items()}
    return {name: numbers for name, numbers in labels.items() if not any(map(math.isnan, numbers))}


PLAIN = {"chosen": [0], "rejected": [1], "margin": [0.0], "weight": [1.0], "p_chosen": [1.0]}


def test_without_columns_there_are_defaults(data_of):
    data = data_of([GOOD])
    assert values(data) == PLAIN and data.dataset["subset"][:] == [None]
    types = {name: str(kind) for name, kind in data.dataset.features.items()}
    assert types.pop("id") == "Value('string')" and types["answer_ids"] == "List(List(Value('int32')))"
    assert {types[name] for name in ("margin", "weight", "p_chosen", "true_margin", "score")} == {
        "List(Value('float32'))"
    }


def test_by_name_and_by_option(data_of):
    """`weight` and `p_chosen` are in the data under their own names, and have no effect."""
    data = data_of([ROW])
    by_name = PLAIN | {"margin": [0.25], "true_margin": [0.5], "score": [3.0, 1.5]}
    assert values(data) == by_name
    assert (data.ids([0]), data.dataset["subset"][:]) == (["7"], ["s"])
    data = data_of([ROW], margin_column="m", weight_column="w", probability_column="p")
    assert values(data) == by_name | {"margin": [-1.5], "weight": [4.0], "p_chosen": [0.875]}
    assert data.comparisons.iloc[0].to_dict() == {
        "index": 0, "row": 0, "chosen": 0, "rejected": 1, "margin": -1.5, "weight": 4.0, "p_chosen": 0.875,
        "true_margin": 0.5, "length_chosen": 2, "length_rejected": 2, "prefix_length": 0, "share": 1.0,
    }  # fmt: skip


def test_a_probability_below_a_half_swaps_the_comparison(data_of):
    row = ROW | {"p": 0.25}
    swapped = {"chosen": [1], "rejected": [0], "p_chosen": [0.75], "margin": [-0.25], "true_margin": [-0.5]}
    data = data_of([row], weight_column="w", probability_column="p")
    assert values(data) == PLAIN | swapped | {"weight": [4.0], "score": [3.0, 1.5]}
    assert data.texts(0)["answers"] == ["a", "b"]
    del row["margin"]
    assert values(data_of([row], margin_from_scores=True, probability_column="p"))["margin"] == [-1.5]
    assert values(data_of([ROW | {"p": 0.5}], probability_column="p"))["chosen"] == [0]  # a tie


def test_margin_from_scores(data_of):
    row = GOOD | {"score_chosen": 3, "score_rejected": 1.5}
    assert values(data_of([row]))["margin"] == [0.0]
    assert values(data_of([row], margin_from_scores=True))["margin"] == [1.5]
    null = row | {"score_rejected": None}
    assert "score" not in values(data_of([row, null]), 1)
    with pytest.raises(InputError, match=r"row 2: 'score_rejected' is missing \(null\), expected a number$"):
        data_of([row, null], margin_from_scores=True)
    for wrong in (GOOD, row | {"margin": 1}):
        with pytest.raises(InputError, match="rows.jsonl: margin_from_scores needs the columns score_chosen and score"):
            data_of([wrong], margin_from_scores=True)


@pytest.mark.parametrize("option", ["margin_column", "weight_column", "probability_column"])
def test_an_option_names_a_column_that_does_not_exist(data_of, option):
    problem = f"rows.jsonl: {option}=n: there is no such column; there are chosen, margin, rejected$"
    with pytest.raises(InputError, match=problem):
        data_of([GOOD | {"margin": 1}], **{option: "n"})


FINITE, AT_LEAST = "expected a finite number from -inf to inf", "expected a finite number from 0 to"
WRONG = [
    ("margin", 1, None, "is missing (null), expected a number"),
    ("margin", 1, "high", "is text, expected a number"),
    ("margin", 1, True, "is true or false, expected a number"),
    ("margin", 1.5, math.nan, f"is nan, {FINITE}"),
    ("margin", 1.5, -math.inf, f"is -inf, {FINITE}"),
    ("margin", 1, 1e39, f"is 1e+39, {FINITE}"),
    ("true_margin", 1, None, "is missing (null), expected a number"),
    ("weight", 0, -0.5, f"is -0.5, {AT_LEAST} inf"),
    ("weight", 1.5, math.inf, f"is inf, {AT_LEAST} inf"),
    ("probability", 1, 1.5, f"is 1.5, {AT_LEAST} 1"),
    ("probability", 0, -0.5, f"is -0.5, {AT_LEAST} 1"),
    ("probability", 0.5, math.nan, f"is nan, {AT_LEAST} 1"),
    ("score_chosen", 1, math.nan, f"is nan, {FINITE}"),
    ("score_chosen", 1, "high", "is text, expected a number"),
]


@pytest.mark.parametrize(("column", "good", "wrong", "message"), WRONG)
def test_wrong_value(data_of, column, good, wrong, message):
    changes = {f"{column}_column": column} if column in ("weight", "probability") else {}
    with pytest.raises(InputError) as error:
        data_of([GOOD | {column: value, "score_rejected": 0} for value in (good, good, wrong)], **changes)
    assert str(error.value).endswith(f"rows.jsonl, row 3: {column!r} {message}")


def test_one_line_in_the_registry_adds_a_column(data_of, tokenizer, monkeypatch, tmp_path):
    """Data that were cached before it are tokenized again; the batch, the table and the fingerprint have it."""
    rows = [ROW, ROW | {"strength": 0.5}]
    before, _ = data_of(rows), data_of([GOOD])
    monkeypatch.setitem(COMPARISON_COLUMNS, "strength", Column(1.0, low=0.0))
    assert data_of([GOOD]).comparisons["strength"].tolist() == [1.0]
    data = data_of(rows)
    assert values(data, 1)["strength"] == [0.5] and data.comparisons["strength"].tolist() == [2.0, 0.5]
    batch = collate(data, MicroBatch([[1, 0]]), Layout("shared_prefix", 0))
    assert batch.strength_C.tolist() == [0.5, 2.0] and batch.strength_C.dtype == batch.margin_C.dtype
    with pytest.raises(AttributeError, match="stranger_C"):
        _ = batch.stranger_C
    prints = [before.fingerprint, data.fingerprint, data_of([ROW, ROW]).fingerprint]
    assert len(set(prints)) == 3
    with pytest.raises(InputError, match="row 1: 'strength' is -1.0, expected a finite number from 0 to inf"):
        data_of([ROW | {"strength": -1}])
    mixed = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("one", [ROW]), ("two", [HH]))]
    train, _ = load_data(tokenizer, options(dataset_name=mixed, eval_dataset_name=mixed))
    assert train.comparisons["strength"].tolist() == [2.0, 1.0]
    assert train.comparisons["margin"].tolist() == [0.25, 0.0]
    assert np.array_equal(train.comparisons["true_margin"], [0.5, math.nan], equal_nan=True)


@pytest.mark.parametrize("column", ["margin", "true_margin", "w", "p", "score_chosen"])
def test_the_fingerprint_covers_every_column(data_of, column):
    changes = {"weight_column": "w", "probability_column": "p"}
    assert data_of([ROW], **changes).fingerprint != data_of([ROW | {column: 0.625}], **changes).fingerprint
