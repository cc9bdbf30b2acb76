"""Every format of a row, from the file to token ids and back to text; and what is wrong with a row, literally."""

import json
import re

import datasets
import pytest
from datasets import Dataset
from examples import GOOD, HH, IDS, TALK, decoded, read, say, word_tokenizer, write
from tokenizers import processors

from rm.config.errors import InputError
from rm.data.example import make_example
from rm.data.layouts import DATA_LAYOUTS, DataLayout


def answer(*contents: str) -> list[dict]:
    return say(*contents, first="assistant")


TURNS = "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant:"
HI = "<|user|> hi <|end|> <|assistant|>"
FORMATS = {  # name: (row, format, the sequences, prompt and answers as text)
    "text": (HH, "text_implicit_prompt",
             ("Human : hi Assistant : yes a <eos>", "Human : hi Assistant : no <eos>"),
             ("\n\nHuman: hi\n\nAssistant:", " yes a", " no")),
    "a transcript is split after the last shared turn":
        ({"chosen": f"{TURNS} a", "rejected": f"{TURNS} b"}, "text_implicit_prompt", None, (TURNS, " a", " b")),
    "text without turns is split at white space":
        ({"chosen": "a b city", "rejected": "a b c"}, "text_implicit_prompt", None, ("a b ", "city", "c")),
    "text without a shared start":
        ({"chosen": "x", "rejected": "y"}, "text_implicit_prompt", None, ("", "x", "y")),
    "text with a prompt": ({"prompt": "a b", "chosen": " c", "rejected": " d"}, "text_explicit_prompt",
                           ("a b c <eos>", "a b d <eos>"), ("a b", " c", " d")),
    "EOS is not appended twice":
        ({"chosen": "a <eos>", "rejected": "b"}, "text_implicit_prompt", ("a <eos>", "b <eos>"), None),
    "conversation": ({"chosen": say("hi", "a", "b", "c"), "rejected": say("hi", "a", "b", "d")},
                     "conversation_implicit_prompt",
                     tuple(f"{HI} a <|end|> <|user|> b <|end|> <|assistant|> {end} <|end|>" for end in "cd"),
                     ("user: hi\nassistant: a\nuser: b", "c", "d")),
    "conversation with a prompt and answers of several messages":
        ({"prompt": say("hi"), "chosen": answer("c"), "rejected": answer("d", "x", "y")},
         "conversation_explicit_prompt",
         (f"{HI} c <|end|>", f"{HI} d <|end|> <|user|> x <|end|> <|assistant|> y <|end|>"),
         ("user: hi", "c", "assistant: d\nuser: x\nassistant: y")),
    "a prompt of text that the conversations repeat":
        ({"prompt": "hi"} | TALK, "conversation_implicit_prompt",
         (f"{HI} a <|end|>", f"{HI} b <|end|>"), ("user: hi", "a", "b")),
    "a prompt of messages and answers of text":
        ({"prompt": say("hi"), "chosen": "a", "rejected": "b"}, "conversation_explicit_prompt",
         (f"{HI} a <|end|>", f"{HI} b <|end|>"), ("user: hi", "a", "b")),
    "tokens": ({"chosen_ids": [8, 9, 10, 2], "rejected_ids": [8, 11]}, "tokenized",
               ("a b c <eos>", "a d"), ("a", "b c <eos>", "d")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_format(data_of, tokenizer, name):
    row, kind, sequences, (prompt, *answers) = [*FORMATS[name][:3], FORMATS[name][3] or ("", "a <eos>", "b")]
    data = data_of([row, row])
    assert data.sets["rows"].encoding.format == kind
    assert sequences is None or decoded(data, tokenizer) == [sequences] * 2
    assert data.texts(1) == {"prompt": prompt, "answers": answers}
    assert (data.ids([0, 1]), data.dataset["row"][:]) == (["0", "1"], [[0], [1]])


@pytest.mark.parametrize("ending", ["", " <eos>"])
def test_special_tokens_of_the_tokenizer_are_for_text_only(data_of, ending):
    tokenizer = word_tokenizer(bos_token="<bos>")
    special = [("<bos>", 3), ("<eos>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"<bos> $A{ending}", None, special)
    assert decoded(data_of([GOOD], tokenizer), tokenizer) == [("<bos> a <eos>", "<bos> b <eos>")]
    assert decoded(data_of([TALK], tokenizer), tokenizer) == [(f"{HI} a <|end|>", f"{HI} b <|end|>")]
    for begin, end in (("<bos> ", " <eos>"), ("<bos>", "<eos> \n"), ("<bos>", ""), ("", " <eos>")):
        row = {"chosen": f"{begin}a{end}", "rejected": f"{begin}b{end}"}
        assert decoded(data_of([row], tokenizer), tokenizer) == [("<bos> a <eos>", "<bos> b <eos>")]
    without = f"<bos> a{ending}", f"<bos> b{ending}"
    assert decoded(data_of([GOOD], tokenizer, add_eos=False), tokenizer) == [without]


def test_text_as_conversation(data_of, tokenizer):
    rows = [{"prompt": "hi", "chosen": "a", "rejected": "b"}]
    data = data_of(rows, text_as_conversation=True)
    assert data.sets["rows"].encoding.format == "conversation_from_text"
    assert decoded(data, tokenizer) == [(f"{HI} a <|end|>", f"{HI} b <|end|>")]
    assert data.texts(0) == {"prompt": "user: hi", "answers": ["a", "b"]}
    with pytest.raises(InputError, match="rows.jsonl: text without a column 'prompt' cannot be made a conversation; "):
        data_of([GOOD], text_as_conversation=True)


def test_tools_and_template_variables(data_of, tokenizer, tmp_path):
    call = {"role": "assistant", "content": "b", "tool_calls": [{"name": "city"}]}
    rows = [
        TALK | {"tools": [{"name": "city"}], "chat_template_kwargs": None},
        TALK | {"rejected": [*say("hi"), call], "chat_template_kwargs": {"style": "plain"}},
    ]
    path = tmp_path / "rows.parquet"  # a struct column has every key in every row, None where it was missing
    Dataset.from_list(rows, on_mixed_types=None).to_parquet(path)
    assert datasets.load_dataset("parquet", data_files=str(path))["train"][0]["rejected"][0]["tool_calls"] is None
    data = read(str(path), tokenizer, chat_template_kwargs={"style": "date"})
    want = [(f"tool city date {HI} a <|end|>", f"tool city date {HI} b <|end|>"),
            (f"plain {HI} a <|end|>", f"plain {HI} b tool <|end|>")]  # fmt: skip
    assert decoded(data, tokenizer) == want
    assert data.texts(1)["answers"][1] == 'b\n{"name": "city"}'
    as_text = [row | {"tools": json.dumps(row.get("tools"))} for row in rows]
    assert decoded(data_of(as_text, chat_template_kwargs={"style": "date"}), tokenizer) == want


def test_keys_that_other_rows_added_are_removed_at_every_depth(tokenizer, tmp_path, own_cache):
    def call(content, **tool):
        return [*say("hi"), {"role": "assistant", "content": content, "tool_calls": [{"name": "city", **tool}]}]

    columns = {"chosen": [call("a", k=1), call("c")], "rejected": [call("b"), call("d", k=1)]}
    Dataset.from_dict(columns, on_mixed_types=None).to_parquet(tmp_path / "rows.parquet")
    data = read(str(tmp_path / "rows.parquet"), tokenizer)
    assert data.sets["rows"].source.dataset[1]["chosen"][1]["tool_calls"] == [{"name": "city", "k": None}]
    assert [["date" in text for text in row] for row in decoded(data, tokenizer)] == [[True, False], [False, True]]


@pytest.mark.parametrize("names", [("input_ids_{}", "attention_mask_{}"), ("{}_ids", "{}_mask"),
                                   ("{}_input_ids", "{}_attention_mask")])  # fmt: skip
def test_tokens_and_their_masks(data_of, names):
    values = {"chosen": ([8, 9, 10, 1], [1, 1, 1, 0]), "rejected": ([1, 8, 11], [0, 1, 1])}
    row = {n.format(side): list_ for side in values for n, list_ in zip(names, values[side], strict=True)}
    assert [ids.tolist() for ids in data_of([row]).trees([0])[0].sequences()] == [[8, 9, 10], [8, 11]]
    without_masks = {name: value for name, value in row.items() if "mask" not in name}
    assert data_of([without_masks]).trees([0])[0].sequences()[0].tolist() == [8, 9, 10, 1]


def test_a_layout_of_several_answers(data_of, monkeypatch):
    """Its comparisons have values of their own, or that of the row; one with p_chosen below 0.5 is swapped."""

    def read_ranked(row, encoding):
        example = make_example(None, {"best": row["best"], "good": row["good"], "bad": row["bad"]})
        example.comparisons, example.columns["p_chosen"] = [(0, 1), (2, 0)], [0.75, 0.25]
        return example

    monkeypatch.setitem(
        DATA_LAYOUTS, "ranked", DataLayout({name: name for name in ("best", "good", "bad")}, read_ranked)
    )
    data = data_of([{"best": "a b", "good": "a c", "bad": "a d", "margin": 2.0}])
    assert data.sets["rows"].encoding.format == "text_ranked"
    table = data.comparisons[["chosen", "rejected", "p_chosen", "margin", "share"]]
    assert table.values.tolist() == [[0, 1, 0.75, 2, 0.5], [0, 2, 0.75, -2, 0.5]]


# ---------------------------------------------------------------- wrong rows

MASKED = IDS | {"chosen_mask": [1, 1], "rejected_mask": [1, 1]}
WRONG_ROWS = [  # (a good row, a wrong row, the message)
    (GOOD, {"chosen": "a"}, "'rejected' is missing (null), expected text or messages"),
    (GOOD, GOOD | {"chosen": None}, "'chosen' is missing (null), expected text or messages"),
    (GOOD, GOOD | {"chosen": 5}, "'chosen' is a number, expected text or messages"),
    (GOOD, GOOD | {"chosen": True}, "'chosen' is true or false, expected text or messages"),
    (GOOD, GOOD | {"chosen": say("a")}, "'rejected' is text, 'chosen' is messages; they must be alike"),
    (GOOD, TALK, "'chosen' is conversation, expected text, as in the other rows"),
    (GOOD | {"prompt": "x"}, GOOD, "'prompt' is missing (null), expected text or messages"),
    (GOOD | {"subset": "s"}, GOOD, "'subset' is missing (null), expected text or a whole number"),
    (GOOD | {"id": "s"}, GOOD | {"id": [1]}, "'id' is a list, expected text or a whole number"),
    (TALK, GOOD, "'chosen' is text, expected conversation, as in the other rows"),
    (TALK, {"chosen": TALK["chosen"]}, "'rejected' is missing (null), expected text or messages"),
    (TALK, TALK | {"rejected": []}, "'rejected' is an empty list, expected one message or more"),
    (TALK, TALK | {"rejected": [{"role": "user"}]}, "rejected[0]['content'] is missing (null), expected text"),
    (TALK, TALK | {"rejected": [{"content": "a"}]}, "rejected[0]['role'] is missing (null), expected text"),
    (TALK, TALK | {"rejected": [*say("hi"), {"role": "user", "content": 5}]},
     "rejected[1]['content'] is a number, expected text"),
    (TALK, TALK | {"rejected": ["hi"]}, "rejected[0] is text, expected a message with role and content"),
    (TALK | {"tools": [{"name": "a"}]}, TALK | {"tools": "["}, "'tools' is text, expected a list"),
    (TALK | {"tools": "[]"}, TALK | {"tools": "5"}, "'tools' is a number, expected a list"),
    (IDS, {"chosen_ids": [8]}, "'rejected_ids' is not a list of whole numbers"),
    (IDS, IDS | {"chosen_ids": [8, None]}, "'chosen_ids' is not a list of whole numbers"),
    (IDS, IDS | {"rejected_ids": [8, "x"]}, "'rejected_ids' is not a list of whole numbers"),
    (IDS, IDS | {"chosen_ids": [8, -1]}, "'chosen_ids' has token ids from -1 to 8, the tokenizer 0 to 28"),
    (IDS, IDS | {"rejected_ids": [8, 29]}, "'rejected_ids' has token ids from 8 to 29, the tokenizer 0 to 28"),
    (MASKED, MASKED | {"chosen_mask": [1]}, "'chosen_ids' needs an attention mask of as many 0s and 1s as it has"),
    (MASKED, MASKED | {"chosen_mask": [1, 2]}, "'chosen_ids' needs an attention mask of as many 0s and 1s as it"),
    (MASKED, IDS, "'chosen_ids' needs an attention mask of as many 0s and 1s as it has"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "wrong", "message"), WRONG_ROWS, ids=[message for _, _, message in WRONG_ROWS])
def test_wrong_row(data_of, tmp_path, good, wrong, message):
    with pytest.raises(InputError) as error:
        data_of([good, good, wrong])
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}, row 3: {message}")


def test_lists_of_texts(data_of, tokenizer):
    """Each right answer is compared with each wrong one; numbers of the row are those of each comparison."""
    rows = [{"prompt": "a ", "chosen": ["b", "c"], "rejected": ["d", "b", "e"], "margin": 2.0}]
    rows += [{"prompt": "a ", "chosen": ["b"], "rejected": ["c"], "margin": 1.0}]
    data = data_of(rows)
    assert data.sets["rows"].encoding.format == "text_lists" and data.audit["identical"] == 1
    assert decoded(data, tokenizer)[0] == tuple(f"a {word} <eos>" for word in "bcde")
    frame = data.comparisons
    assert frame[["chosen", "rejected"]].to_numpy()[:5].tolist() == [[0, 2], [0, 3], [1, 2], [1, 0], [1, 3]]
    assert frame["share"].tolist() == [1 / 5] * 5 + [1] and frame["margin"].tolist() == [2.0] * 5 + [1.0]
    assert data.comparison_texts(4) == {"prompt": "a ", "chosen": "c", "rejected": "e"}
    data = data_of(rows, text_as_conversation=True)
    assert data.sets["rows"].encoding.format == "conversation_from_text"
    assert decoded(data, tokenizer)[1] == tuple(f"<|user|> a <|end|> <|assistant|> {word} <|end|>" for word in "bc")
    with pytest.raises(InputError, match=r"row 2: chosen\[0\] is"):
        data_of([rows[0], rows[1] | {"chosen": [None]}])


WRONG_COLUMNS = [
    ([{"chosen": "a"}], r"rows.jsonl: unknown layout; its columns are chosen \(text\); docs/data.md has"),
    ([{"chosen": 1, "rejected": 2}], "row 1: 'chosen' is a number, expected text or messages$"),
    ([{"chosen": "a", "rejected": None}], r"row 1: 'rejected' is missing \(null\), expected text or messages$"),
    ([{"chosen": "a", "rejected": say("hi")}], "row 1: 'chosen' is text, 'rejected' is messages; they must be"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), WRONG_COLUMNS, ids=["missing", "number", "null", "unlike"])
def test_wrong_columns(data_of, rows, message):
    with pytest.raises(InputError, match=message):
        data_of(rows)


def test_options_that_do_not_fit_the_data(data_of):
    with pytest.raises(InputError, match="row 1: conversations need a chat template, .* set chat_template_path"):
        data_of([TALK], word_tokenizer(chat_template=None))
    without_eos = word_tokenizer(eos_token=None)
    with pytest.raises(InputError, match="rows.jsonl, row 1: the tokenizer has no EOS token .*; set add_eos to false"):
        data_of([GOOD], without_eos)
    assert decoded(data_of([GOOD], without_eos, add_eos=False), without_eos) == [("a", "b")]


BAD_BYTES = {
    b'{"chosen": "\xe9", "rejected": "b"}': "'utf-8' codec can't decode .*; write the file in UTF-8$",
    b'{"chosen": "a", "rejected": "\\ud800"}': ".*surrogate",
}


@pytest.mark.parametrize("line", BAD_BYTES, ids=["latin", "surrogate"])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_bytes_that_are_no_text(tokenizer, own_cache, tmp_path, line, kind):
    lines = [b'{"chosen": "a", "rejected": "b"}', line]
    if kind == "messages":  # the key x of one row makes the reader store messages in another way (type Json)
        lines = [re.sub(rb'("[^"]*")([,}])', rb'[{"role": "user", "content": \1}]\2', line) for line in lines]
        lines.append(json.dumps(TALK | {"chosen": [{"role": "user", "content": "a", "x": 1}]}).encode())
    path = tmp_path / "rows.json"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=f"rows.json, row 2: {BAD_BYTES[line]}") as error:
        read(str(path), tokenizer)
    assert "\n" not in str(error.value)


def test_a_wrong_row_ends_the_program_with_one_line(fails, tmp_path):
    write(tmp_path / "rows.jsonl", [GOOD, GOOD, {"chosen": "a"}])
    last = fails("--dataset_name=rows.jsonl", "--eval_fraction=0.5")
    assert last == "rows.jsonl, row 3: 'rejected' is missing (null), expected text or messages"
