"""Prompts with N answers: scores, ranks, explicit comparisons, token ids; grouping of pairs; wrong rows, literally."""

import math
import re

import numpy as np
import pytest
from examples import decoded, options, read, say, write

from rm.collate import collate
from rm.config.errors import InputError
from rm.data.mixture import load_data
from rm.data.plan import Layout, MicroBatch

THREE = {"prompt": "a ", "responses": ["b", "c", "d"]}
BCD = ("a b <eos>", "a c <eos>", "a d <eos>")


def compared(data, i: int = 0) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in data.comparisons.query(f"index == {i}")[["chosen", "rejected"]].to_numpy().tolist()]


def test_scores_compare_all_answers_with_different_scores(data_of, tokenizer):
    data = data_of([THREE | {"scores": [1, 3.5, 2]}])
    assert data.sets["rows"].encoding.format == "text_group_scores" and decoded(data, tokenizer) == [BCD]
    assert compared(data) == [(1, 0), (2, 0), (1, 2)] and data.answers["score"].tolist() == [1.0, 3.5, 2.0]
    assert data.comparisons["share"].tolist() == [1 / 3] * 3 and data.audit["kept"] == 3 and data.audit["prompts"] == 1
    assert data.texts(0) == {"prompt": "a ", "answers": ["b", "c", "d"]}
    (tree,) = data.trees([0])
    assert (len(tree.prefix), [len(answer) for answer in tree.answers]) == (1, [2, 2, 2])  # the prompt is there once
    assert (data.audit["tree_tokens"], data.audit["pair_tokens"]) == (7, 15)


def test_ranks_are_scores_with_the_opposite_sign(data_of):
    data = data_of([THREE | {"ranks": [2, 1, 3]}])
    assert data.sets["rows"].encoding.format == "text_group_ranks"
    assert compared(data) == [(1, 0), (0, 2), (1, 2)] and data.answers["score"].tolist() == [-2.0, -1.0, -3.0]


def test_equal_scores(data_of):
    row = THREE | {"scores": [2, 2, 1]}
    data = data_of([row])
    assert compared(data) == [(0, 2), (1, 2)] and (data.audit["tied"], data.audit["total"]) == (1, 3)
    data = data_of([row], equal_scores="tie")
    assert compared(data) == [(0, 1), (0, 2), (1, 2)]
    assert data.comparisons["p_chosen"].tolist() == [0.5, 1.0, 1.0] and data.audit["tied"] == 0


def test_margin_from_scores(data_of):
    data = data_of([THREE | {"scores": [1, 3.5, 2]}], margin_from_scores=True)
    assert data.comparisons["margin"].tolist() == [2.5, 1.0, 1.5]


def test_explicit_comparisons_with_columns(data_of):
    """Scores beside them are only kept; p_chosen below 0.5 swaps; a column of the row counts for all comparisons."""
    pairs = [{"chosen": 2, "rejected": 0}, {"chosen": 1, "rejected": 2}]
    pairs += [{"chosen": 0, "rejected": 1, "margin": 0.5, "p_chosen": 0.25}]
    row = THREE | {"scores": [9, 8, 7], "comparisons": pairs}
    data = data_of([row | {"w": 3}], weight_column="w")
    assert data.sets["rows"].encoding.format == "text_group_comparisons"
    assert compared(data) == [(2, 0), (1, 2), (1, 0)] and data.answers["score"].tolist() == [9.0, 8.0, 7.0]
    assert data.comparisons["margin"].tolist() == [0.0, 0.0, -0.5]
    assert (
        data.comparisons["p_chosen"].tolist() == [1.0, 1.0, 0.75] and data.comparisons["weight"].tolist() == [3.0] * 3
    )
    assert compared(data_of([THREE | {"comparisons": [[2, 0], [1, 2]]}])) == [(2, 0), (1, 2)]


def test_messages_and_token_ids(data_of, tokenizer):
    talk = {"prompt": say("hi"), "responses": [say("a", first="assistant"), say("b", first="assistant"), "c"]}
    talk["responses"] = talk["responses"][:2]
    data = data_of([talk | {"scores": [0, 1]}])
    assert data.sets["rows"].encoding.format == "conversation_group_scores" and compared(data) == [(1, 0)]
    assert decoded(data, tokenizer) == [tuple(f"<|user|> hi <|end|> <|assistant|> {end} <|end|>" for end in "ab")]
    ids = {"input_ids": [[8, 9, 2], [8, 10], [8, 0, 11]], "attention_mask": [[1, 1, 1], [1, 1], [1, 0, 1]]}
    data = data_of([ids | {"ranks": [1, 2, 3]}])
    assert data.sets["rows"].encoding.format == "tokenized"
    assert decoded(data, tokenizer) == [("a b <eos>", "a c", "a d")] and compared(data) == [(0, 1), (0, 2), (1, 2)]


