"""Sequences of tokens: the prefix that they share, truncation, and what is left of a prompt with N answers."""

from types import SimpleNamespace

import numpy as np
import pytest
from examples import decoded

from rm.data.example import Example
from rm.data.tokenize import make_tree, shared_prefix_length, truncate_left, usable_part


def arrays(*lists):
    return [np.array(ids, np.int32) for ids in lists]


@pytest.mark.parametrize(("sequences", "length"), [
    (([1, 2, 3], [1, 2, 4]), 2), (([1, 2], [1, 2, 3]), 1), (([1], [2]), 0), (([1], [1, 2]), 0), (([5, 1], [6, 1]), 0),
    (([], []), 0), (([1, 2, 3],), 2), (([1, 2, 3], [1, 2, 4], [1, 5, 4]), 1), (([1, 2, 3], [1, 2, 4], [1]), 0),
])  # fmt: skip
def test_shared_prefix_leaves_each_sequence_a_token(sequences, length):
    assert shared_prefix_length(*arrays(*sequences)) == length
    if all(sequences):
        tree = make_tree(arrays(*sequences))
        assert [ids.tolist() for ids in tree.sequences()] == list(sequences) and len(tree.prefix) == length
        assert len(tree) == sum(map(len, sequences)) - length * (len(sequences) - 1)


@pytest.mark.parametrize(("sequences", "bos", "want"), [
    (([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]), None, [[3, 4, 5, 6], [3, 4, 7]]),  # the same two tokens from both
    (([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]), 1, [[1, 4, 5, 6], [1, 4, 7]]),  # BOS stays
    (([1, 5, 6, 7, 8, 9], [1, 4]), None, [[6, 7, 8, 9], [4]]),  # the prefix is used up; the short answer is whole
    (([1, 5, 6, 7, 8, 9], [1, 4]), 1, [[1, 7, 8, 9], [1, 4]]),
    (([2, 5, 6, 7, 8], [3, 6, 7, 8]), None, [[5, 6, 7, 8], [3, 6, 7, 8]]),  # nothing is shared
    (([1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 7]), None, [[2, 3, 4, 5], [2, 3, 6], [2, 7]]),
    (([1, 2, 3, 4, 5],), None, [[2, 3, 4, 5]]),
])  # fmt: skip
def test_truncate_left(sequences, bos, want):
    assert [ids.tolist() for ids in truncate_left(arrays(*sequences), 4, bos)] == want


def test_truncate_left_to_one_token():
    assert [ids.tolist() for ids in truncate_left(arrays([1, 2, 3], [1, 4]), 1, 1)] == [[3], [4]]


