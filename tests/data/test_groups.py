"""Grouping by prompt and splitting of large groups, on rows of the token cache."""

import pytest

from rm.data.audit import DROPPED, NOTED
from rm.data.cache import merge_rows, partition, same_prompt, split_row
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS


def row(number: int, prefix: list[int], answers: list[list[int]], pairs: list[tuple[int, int]], **columns) -> dict:
    """A row of the token cache; the hash of a sequence is its tokens, so that tests can read it."""
    found = {"id": f"id-{number}", "subset": None, "prompt": 7, "prefix_ids": prefix}
    found |= {"answer_ids": answers, "answer_hash": [tuple(prefix + answer) for answer in answers]}
    found |= {"answer": list(range(len(answers))), "answer_row": [number] * len(answers), "row": [number] * len(pairs)}
    found |= {"chosen": [chosen for chosen, _ in pairs], "rejected": [rejected for _, rejected in pairs]}
    found |= {name: [column.default] * len(pairs) for name, column in COMPARISON_COLUMNS.items()}
    found |= {name: [column.default] * len(answers) for name, column in ANSWER_COLUMNS.items()}
    return found | dict.fromkeys((*NOTED, *DROPPED), 0) | columns


def tokens(merged: dict) -> list[list[int]]:
    return [[*merged["prefix_ids"], *answer] for answer in merged["answer_ids"]]


def test_rows_of_a_prompt_in_the_order_of_the_data():
    assert same_prompt([5, 9, 5, 1, 9]) == [[0, 2], [1, 4], [3]]


def test_an_answer_in_several_rows_is_one_answer():
    """(a, b), (c, a) and the contradiction (b, a); the common prefix of three is shorter than that of the first two."""
    a, b, c = [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]
    rows = [row(0, [1, 2, 3], [[4], [5]], [(0, 1)], margin=[0.5], score=[4.0, 3.0])]
    rows += [row(1, [1, 2], [[6], [3, 4]], [(0, 1)], margin=[2.0], score=[5.0, 9.0])]
    rows += [row(2, [1, 2, 3], [[5], [4]], [(0, 1)], truncated=1, empty=2)]
    merged = merge_rows(rows)
    assert tokens(merged) == [a, b, c] and merged["prefix_length"] == 2 and merged["answer_lengths"] == [2, 2, 1]
    assert list(zip(merged["chosen"], merged["rejected"], strict=True)) == [(0, 1), (2, 0), (1, 0)]
    assert merged["margin"] == [0.5, 2.0, 0.0] and merged["score"] == [4.0, 3.0, 5.0]  # of the first row with it
    assert merged["answer_row"] == [0, 0, 1] and merged["answer"] == [0, 1, 0] and merged["row"] == [0, 1, 2]
    assert merged["id"] == "id-0" and merged["truncated"] == 1 and merged["empty"] == 2


def test_rows_without_comparisons_only_add_to_the_counts():
    merged = merge_rows([row(0, [], [], [], over_length=1), row(1, [1], [[2], [3]], [(0, 1)])])
    assert merged["over_length"] == 1 and tokens(merged) == [[1, 2], [1, 3]] and merged["chosen"] == [0]
    nothing = merge_rows([row(0, [], [], [], over_length=1)])
    assert nothing["answer_lengths"] == [] and nothing["prefix_length"] == 0


@pytest.mark.parametrize(("num_answers", "pairs", "max_answers", "expected"), [
    (4, [(0, 1), (2, 3)], 4, [[0, 1, 2, 3]]),  # the prompt is shared by unrelated comparisons
    (4, [(0, 2), (1, 3)], 3, [[0, 2], [1, 3]]),
    (5, [(0, 1), (1, 2), (3, 4)], 3, [[0, 1, 2], [3, 4]]),
    (6, [(0, 1), (0, 1), (1, 2), (3, 4)], 2, [[0, 1], [2, 5], [3, 4]]),  # two comparisons of (0, 1) outweigh (1, 2)
    (3, [(0, 1), (0, 2), (1, 2)], 2, [[0, 1], [2]]),
])  # fmt: skip
def test_partition_keeps_comparisons_together(num_answers, pairs, max_answers, expected):
    assert partition(num_answers, pairs, max_answers) == expected


def test_a_large_prompt_is_split_and_lost_comparisons_are_counted():
    pairs = [(0, 1), (2, 3), (3, 0), (0, 1)]
    columns = {"weight": [1.0, 2.0, 3.0, 4.0], "score": [4.0, 1.0, 3.0, 2.0], "identical": 1}
    first, second = split_row(row(3, [1], [[2], [3], [4], [5, 5]], pairs, **columns), 2)
    assert tokens(first) == [[1, 2], [1, 3]] and tokens(second) == [[1, 4], [1, 5, 5]]
    assert (first["chosen"], first["rejected"], first["weight"]) == ([0, 0], [1, 1], [1.0, 4.0])
    assert (second["chosen"], second["rejected"], second["weight"]) == ([0], [1], [2.0])
    assert (first["score"], second["score"], second["answer"]) == ([4.0, 1.0], [3.0, 2.0], [2, 3])
    assert [part["split"] for part in (first, second)] == [1, 0]
    assert [part["identical"] for part in (first, second)] == [1, 0]
    assert [part["id"] for part in (first, second)] == ["id-3.1", "id-3.2"]


def test_a_prompt_without_a_usable_answer_keeps_its_counts():
    (part,) = split_row(row(3, [], [], [], over_length=6), 2)
    assert (part["over_length"], part["id"], part["answer_ids"], part["chosen"]) == (6, "id-3", [], [])