def test_unusable_answers_are_dropped_with_their_comparisons(data_of, tokenizer):
    """Blank, too long, repeated with the same and with another score; a prompt without comparisons is not used."""
    rows = [
        {"prompt": "a ", "responses": ["b", " ", "c", "b", "d x y z e f g"], "scores": [5, 4, 3, 5, 1]},
        {"prompt": "a ", "responses": ["b", "b", "c"], "scores": [3, 1, 2]},
        {"prompt": "x ", "responses": ["b", "c"], "scores": [1, 1]},
        {"prompt": "y ", "responses": ["b"], "scores": [1]},
    ]
    data = data_of(rows, max_length=6)
    assert decoded(data, tokenizer) == [("a b <eos>", "a c <eos>")] * 2
    assert compared(data, 0) == [(0, 1), (0, 1)]  # b and its repetition: both comparisons with c
    assert compared(data, 1) == [(0, 1), (1, 0)] and data.audit["contradictory"] == 4
    assert {name: data.audit[name] for name in ("empty", "over_length", "identical", "tied")} == {
        "empty": 4, "over_length": 3, "identical": 1, "tied": 2,
    }  # fmt: skip
    assert (data.audit["prompts"], data.audit["prompts_dropped"], data.audit["kept"]) == (2, 2, 4)


def test_a_group_of_two_is_a_pair(data_of):
    """Every tensor of the batch has the same bits."""
    pair = data_of([{"prompt": "a ", "chosen": "b c", "rejected": "d", "score_chosen": 2, "score_rejected": 1}])
    group = data_of([{"prompt": "a ", "responses": ["b c", "d"], "scores": [2, 1]}])
    assert pair.fingerprint == group.fingerprint
    for layout in (Layout("shared_prefix", 0, by_tree=True), Layout("concatenated", 0)):
        one, other = (collate(data, MicroBatch([[0]]), layout) for data in (pair, group))
        assert str(vars(one)) == str(vars(other))


@pytest.mark.parametrize(("row", "message"), [
    ({"scores": [1, 2]}, "'scores' has 2 numbers for 3 answers; give one for each answer"),
    ({"scores": [1, None, 2]}, "'scores[1]' is missing (null), expected a number"),
    ({"scores": None, "ranks": None}, "'scores' is missing (null), expected a list of a number for each answer"),
    ({"scores": 5}, "'scores' is a number, expected a list of a number for each answer"),
    ({"responses": "abc", "scores": [1]}, "'responses' is text, expected a list of answers"),
    ({"responses": ["a", None, "c"], "scores": [1, 2, 3]},
     "'responses[1]' is missing (null), expected text or messages"),
    ({"comparisons": [[0, 3]]}, "comparisons[0] has chosen 0, rejected 3; give two different answers, from 0 to 2"),
    ({"comparisons": [[0, 1], [1, 1]]}, "comparisons[1] has chosen 1, rejected 1; give two different answers"),
    ({"comparisons": [{"chosen": 1}]}, "comparisons[0] has chosen 1, rejected None; give two different answers"),
    ({"comparisons": [{"chosen": 0, "rejected": 1, "weight": -1}]},
     "'comparisons[0][weight]' is -1.0, expected a finite number from 0 to inf"),
    ({"input_ids": [[1], [2]], "attention_mask": [[1]], "scores": [1, 2]},
     "'attention_mask' needs a list for each of the 2 answers in 'input_ids'"),
])  # fmt: skip
def test_wrong_rows(data_of, row, message):
    first = (THREE if "input_ids" not in row else {}) | row
    with pytest.raises(InputError, match=re.escape(f"rows.jsonl, row 1: {message}")):
        data_of([first])


# ---------------------------------------------------------------- grouping of pairs

PAIRS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c", "id": "first"},
    {"prompt": "x ", "chosen": "b", "rejected": "c"},
    {"prompt": "a ", "chosen": "d", "rejected": "b", "margin": 2},
    {"prompt": "a ", "chosen": "c", "rejected": "b"},  # contradicts the first one
]


def test_pairs_that_share_a_prompt_are_one_group(data_of, tokenizer):
    rows = [{"id": str(i), "margin": 0} | row for i, row in enumerate(PAIRS)]
    data = data_of(rows, group_by_prompt=True)
    assert decoded(data, tokenizer) == [BCD, BCD[:2] and ("x b <eos>", "x c <eos>")]
    assert compared(data, 0) == [(0, 1), (2, 0), (1, 0)] and compared(data, 1) == [(0, 1)]
    assert data.comparisons["margin"].tolist() == [0.0, 2.0, 0.0, 0.0] and data.ids([0, 1]) == ["first", "1"]
    assert data.comparisons["row"].tolist() == [0, 2, 3, 1] and data.answers["row"].tolist() == [0, 0, 2, 1, 1]
    assert data.texts(0) == {"prompt": "a ", "answers": ["b", "c", "d"]}
    assert (data.audit["contradictory"], data.audit["kept"], data.audit["prompts"]) == (2, 4, 2)
    assert len(data_of(rows)) == 4  # off by default


