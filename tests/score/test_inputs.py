"""The tokens of everything that can be scored are those of training; and what is wrong with an input, literally."""

import dataclasses

import pytest
from examples import IDS, TALK, say, word_tokenizer

from rm.data.formats import Encoding, RowError
from rm.score.scorer import encode_inputs, keys_of

ENCODING = Encoding(vocab_size=29)
CALL = {"role": "assistant", "content": "b", "tool_calls": [{"name": "city"}]}
ROWS = {  # a pair as training reads it
    "text": {"chosen": "hi a b", "rejected": "hi a c"},
    "text with a prompt": {"prompt": "hi ", "chosen": "a b", "rejected": "a c"},
    "conversation": TALK | {"tools": [{"name": "city"}], "chat_template_kwargs": {"style": "plain"}},
    "conversation with a prompt": {"prompt": say("hi"), "chosen": [CALL], "rejected": say("c", first="assistant")},
    "answers of text": {"prompt": say("hi"), "chosen": "a b", "rejected": "c"},
    "tokens": IDS | {"chosen_mask": [1, 1], "rejected_mask": [1, 0]},
    "long": {"prompt": "a b c d e f g ", "chosen": "x y", "rejected": "z"},
}


def sequences(trees) -> list:
    return [tree if isinstance(tree, RowError) else [ids.tolist() for ids in tree.sequences()] for tree in trees]


@pytest.mark.parametrize("changes", [{}, {"max_length": 5, "overlength": "truncate_left"}, {"add_eos": False},
                                     {"chat_template_kwargs": {"style": "date"}}, {"text_as_conversation": True}],
                         ids=lambda changes: ",".join(changes))  # fmt: skip
@pytest.mark.parametrize("name", ROWS)
def test_a_pair_has_the_tokens_of_training(data_of, tokenizer, name, changes):
    trained = {} if name == "text" and "text_as_conversation" in changes else changes  # an error in training
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
    single = [{"prompt": prompt, "response": answer, "responses": None, "id": 1} for answer in answers]
    assert sequences(encode_inputs(single, tokenizer, ENCODING)) == [[ids] for ids in expected]
    text = [{"text": "a b"}, {"prompt": "a ", "response": "b"}, {"input_ids": [8, 9, 2]}]
    text += [{"input_ids": [1, 8, 9, 2], "attention_mask": [0, 1, 1, 1]}]
    assert sequences(encode_inputs(text, tokenizer, ENCODING)) == [[[8, 9, 2]]] * 4
    (tree,) = encode_inputs(forms[:1], tokenizer, ENCODING)
    assert tokenizer.decode(tree.prefix) == start and list(map(len, tree.answers)) == [2, 3, 2]


def test_the_first_form_decides(tokenizer):
    record = {"input_ids": [8], "chosen": "a", "rejected": "b", "prompt": "c ", "response": "d", "text": "e"}
    order = [("input_ids",), ("chosen", "rejected"), ("prompt", "response"), ("text",)]
    for keys in order:
        assert keys_of(record) == keys
        record[keys[-1]] = None


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
    ({"prompt": "a", "response": say("b")}, "'prompt' is text, but not a message of 'response'; "),
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