A, B, LONG, NONE = [1, 2, 3], [1, 2, 4], [1, 2, 5, 6, 7], []
CYCLE = [(0, 1), (1, 2), (2, 0)]
ALL_OF_4 = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
USABLE = {  # sequences, comparisons, kept answers, (chosen, rejected) of them, kept comparisons, dropped by reason
    "all": ([A, B, [1, 5]], CYCLE, [0, 1, 2], CYCLE, [0, 1, 2], (0, 0, 0)),
    "one is empty": ([A, NONE, B], CYCLE, [0, 2], [(1, 0)], [2], (2, 0, 0)),
    "one is too long": ([LONG, A, B], CYCLE, [1, 2], [(0, 1)], [1], (0, 0, 2)),
    "two are the same": ([A, B, A], CYCLE, [0, 1], [(0, 1), (1, 0)], [0, 1], (0, 1, 0)),
    "all are the same": ([A, A, A], CYCLE, [], [], [], (0, 3, 0)),
    "a blank one and an equal one": ([B, A, NONE, A], ALL_OF_4, [0, 1], [(0, 1), (0, 1)], [0, 2], (3, 1, 0)),
    "every reason": ([A, LONG, A, B], ALL_OF_4, [0, 3], [(0, 1), (0, 1)], [2, 5], (0, 1, 3)),
    "an answer that nothing compares": ([A, B, [1, 5], [1, 6]], [(3, 1)], [0, 1, 2, 3], [(3, 1)], [0], (0, 0, 0)),
    "twice, and both ways": ([LONG, B, A, [1, 5]], [(2, 1), (1, 2), (2, 1), (0, 3)], [1, 2, 3],
                             [(1, 0), (0, 1), (1, 0)], [0, 1, 2], (0, 0, 1)),
    "a pair of the same long ones": ([LONG, LONG], [(0, 1)], [], [], [], (0, 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", USABLE)
def test_usable_part(name):
    sequences, comparisons, answers, pairs, kept, dropped = USABLE[name]
    encoding = SimpleNamespace(max_length=4, overlength="drop")
    example = Example("tokens", None, [], comparisons=comparisons)
    part = usable_part(example, arrays(*sequences), encoding, None)
    assert (part.answers, part.comparisons, part.kept, part.noted.get("truncated")) == (answers, pairs, kept, None)
    assert part.dropped == dict(zip(("empty", "identical", "over_length"), dropped, strict=True))
    assert [ids.tolist() for ids in part.sequences] == [sequences[n] for n in answers]


BEGIN = [[1, 2, 3, 4], [1, 2, 3, 5], [9]]  # [9] is blank: it does not shorten the prefix
CUT = [[2, 3, 4], [2, 3, 5]]


@pytest.mark.parametrize(("last", "comparisons", "kept", "dropped", "want"), [
    ([1, 2, 6], [(0, 1), (1, 2), (3, 0)], [0, 2], (1, 0, 0), [*CUT, [2, 6]]),
    ([2, 2, 3, 4], [(0, 1), (0, 3), (3, 1)], [0, 2], (0, 1, 0), CUT),  # the first and the last are one answer
])  # fmt: skip
def test_usable_part_is_truncated(last, comparisons, kept, dropped, want):
    encoding = SimpleNamespace(max_length=3, overlength="truncate_left")
    example = Example("text", None, ["a", "b", " ", "c"], comparisons=comparisons)
    part = usable_part(example, arrays(*BEGIN, last), encoding, None)
    assert [ids.tolist() for ids in part.sequences] == want and part.kept == kept
    assert part.noted == {"ends_with_user": 0, "truncated" if len(want) == 3 else "truncated_answer": 1}
    assert part.dropped == dict(zip(("empty", "identical", "over_length"), dropped, strict=True))
    assert part.comparisons == {3: [(0, 1), (2, 0)], 2: [(0, 1), (0, 1)]}[len(want)]


@pytest.mark.parametrize(("limit", "bos", "count"), [
    (3, None, "truncated"), (2, None, "truncated"), (1, None, "truncated_answer"), (3, 1, "truncated"),
    (2, 1, "truncated_answer"),
])  # fmt: skip
def test_truncation_of_the_prompt_or_of_an_answer(limit, bos, count):
    encoding = SimpleNamespace(max_length=limit, overlength="truncate_left")
    example = Example("tokens", None, [], comparisons=[(0, 1)])
    part = usable_part(example, arrays([1, 2, 3, 4], [1, 2, 5, 6]), encoding, bos)
    assert part.noted == {"ends_with_user": 0, count: 1}


def test_overlength_drops_or_truncates(data_of, tokenizer):
    rows = [
        {"chosen": "a b c d", "rejected": "a b c e"},
        {"chosen": "a b c d e f g", "rejected": "a c d e f g"},  # the last four tokens are the same
        {"chosen": "a b", "rejected": "a c"},
    ]
    dropped = data_of(rows, max_length=4)
    assert (dropped.audit["over_length"], dropped.dataset["row"][:]) == (2, [[2]])
    cut = data_of(rows, max_length=4, overlength="truncate_left")
    assert decoded(cut, tokenizer) == [("b c d <eos>", "b c e <eos>"), ("a b <eos>", "a c <eos>")]
    assert cut.comparisons["prefix_length"].tolist() == [2, 1]
    assert (cut.audit["truncated"], cut.audit["identical"], cut.audit["over_length"]) == (1, 1, 0)
    both = data_of(rows[:1] + [{"chosen": "a b c", "rejected": "a d e f g"}], max_length=4, overlength="truncate_left")
    assert (both.audit["truncated"], both.audit["truncated_answer"]) == (1, 1)
    assert data_of(rows, max_length=None).audit["max_tokens"] == 8