def test_a_prompt_is_more_than_its_text(data_of):
    """The tools of a conversation are a part of the rendered prompt."""
    talk = {"prompt": say("hi"), "chosen": say("a", first="assistant"), "rejected": say("b", first="assistant")}
    tools = [{"type": "function", "function": {"name": "f"}}]
    data = data_of([talk | {"tools": []}, talk | {"tools": tools}, talk | {"tools": []}], group_by_prompt=True)
    assert data.answers["index"].tolist() == [0, 0, 1, 1]


def test_large_groups_are_split(data_of):
    """Five answers in parts of at most three; 3 + 1 of the ten comparisons are kept."""
    row = {"prompt": "a ", "responses": list("bcdef"), "scores": [5, 4, 3, 2, 1]}
    data = data_of([row], max_answers=3)
    assert data.answers["score"].tolist() == [5, 4, 3, 2, 1] and data.answers["index"].tolist() == [0, 0, 0, 1, 1]
    assert (data.audit["kept"], data.audit["split"], data.audit["total"]) == (4, 6, 10)


def test_the_first_prompts_and_the_held_out_prompts(tokenizer, own_cache, tmp_path):
    """Ten prompts with four pairs each: prompts are held out whole, and max_train_samples counts prompts."""
    rows = [{"prompt": f"{'a b c d e f g x y z'.split()[i % 10]} ", "chosen": "yes", "rejected": answer}
            for i, answer in zip(range(40), "hi no b c".split() * 10, strict=True)]  # fmt: skip
    name = write(tmp_path / "rows.jsonl", rows)
    for extra, sizes in (({}, (28, 12)), ({"group_by_prompt": True, "max_train_samples": 5}, (5, 3))):
        train, test = load_data(tokenizer, options(dataset_name=name, eval_fraction=0.3, **extra))
        assert (len(train), len(test)) == sizes
        assert not set(train.dataset["prompt"][:]) & set(test.dataset["prompt"][:])
        assert test.audit["prompt_in_train"] == 0
    train, test = load_data(tokenizer, options(dataset_name=name, eval_dataset_name=name, group_by_prompt=True))
    assert (len(train), test.audit["prompt_in_train"], test.audit["in_train"]) == (10, 10, 40)


def test_token_ids_of_pairs_cannot_be_grouped(data_of):
    with pytest.raises(InputError, match="group_by_prompt: token ids do not tell where the prompt ends; give groups"):
        data_of([{"chosen_ids": [8, 9], "rejected_ids": [8, 10]}], group_by_prompt=True)


@pytest.mark.parametrize("labels", ["plackett_luce", "bradley_terry"])
def test_toy_groups(tokenizer, own_cache, labels):
    """Four different answers each; labels follow the true rewards within 4 standard errors."""
    from rm.data.toy import toy_dataset, true_reward

    rows = toy_dataset("train", 1500, 3, labels)
    assert toy_dataset("train", 20, 3, labels)[:] == rows[:20]
    won, p = [], []
    for row in rows:
        texts = [answer[0]["content"] for answer in row["responses"]]
        rewards = [true_reward(row["prompt"], text) for text in texts]
        assert len(set(texts)) == 4 and len(row["comparisons"]) == 6
        for one in row["comparisons"]:
            margin = rewards[one["chosen"]] - rewards[one["rejected"]]
            assert one["true_margin"] == pytest.approx(margin)
            won.append(margin > 0 if margin else 0.5)
            p.append(1 / (1 + math.exp(-abs(margin))))
            if labels == "plackett_luce":
                assert row["ranks"][one["chosen"]] < row["ranks"][one["rejected"]]
    p = np.array(p)
    # comparisons of a prompt are correlated: the standard error of 6 independent ones, times the square root of 6
    assert abs(np.mean(won) - np.mean(p)) < 4 * np.sqrt(6 * np.sum(p * (1 - p))) / len(p)
    assert 0.8 < np.mean(p) < 0.9
    data = read("toy_groups", tokenizer, dataset_test_split="test", max_eval_samples=5, eval_dataset_config=labels)
    assert len(data) == 5 and data.audit["kept"] == 30


def test_a_wrong_configuration_of_the_toy_data(tokenizer, own_cache):
    with pytest.raises(InputError, match="toy_groups: there is no dataset_config 'x'; toy_groups has plackett_luce"):
        read("toy_groups", tokenizer, eval_dataset_config="x")
