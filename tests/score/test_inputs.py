"""The tokens of everything that can be scored are those of training; and what is wrong with an input, literally."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from examples import IDS, TALK, TEMPLATE, say, word_tokenizer
from tokenizers import processors

from rm.data.example import Encoding, RowError
from rm.data.plan import Layout
from rm.data.tokenize import Tree
from rm.score.scorer import Scorer, encode_inputs, form_of

ENCODING = Encoding(vocab_size=29)
CALL = {"role": "assistant", "content": "b", "tool_calls": [{"name": "city"}]}
ROWS = {  # a pair or a group as training reads it
    "text": {"chosen": "hi a b", "rejected": "hi a c"},
    "text with a prompt": {"prompt": "hi ", "chosen": "a b", "rejected": "a c"},
    "conversation": TALK | {"tools": [{"name": "city"}], "chat_template_kwargs": {"style": "plain"}},
    "conversation with a prompt": {"prompt": say("hi"), "chosen": [CALL], "rejected": say("c", first="assistant")},
    "answers of text": {"prompt": say("hi"), "chosen": "a b", "rejected": "c"},
    "tokens": IDS | {"chosen_mask": [1, 1], "rejected_mask": [1, 0]},
    "long": {"prompt": "a b c d e f g ", "chosen": "x y", "rejected": "z"},
    "group": {"prompt": "hi ", "responses": ["a b", "a c", "d"], "scores": [1, 3, 2]},
    "group without a prompt": {"responses": ["hi a b", "hi a c", "hi"], "ranks": [2, 1, 3]},
    "group of messages": {"prompt": say("hi"), "responses": [[CALL], say("c", first="assistant")], "ranks": [1, 2]},
    "group of tokens": {"input_ids": [[8, 9], [8, 0, 10], [8]], "attention_mask": [[1, 1], [1, 0, 1], [1]],
                        "comparisons": [[1, 0], [0, 2]]},
}  # fmt: skip


def sequences(trees) -> list:
    return [tree if isinstance(tree, RowError) else [ids.tolist() for ids in tree.sequences()] for tree in trees]


@pytest.mark.parametrize("changes", [{}, {"max_length": 5, "overlength": "truncate_left"}, {"add_eos": False},
                                     {"chat_template_kwargs": {"style": "date"}}, {"text_as_conversation": True}],
                         ids=lambda changes: ",".join(changes))  # fmt: skip
@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_tokens_of_training(data_of, tokenizer, name, changes):
    trained = (
        {} if name in ("text", "group without a prompt") and "text_as_conversation" in changes else changes
    )  # an error in training
    data = data_of([ROWS[name]], **trained)
    (tree,) = encode_inputs([ROWS[name]], tokenizer, dataclasses.replace(ENCODING, **changes))
    assert sequences([tree]) == sequences(data.trees([0])) and len(tree.prefix) == len(data.trees([0])[0].prefix)


def test_every_form_of_one_answer(tokenizer):
    """`messages`, `prompt` with `response` or `responses`, a message, its text; `text`, `input_ids`."""
    prompt, answers = say("hi", "a", "b"), ["x", "y z", "x"]
    whole = [{"messages": prompt + say(answer, first="assistant")} for answer in answers]
    expected = [ids for (ids,) in sequences(encode_inputs(whole, tokenizer, ENCODING))]
    start = "<|user|> hi <|end|> <|assistant|> a <|end|> <|user|> b <|end|> <|assistant|>"
    assert tokenizer.decode(expected[1]) == f"{start} y z <|end|>"
    message = {"role": "assistant", "content": "y z"}
    forms = [{"prompt": prompt, "responses": mixed} for mixed in (answers, ["x", message, "x"], ["x", [message], "x"])]
    forms += [{"prompt": "b", "responses": [record["messages"] for record in whole]}]
    assert sequences(encode_inputs(forms, tokenizer, ENCODING)) == [expected] * 4
    for key in ("response", "completion"):
        single = [{"prompt": prompt, key: answer, "responses": None, "id": 1} for answer in answers]
        assert sequences(encode_inputs(single, tokenizer, ENCODING)) == [[ids] for ids in expected]
    text = [{"text": "a b"}, {"prompt": "a ", "response": "b"}, {"input_ids": [8, 9, 2]}]
    text += [{"input_ids": [1, 8, 9, 2], "attention_mask": [0, 1, 1, 1]}]
    assert sequences(encode_inputs(text, tokenizer, ENCODING)) == [[[8, 9, 2]]] * 4
    (tree,) = encode_inputs(forms[:1], tokenizer, ENCODING)
    assert tokenizer.decode(tree.prefix) == start and list(map(len, tree.answers)) == [2, 3, 2]


def test_labels_have_no_effect(tokenizer):
    """Also such as training would reject."""
    groups = [{"prompt": "a ", "responses": ["b", "c"]}, {"input_ids": [[8, 9], [8, 10]]}]
    labels = [{}, {"scores": [1, 2]}, {"ranks": [None, 1]}, {"scores": 5, "comparisons": [[0, 7]]}]
    for group, expected in zip(groups, ([[8, 9, 2], [8, 10, 2]], [[8, 9], [8, 10]]), strict=True):
        found = encode_inputs([group | label for label in labels], tokenizer, ENCODING)
        assert sequences(found) == [expected] * 4


def test_rendered_text_and_stored_messages_have_the_tokens_of_messages(tokenizer):
    rendered = "<|user|> hi <|end|> <|assistant|> a <|end|>"
    records = [{"messages": say("hi", "a")}, {"messages": json.dumps(say("hi", "a"))}, {"text": rendered}]
    prompt, answer = rendered[:-9], rendered[-9:]
    records += [{"text": rendered[:-8]}, {"prompt": prompt, "response": answer}, {"prompt": prompt, "response": "a"}]
    records += [{"prompt": prompt, "responses": ["a"]}, {"prompt": prompt, "completion": f"{answer}\n"}]
    for as_conversation in (False, True):
        encoding = dataclasses.replace(ENCODING, text_as_conversation=as_conversation)
        found = sequences(encode_inputs(records, tokenizer, encoding))
        assert found == [found[0]] * len(records) and tokenizer.decode(found[0][0]) == rendered


def test_a_prompt_with_special_tokens_is_text():
    """With BOS but not of the template, which would put it behind a second BOS."""
    bos = word_tokenizer(bos_token="<bos>", chat_template="{{ bos_token }}" + TEMPLATE)
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 3)])
    records = [{"prompt": "<bos> a ", "response": "b"}, {"text": "<bos> a b <eos>"}, {"text": "a b"}]
    encoding = dataclasses.replace(ENCODING, text_as_conversation=True)
    assert sequences(encode_inputs(records, bos, encoding)) == [[[3, 8, 9, 2]]] * 3


def test_the_first_form_decides(tokenizer):
    record = {"input_ids": [8], "chosen": "a", "rejected": "b", "responses": ["x"], "prompt": "c ", "response": "d"}
    record |= {"completion": "d", "text": "e"}
    order = [("input_ids",), ("chosen", "rejected"), ("responses",), ("prompt", "response"), ("prompt", "completion")]
    for keys in (*order, ("text",)):
        assert form_of(record) == (keys, "responses" if keys == ("responses",) else "")
        record[keys[-1]] = None
    assert form_of({"input_ids": [[8], [9]], "prompt": "c "}) == (("input_ids",), "input_ids")


@pytest.mark.parametrize(("name", "limit", "sizes"), [
    ("shared_prefix", 100, [4]), ("shared_prefix", 10, [2, 2]), ("shared_prefix", 3, [1, 1, 1, 1]),
    ("concatenated", 100, [1, 1, 1, 1]),
])  # fmt: skip
def test_a_tree_is_split_only_to_fit_into_a_forward_pass(name, limit, sizes):
    """A prefix of 4 tokens and four answers of 3."""
    tree = Tree(np.arange(4), [np.arange(3) + n for n in range(4)])
    parts = Scorer._split(SimpleNamespace(layout=Layout(name, 0), micro_batch_tokens=limit), tree)
    assert [len(part.answers) for part in parts] == sizes
    assert np.concatenate([ids for part in parts for ids in part.answers]).tolist() == [
        0,
        1,
        2,
        1,
        2,
        3,
        2,
        3,
        4,
        3,
        4,
        5,
    ]


BAD = [
    (1, "not a JSON object with keys"),
    ({}, "nothing to score; give text, messages, prompt and response or responses, or chosen and rejected"),
    ({"text": None, "id": 3}, "nothing to score; give text"),
    ({"text": 3}, "'text' is a number, expected text"),
    ({"text": " \n"}, "'text' is blank"),
    ({"text": "\ud800"}, "the tokenizer cannot read the text: "),
    ({"response": "b"}, "nothing to score; give text"),
    ({"prompt": 3, "response": "b"}, "'prompt' is a number, expected text or messages"),
    ({"prompt": "a", "responses": []}, "'responses' must be a list, and not empty"),
    ({"prompt": "a", "responses": "b"}, "'responses' must be a list, and not empty"),
    ({"prompt": "a", "responses": ["b", ""]}, "'responses[1]' is blank"),
    ({"prompt": "a", "responses": ["b", 4]}, "'responses[1]' is a number, expected text or messages"),
    ({"prompt": "a", "response": say("b")}, "'prompt' is text, 'response' is one message of user; "),
    ({"prompt": say("a"), "response": {"role": "assistant"}}, "response[0]['content'] is missing (null), expected"),
    ({"messages": []}, "'messages' must be a list, and not empty"),
    ({"messages": say("a", "")}, "'messages' is blank"),
    ({"messages": "a"}, "'messages' must be a list, and not empty"),
    ({"messages": say("a"), "tools": 3}, "'tools' is a number, expected a list"),
    ({"messages": [{"role": "bad", "content": "a"}]}, "the chat template rejects the messages: "),
    ({"messages": say("a"), "chat_template_kwargs": {"conversation": 1}}, "the chat template rejects the messages: "),
    ({"input_ids": [8, 9999]}, "'input_ids' has token ids from 8 to 9999, the tokenizer 0 to 28"),
    ({"input_ids": [8, "a"]}, "'input_ids' is not a list of whole numbers"),
    ({"input_ids": [8, 9], "attention_mask": [1]}, "'input_ids' needs an attention mask of as many 0s and 1s"),
    ({"input_ids": [8, 9], "attention_mask": [0, 0]}, "'input_ids' has no tokens"),
    ({"input_ids": []}, "'input_ids' has no tokens"),
    ({"input_ids": [[8], 9]}, "'input_ids[1]' is not a list of whole numbers"),
    ({"input_ids": [[8], [9, 99]]}, "'input_ids[1]' has token ids from 9 to 99, the tokenizer 0 to 28"),
    ({"input_ids": [[8], []]}, "'input_ids[1]' has no tokens"),
    ({"input_ids": [[8], [9]], "attention_mask": [[1]]}, "'attention_mask' needs a list for each of the 2 answers"),
    ({"prompt": "a", "completion": ""}, "'completion' is blank"),
    (RowError("not JSON"), "not JSON"),
]  # fmt: skip


def test_a_wrong_input_is_named_and_others_are_not_disturbed(tokenizer):
    good = [{"text": "a b"}, {"messages": say("a")}, {"prompt": "a ", "responses": ["b", "c"]}]
    expected = sequences(encode_inputs(good, tokenizer, ENCODING))
    found = sequences(encode_inputs([record for bad, _ in BAD for record in (bad, *good)], tokenizer, ENCODING))
    for i, (_, message) in enumerate(BAD):
        error, *others = found[4 * i : 4 * i + 4]
        assert isinstance(error, RowError) and str(error).startswith(message) and others == expected, error


def test_what_the_tokenizer_lacks():
    without = word_tokenizer(chat_template=None, eos_token=None)
    talk, text = encode_inputs([{"messages": say("a")}, {"text": "a"}], without, ENCODING)
    assert str(talk).startswith("conversations need a chat template")
    assert str(text) == "the tokenizer has no EOS token to append to text; set add_eos to false"
    no_eos = dataclasses.replace(ENCODING, add_eos=False)
    assert sequences(encode_inputs([{"text": "a"}], without, no_eos)) == [[[8]]]


def test_what_is_too_long(tokenizer):
    records = [{"text": "a b"}, {"prompt": "a b ", "responses": ["c d", "e"]}]
    encoding = dataclasses.replace(ENCODING, max_length=3)
    short, long = encode_inputs(records, tokenizer, encoding)
    assert str(long) == "'responses[0]' has 5 tokens, the limit is 3; overlength=truncate_left cuts it"
    cut = dataclasses.replace(encoding, overlength="truncate_left")
    assert sequences(encode_inputs(records, tokenizer, cut)) == [[[8, 9, 2]], [[10, 11, 2], [12, 2]]]
    huge = [{"text": "a " * 400}, {"prompt": "a " * 800, "responses": ["b", "c"]}]  # are not tokenized
    assert [str(e)[:8] for e in encode_inputs(huge, tokenizer, cut)] == ["has 812 ", "has 1,61"]
