"""Messages in the forms in which they are published: stored as text, with other keys and roles, in parts."""

import csv
import json
import logging

import pytest
from examples import TALK, TEMPLATE, decoded, read, say, word_tokenizer

from rm.data.example import RowError, check_messages, stored_messages

WANT = ("<|user|> hi <|end|> <|assistant|> a <|end|>", "<|user|> hi <|end|> <|assistant|> b <|end|>")
WALKS = TEMPLATE.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }} x {% endfor %}")


def as_numpy(messages: list[dict]) -> str:
    """As `str` of an array of objects: without commas between them."""
    return "[" + "\n ".join(map(str, messages)) + "]"


@pytest.mark.parametrize("store", [json.dumps, str, as_numpy, lambda messages: json.dumps(messages, indent=1)],
                         ids=["JSON", "Python", "NumPy", "JSON in lines"])  # fmt: skip
def test_messages_stored_as_text(data_of, tokenizer, tmp_path, store):
    whole = {side: store(messages) for side, messages in TALK.items()}
    answers = {"prompt": "hi"} | {side: store(messages[1:]) for side, messages in TALK.items()}
    apart = answers | {"prompt": store(say("hi"))}
    for row in (whole, answers, apart, apart | {"chosen": "a", "rejected": "b"}):
        assert decoded(data_of([row]), tokenizer) == [WANT]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, answers)
        writer.writeheader()
        writer.writerow(answers)
    assert decoded(read(str(tmp_path / "rows.csv"), tokenizer), tokenizer) == [WANT]


@pytest.mark.parametrize("text", [
    "hi", "", "{", "[1]", '{"role": "admin", "content": 1}', '{"to": "x", "value": 1}', '[{"role": "user"', "{a, b}",
    '[{"role": "user", "content": "a"}, 5]', "[" * 5000 + "{'role': 1}",
], ids=lambda text: text[:20])  # fmt: skip
def test_other_text_stays_text(text):
    assert stored_messages(text) == text


def test_one_answer_about_messages_stays_text(data_of):
    data = data_of([{"chosen": json.dumps(say("hi")), "rejected": "b"}])
    assert data.sets["rows"].encoding.format == "text_implicit_prompt"


@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("User", "Assistant"), ("prompter", "model")])
def test_other_keys_and_roles(data_of, tokenizer, user, assistant):
    for role, content in (("role", "content"), ("from", "value")):
        row = {side: [{role: user, content: "hi"}, {role: assistant, content: word}]
               for side, word in (("chosen", "a"), ("rejected", "b"))}  # fmt: skip
        assert decoded(data_of([row]), tokenizer) == [WANT]


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def test_parts_are_one_text_unless_the_template_walks_lists(data_of, tokenizer):
    row = {"chosen": say(parts("hi"), parts("a", "c")), "rejected": say(parts("hi"), parts("b"))}
    data = data_of([row])
    assert decoded(data, tokenizer) == [("<|user|> hi <|end|> <|assistant|> a c <|end|>", WANT[1])]
    assert data.texts(0) == {"prompt": "user: hi", "answers": ["a\nc", "b"]}
    walks = word_tokenizer(chat_template=WALKS)
    expected = "<|user|> hi x <|end|> <|assistant|> a x c x <|end|>", "<|user|> hi x <|end|> <|assistant|> b x <|end|>"
    assert decoded(data_of([row], walks), walks) == [expected]
    plain = {"chosen": say("hi", "a"), "rejected": say("hi", "b")}  # would be walked letter by letter
    expected = tuple(f"<|user|> hi x <|end|> <|assistant|> {word} x <|end|>" for word in "ab")
    assert decoded(data_of([plain], walks), walks) == [expected]
    rendered = {"prompt": "<|user|> hi x <|end|> <|assistant|> ", "chosen": "a x  <|end|>", "rejected": "b"}
    assert decoded(data_of([rendered], walks), walks) == [expected]


def test_a_prompt_of_text_may_be_a_message_in_parts(data_of, tokenizer):
    row = {"prompt": "hi", "chosen": say(parts("hi"), "a"), "rejected": say(parts("hi"), "b")}
    assert decoded(data_of([row]), tokenizer) == [WANT]


@pytest.mark.parametrize(("part", "kind"), [
    ({"type": "image_url", "text": "a"}, "image_url"), ("a", "just text"), ({"type": "text", "text": None}, "text"),
])  # fmt: skip
def test_other_parts_are_rejected(part, kind):
    problem = rf"^prompt\[1\]\['content'\] has a part \({kind}\) other than .*; leave out such rows$"
    with pytest.raises(RowError, match=problem):
        check_messages([*say("hi"), {"role": "user", "content": [*parts("b"), part]}], "prompt")


def test_a_conversation_that_ends_with_the_user_is_counted(data_of, caplog):
    data = data_of([TALK, {"chosen": say("hi", "a", "b"), "rejected": say("hi", "c")}, TALK])
    assert data.audit["ends_with_user"] == 1
    assert "rows.jsonl: 1 rows have conversations that end with a message of the user, not" in caplog.text


def test_negative_margins_are_counted(data_of, caplog):
    caplog.set_level(logging.INFO)
    for margins, level in (([2.0, 0.5], None), ([-1.0, 0.5], logging.INFO), ([-1.0, -0.5], logging.WARNING)):
        data_of([TALK | {"margin": margin} for margin in margins])
        count = sum(margin < 0 for margin in margins)
        found = [r.levelno for r in caplog.records if f"{count} of 2 margins are negative; are labels" in r.message]
        assert found == ([level] if level else [])


def test_text_on_a_chat_model_is_mentioned(data_of, caplog):
    row = {"prompt": "hi ", "chosen": "a", "rejected": "b"}
    data_of([row], word_tokenizer(chat_template=None)), data_of([row], text_as_conversation=False), data_of([TALK])
    assert "text_as_conversation" not in caplog.text
    with caplog.at_level("INFO"):
        data_of([row])
    assert "rows.jsonl stays text; text_as_conversation=true would apply the chat" in caplog.text
