"""rm/rows.py and what it stands on (load, render, encode, audit): every format, count and error, on literal data."""

import csv
import gzip
import io
import itertools
import json
import logging
import os
import re
import signal

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import rm.data.rows
from rm.config.errors import InputError
from rm.data.audit import audit_table, data_report
from rm.data.load import load_raw
from rm.data.mixture import PairSets, load_pairs
from rm.data.render import RowError
from rm.data.rows import Pairs, tokenize_pairs
from rm.data.shared_start import _cut, can_share_prefix, encode_pairs
from rm.data.tokenize import shared_prefix_length, truncate_left

WORDS = "a b c d e f g x y z hi no yes ok Human : Assistant city tool date plain".split()
TEMPLATE = (
    "{%- if tools %}tool {{ tools[0]['name'] }} {% endif %}{%- if style %}{{ style }} {% endif %}"
    "{%- for m in messages %}{%- if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{%- if m.tool_calls and 'k' in m.tool_calls[0] %}date {% endif %}"
    "<|{{ m.role }}|> {{ m.content }}{% if m.tool_calls is defined %} tool{% endif %} <|end|>{% endfor %}"
)
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes a", "rejected": "\n\nHuman: hi\n\nAssistant: no"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def word_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<pad>", "<eos>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    extra = {"additional_special_tokens": special[4:]}
    return PreTrainedTokenizerFast(tokenizer_object=words, **(names | extra | kwargs))


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_of(rows, tokenizer, tmp_path, **options):
    return tokenize_pairs(load_raw(write(tmp_path / "rows.jsonl", rows), split="train"), tokenizer, **options)


def only(pairs: PairSets) -> Pairs:
    (pairs,) = pairs.sets.values()
    return pairs


def decoded(pairs, tokenizer) -> list[tuple[str, str]]:
    columns = pairs.dataset["input_ids_chosen"][:], pairs.dataset["input_ids_rejected"][:]
    return [(tokenizer.decode(chosen), tokenizer.decode(rejected)) for chosen, rejected in zip(*columns, strict=True)]


def say(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


# ---------------------------------------------------------------- formats


def test_text_with_implicit_prompt(tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pairs = pairs_of([HH], tokenizer, tmp_path)
    assert pairs.format == "text_implicit_prompt" and "text_implicit_prompt" in caplog.text
    want = "Human : hi Assistant : yes a <eos>", "Human : hi Assistant : no <eos>"
    assert decoded(pairs, tokenizer) == [want]
    row = pairs.dataset[0]
    assert (row["prefix_length"], row["length_chosen"], row["length_rejected"], row["margin"]) == (5, 8, 7, 0.0)
    assert (row["id"], row["row"]) == ("0", 0)
    assert pairs.texts(0) == {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes a", "rejected": " no"}


def test_the_prompt_of_a_long_transcript_ends_at_its_last_shared_turn(tokenizer, tmp_path):
    row = {side: f"\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: {end}" for side, end in GOOD.items()}
    shared = "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant:"
    assert pairs_of([row], tokenizer, tmp_path).texts(0) == {"prompt": shared, "chosen": " a", "rejected": " b"}


def test_text_without_turn_markers_is_shown_split_at_white_space(tokenizer, tmp_path):
    pairs = pairs_of(
        [{"chosen": "a b city", "rejected": "a b c"}, {"chosen": "x", "rejected": "y"}], tokenizer, tmp_path
    )
    assert pairs.texts(0) == {"prompt": "a b ", "chosen": "city", "rejected": "c"}
    assert pairs.texts(1) == {"prompt": "", "chosen": "x", "rejected": "y"}


def test_text_with_explicit_prompt(tokenizer, tmp_path):
    pairs = pairs_of([{"prompt": "a b", "chosen": " c", "rejected": " d"}], tokenizer, tmp_path, add_eos=False)
    assert pairs.format == "text_explicit_prompt"
    assert decoded(pairs, tokenizer) == [("a b c", "a b d")]
    assert pairs.texts(0) == {"prompt": "a b", "chosen": " c", "rejected": " d"}


@pytest.mark.parametrize("ending", ["", "<eos>"])  # with an ending, the shared start cannot be encoded once
def test_special_tokens_of_the_tokenizer_are_for_text_only(tmp_path, ending):
    tokenizer = word_tokenizer()
    template = processors.TemplateProcessing(f"<bos> $A {ending}".strip(), special_tokens=[("<bos>", 3), ("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    assert can_share_prefix(tokenizer) == (ending == "")
    assert decoded(pairs_of([GOOD], tokenizer, tmp_path), tokenizer) == [("<bos> a <eos>", "<bos> b <eos>")]
    want = tuple(f"<|user|> hi <|end|> <|assistant|> {end} <|end|>" for end in "ab")
    assert decoded(pairs_of([TALK], tokenizer, tmp_path), tokenizer) == [want]


def test_eos_is_not_appended_twice(tokenizer, tmp_path):
    pairs = pairs_of([{"chosen": "a <eos>", "rejected": "b"}], tokenizer, tmp_path)
    assert decoded(pairs, tokenizer) == [("a <eos>", "b <eos>")]


def test_conversation_with_implicit_prompt(tokenizer, tmp_path):
    rows = [{"chosen": say("hi", "a", "b", "c"), "rejected": say("hi", "a", "b", "d")}]
    pairs = pairs_of(rows, tokenizer, tmp_path)
    assert pairs.format == "conversation_implicit_prompt"
    start = "<|user|> hi <|end|> <|assistant|> a <|end|> <|user|> b <|end|> <|assistant|>"
    assert decoded(pairs, tokenizer) == [(f"{start} c <|end|>", f"{start} d <|end|>")]  # no EOS: the template ends it
    assert pairs.texts(0) == {"prompt": "user: hi\nassistant: a\nuser: b", "chosen": "c", "rejected": "d"}


def test_conversation_with_explicit_prompt(tokenizer, tmp_path):
    longer = say("d", "x", "y", first="assistant")
    rows = [{"prompt": say("hi"), "chosen": say("c", first="assistant"), "rejected": longer}]
    pairs = pairs_of(rows, tokenizer, tmp_path)
    assert pairs.format == "conversation_explicit_prompt"
    want = "<|assistant|> d <|end|> <|user|> x <|end|> <|assistant|> y <|end|>"
    assert decoded(pairs, tokenizer) == [("<|user|> hi <|end|> <|assistant|> c <|end|>", f"<|user|> hi <|end|> {want}")]
    answer = "assistant: d\nuser: x\nassistant: y"
    assert pairs.texts(0) == {"prompt": "user: hi", "chosen": "c", "rejected": answer}


def test_a_text_prompt_beside_whole_conversations_must_be_in_them(tokenizer, tmp_path):
    rows = [{"prompt": "hi", "chosen": say("hi", "a"), "rejected": say("hi", "b")}]
    pairs = pairs_of(rows, tokenizer, tmp_path)
    assert pairs.format == "conversation_implicit_prompt" and pairs.texts(0)["prompt"] == "user: hi"
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: 'prompt' is text, but not a message of"):
        pairs_of([*rows, rows[0] | {"prompt": "yes"}], tokenizer, tmp_path)


def test_tools_and_template_variables_and_no_filled_in_keys(tokenizer, tmp_path):
    calls = {"role": "assistant", "content": "b", "tool_calls": [{"name": "city"}]}
    rows = [
        {
            "chosen": say("hi", "a"),
            "rejected": say("hi", "b"),
            "tools": [{"name": "city"}],
            "chat_template_kwargs": None,
        },
        {"chosen": say("hi", "a"), "rejected": [*say("hi"), calls], "chat_template_kwargs": {"style": "plain"}},
    ]
    path = tmp_path / "rows.parquet"  # where a struct column has every key in every row, None where it was missing
    Dataset.from_list(rows, on_mixed_types=None).to_parquet(path)
    assert datasets.load_dataset("parquet", data_files=str(path))["train"][0]["rejected"][0]["tool_calls"] is None
    pairs = tokenize_pairs(load_raw(str(path), split="train"), tokenizer, chat_template_kwargs={"style": "date"})
    ends = "<|user|> hi <|end|> <|assistant|> a <|end|>", "<|user|> hi <|end|> <|assistant|> b <|end|>"
    tool = "plain <|user|> hi <|end|> <|assistant|> b tool <|end|>"
    want = [tuple(f"tool city date {end}" for end in ends), (f"plain {ends[0]}", tool)]
    assert decoded(pairs, tokenizer) == want
    assert pairs.texts(1)["rejected"] == 'b\n{"name": "city"}'
    as_text = [row | {"tools": json.dumps(row.get("tools"))} for row in rows]
    assert decoded(pairs_of(as_text, tokenizer, tmp_path, chat_template_kwargs={"style": "date"}), tokenizer) == want


def test_filled_in_keys_are_removed_at_every_depth(tokenizer, tmp_path):
    def call(content, **tool):
        return [*say("hi"), {"role": "assistant", "content": content, "tool_calls": [{"name": "city", **tool}]}]

    path = tmp_path / "rows.parquet"
    rows = [{"chosen": call("a", k=1), "rejected": call("b")}, {"chosen": call("c"), "rejected": call("d", k=1)}]
    Dataset.from_list(rows[:1], on_mixed_types=None).to_parquet(path)
    columns = {side: [row[side] for row in rows] for side in ("chosen", "rejected")}
    Dataset.from_dict(columns, on_mixed_types=None).to_parquet(path)
    raw = load_raw(str(path), split="train")
    assert raw.dataset[1]["chosen"][1]["tool_calls"] == [{"name": "city", "k": None}]
    assert ["date" in text for pair in decoded(tokenize_pairs(raw, tokenizer), tokenizer) for text in pair] == [
        True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected"),
        ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"),
        ("chosen_input_ids", "chosen_attention_mask", "rejected_input_ids", "rejected_attention_mask"),
    ],
)
def test_tokens(tokenizer, tmp_path, names):
    values = [[8, 9, 10, 1], [1, 1, 1, 0]], [[1, 8, 11], [0, 1, 1]]
    row = dict(zip(names, [*values[0], *values[1]], strict=True))
    pairs = pairs_of([row, row], tokenizer, tmp_path)
    assert pairs.format == "tokenized"
    assert pairs.dataset[1]["input_ids_chosen"] == [8, 9, 10] and pairs.dataset[1]["input_ids_rejected"] == [8, 11]
    assert pairs.texts(0) == {"prompt": "a", "chosen": "b c", "rejected": "d"}
    without_masks = {name: value for name, value in row.items() if "mask" not in name}
    assert pairs_of([without_masks], tokenizer, tmp_path).dataset[0]["input_ids_chosen"] == [8, 9, 10, 1]


def test_margin_scores_id_subset_and_true_margin(tokenizer, tmp_path):
    row = {"chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1.5}
    row |= {"id": 7, "subset": "s", "true_margin": 0.1}
    got = pairs_of([row | {"margin": 0.25}], tokenizer, tmp_path).dataset[0]
    assert (got["id"], got["subset"], got["margin"], got["true_margin"]) == ("7", "s", 0.25, 0.1)
    assert pairs_of([row], tokenizer, tmp_path).dataset[0]["margin"] == 0.0  # scores act only if asked for
    assert pairs_of([row], tokenizer, tmp_path, margin_from_scores=True).dataset[0]["margin"] == 1.5
    plain = pairs_of([{"chosen": "a", "rejected": "b"}], tokenizer, tmp_path).dataset
    assert "subset" not in plain.column_names and "true_margin" not in plain.column_names
    types = {name: str(kind) for name, kind in plain.features.items() if not name.startswith("input_ids")}
    assert types == {
        "id": "Value('string')", "row": "Value('int64')", "prefix_length": "Value('int32')",
        "length_chosen": "Value('int32')", "length_rejected": "Value('int32')", "margin": "Value('float32')",
        "hash_chosen": "Value('int64')", "hash_rejected": "Value('int64')",
    }  # fmt: skip
    assert plain.features["input_ids_chosen"] == datasets.List(datasets.Value("int32"))


def test_the_toy_data(tokenizer):
    train, test = load_pairs(tokenizer, dataset_name="toy", max_train_samples=30, max_eval_samples=10, seed=1)
    assert only(train).format == only(test).format == "conversation_explicit_prompt"
    assert len(only(train).raw) == 30 and len(only(test).raw) == 10 and "true_margin" in test.dataset.column_names
    with pytest.raises(InputError, match="toy: there is no split 'dev', only train, test"):
        load_raw("toy", split="dev")


# ---------------------------------------------------------------- files and splits

AB = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}, {"chosen": "NA", "rejected": "007"}]


def _write_csv(path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["chosen", "rejected"])
        writer.writeheader()
        writer.writerows(AB)


def _write_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in AB).encode()))


WRITERS = {
    "a.jsonl": lambda path: write(path, AB),
    "a.json": lambda path: path.write_text(json.dumps(AB)),
    "a.jsonl.gz": _write_gz,
    "a.json.gz": _write_gz,
    "a.csv": _write_csv,
    "a.parquet": lambda path: Dataset.from_list(AB).to_parquet(path),
    "saved": lambda path: Dataset.from_list(AB).save_to_disk(path),
    "saved_dict": lambda path: DatasetDict(train=Dataset.from_list(AB)).save_to_disk(path),
    "folder": lambda path: (path.mkdir(), write(path / "train.jsonl", AB)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source = load_raw(str(tmp_path / name), split="train")
    assert [source.dataset[i] for i in range(3)] == AB  # "NA" is no null and "007" no 7, not even in CSV
    with pytest.raises(InputError, match="no split 'test', only train; .*eval_dataset_name.*eval_fraction"):
        load_raw(str(tmp_path / name), split="test")
    assert len(load_raw(str(tmp_path / name), split="test", accept_only_split=True).dataset) == 3


def test_csv_takes_text_as_it_stands_and_numbers_as_numbers(tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text("chosen,rejected,margin\n007,1,0.5\n8,,2\n")
    source = load_raw(str(tmp_path / "rows.csv"), split="train")
    assert source.dataset[0] == {"chosen": "007", "rejected": "1", "margin": 0.5}
    assert source.dataset[1] == {"chosen": "8", "rejected": "", "margin": 2.0}


def test_a_changed_file_is_read_again(tokenizer, tmp_path):
    assert len(pairs_of([HH], tokenizer, tmp_path).dataset) == 1
    assert len(pairs_of([HH, HH], tokenizer, tmp_path).dataset) == 2


def test_splits_of_a_saved_data_set_and_another_eval_data_set(tokenizer, tmp_path):
    DatasetDict(train=Dataset.from_list(AB), dev=Dataset.from_list(AB[:1])).save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    train, test = load_pairs(tokenizer, dataset_name=name, dataset_test_split="dev", max_train_samples=2)
    assert (len(only(train).raw), len(only(test).raw)) == (2, 1)
    other = write(tmp_path / "other.jsonl", [{"chosen": "x", "rejected": "y"}])
    train, test = load_pairs(tokenizer, dataset_name=name, eval_dataset_name=other)
    assert only(test).raw[0]["chosen"] == "x" and only(test).source == other
    with pytest.raises(InputError, match="no split 'test', only train, dev"):
        load_pairs(tokenizer, dataset_name=other, eval_dataset_name=name)


def test_held_out_fraction(tokenizer, tmp_path):
    pool = [w for w in WORDS if w.isalpha()][:12]
    rows = [{"chosen": a, "rejected": b, "id": f"{a}{b}"} for a in pool for b in pool if a < b][:40]
    name = write(tmp_path / "rows.jsonl", rows)
    train, test = load_pairs(tokenizer, dataset_name=name, eval_fraction=0.25, seed=3)
    assert (train.audit["total"], test.audit["total"], test.audit["in_train"]) == (30, 10, 0)
    ids = [*train.dataset["id"], *test.dataset["id"]]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    assert [test.texts(i)["chosen"] for i in range(10)] == [only(test).raw[i]["chosen"] for i in range(10)]
    again = load_pairs(tokenizer, dataset_name=name, eval_fraction=0.25, seed=3)
    other = load_pairs(tokenizer, dataset_name=name, eval_fraction=0.25, seed=4)
    assert (train.fingerprint, test.fingerprint) == tuple(pairs.fingerprint for pairs in again)
    assert test.fingerprint != other[1].fingerprint
    few = load_pairs(tokenizer, dataset_name=name, eval_fraction=0.25, max_train_samples=5, max_eval_samples=2)
    assert [len(only(pairs).raw) for pairs in few] == [5, 2]
    with pytest.raises(InputError, match=r"eval_fraction=0.25 of 1 rows leaves none"):
        load_pairs(tokenizer, dataset_name=write(tmp_path / "one.jsonl", rows[:1]), eval_fraction=0.25)


def test_first_n_samples_in_order_and_more_than_there_are(tmp_path, caplog):
    name = write(tmp_path / "rows.jsonl", AB)
    assert load_raw(name, split="train", max_samples=2).dataset["chosen"][:] == ["a", "c"]
    assert not caplog.records
    assert len(load_raw(name, split="train", max_samples=4).dataset) == 3
    assert "rows.jsonl: 4 pairs asked for, 3 exist" in caplog.text


# ---------------------------------------------------------------- unreadable files

UNREADABLE = {
    "missing.jsonl": (None, "there is no such file or folder"),
    "empty.jsonl": (b"", "the file is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "the file is empty"),
    "blank.json": (b"\n\n", "there are no rows"),
    "head.csv": (b"chosen,rejected\n", "there are no rows"),
    "text.txt": (b"hello", r"unknown extension; use \.json, \.jsonl, \.parquet or \.csv"),
    "cut.jsonl": (
        b'{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rej\n',
        "row 1: cannot be read: JSONDecodeError",
    ),
    "half.jsonl": (
        b'{"chosen": "a", "rejected": "b"}\n{"chosen": "\\ud800", "rejected": "b"}\n',
        "row 1: .*surrogates",
    ),
    "number.jsonl": (b'{"chosen": "a", "rejected": "b"}\n5\n', "row 1: is not an object|cannot be read"),
    "plain.jsonl.gz": (b'{"chosen": "a", "rejected": "b"}\n', "cannot be read: BadGzipFile"),
    "short.jsonl.gz": (gzip.compress(b'{"chosen": "a", "rejected": "b"}\n' * 99)[:-20], "row .*EOFError"),
    "json.parquet": (b'{"chosen": "a", "rejected": "b"}\n', "cannot be read: ArrowInvalid: Parquet"),
    "latin.csv": (b"chosen,rejected\na,\xe9\n", "cannot be read: UnicodeDecodeError"),
    "ragged.csv": (b"chosen,rejected\na,b\na,b,c,d\n", "cannot be read: ParserError"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(tmp_path, name):
    content, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_raw(str(tmp_path / name), split="train")
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_hub_that_is_not_reached(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(
        InputError, match=r"^someone/pairs: .*the hub does not give it: ConnectionError: Couldn't reach the"
    ):
        load_raw("someone/pairs", split="train")


def test_a_number_far_down_a_file_does_not_turn_its_neighbours_into_json(tokenizer, tmp_path):
    rows = [{"chosen": "a " * 1000, "rejected": "b"}] * 10_000  # 20 MB: the types are inferred from the first 10 MB
    rows[9990] = {"chosen": 5, "rejected": "b"}
    source = load_raw(write(tmp_path / "long.jsonl", rows), split="train")
    assert source.dataset[9995]["chosen"].startswith(
        '"'
    )  # the bug that we guard against; if it is mended, drop the guard
    with pytest.raises(
        InputError, match=r"long.jsonl, row 9990: .*chosen.* changed from string to number; give the column one"
    ):
        tokenize_pairs(source, tokenizer)


# ---------------------------------------------------------------- wrong rows

GOOD = {"chosen": "a", "rejected": "b"}
TALK = {"chosen": say("hi", "a"), "rejected": say("hi", "b")}
IDS = {"chosen_ids": [8, 9], "rejected_ids": [8, 10]}
MASKED = IDS | {"chosen_mask": [1, 1], "rejected_mask": [1, 1]}
WRONG_ROWS = [  # (a good row, a wrong row, what the message says)
    (GOOD, {"chosen": "a"}, "'rejected' is missing (null), expected text"),
    (GOOD, GOOD | {"chosen": None}, "'chosen' is missing (null)"),
    (GOOD, GOOD | {"chosen": 5}, "'chosen' is a number, expected text, as in the other rows"),
    (GOOD, TALK, "'chosen' is a list, expected text"),
    (GOOD | {"prompt": "x"}, GOOD, "'prompt' is missing (null)"),
    (GOOD | {"margin": 1}, GOOD, "'margin' is missing (null), expected a number"),
    (GOOD | {"margin": 1}, GOOD | {"margin": float("nan")}, "'margin' is nan, expected a finite number"),
    (GOOD | {"margin": 1}, GOOD | {"margin": 1e39}, "'margin' is 1e+39, expected a finite number"),
    (GOOD | {"margin": 1}, GOOD | {"margin": "high"}, "'margin' is text, expected a number"),
    (GOOD | {"margin": 1}, GOOD | {"margin": True}, "'margin' is true or false, expected a number"),
    (GOOD | {"subset": "s"}, GOOD, "'subset' is missing (null)"),
    (GOOD | {"id": "s"}, GOOD | {"id": [1]}, "'id' is a list"),
    (TALK, GOOD, "'chosen' is text, expected a list of messages, as in the other rows"),
    (TALK, {"chosen": TALK["chosen"]}, "'rejected' is missing (null)"),
    (TALK, TALK | {"rejected": []}, "'rejected' is an empty list"),
    (TALK, TALK | {"rejected": [{"role": "user"}]}, "rejected[0]['content'] is missing (null), expected text"),
    (TALK, TALK | {"rejected": [{"content": "a"}]}, "rejected[0]['role'] is missing (null), expected text"),
    (TALK, TALK | {"rejected": [*say("hi"), {"role": "user", "content": 5}]}, "rejected[1]['content'] is a number"),
    (TALK, TALK | {"rejected": ["hi"]}, "rejected[0] is text, expected a message"),
    (TALK, TALK | {"rejected": [{"role": "bad", "content": "a"}]}, "the chat template refuses the messages: .*no such"),
    (TALK | {"tools": [{"name": "a"}]}, TALK | {"tools": "["}, "'tools' is text, expected a list"),
    (TALK | {"tools": "[]"}, TALK | {"tools": "5"}, "'tools' is a number, expected a list"),
    (IDS, {"chosen_ids": [8]}, "'rejected_ids' is missing"),
    (IDS, IDS | {"chosen_ids": [8, None]}, "'chosen_ids' is missing or has a missing (null) element"),
    (IDS, IDS | {"chosen_ids": [8, -1]}, "'chosen_ids' has the token id -1, the tokenizer 0 to 28"),
    (IDS, IDS | {"rejected_ids": [8, 29]}, "'rejected_ids' has the token id 29, the tokenizer 0 to 28"),
    (IDS, IDS | {"rejected_ids": [8, "x"]}, "'rejected_ids' is not a list of integers"),
    (MASKED, MASKED | {"chosen_mask": [1]}, "'chosen_ids' needs an attention mask of as many 0s and 1s"),
    (MASKED, MASKED | {"chosen_mask": [1, 2]}, "'chosen_ids' needs an attention mask of as many 0s and 1s"),
]


@pytest.mark.parametrize(
    ("good", "wrong", "message"), WRONG_ROWS, ids=lambda value: value if type(value) is str else ""
)
def test_wrong_row(tokenizer, tmp_path, good, wrong, message):
    with pytest.raises(InputError) as error:
        pairs_of([good, good, wrong], tokenizer, tmp_path)
    start, _, end = message.partition(".*")
    text = str(error.value)
    assert f"rows.jsonl, row 2: {start}" in text and end in text and "\n" not in text


def test_null_score(tokenizer, tmp_path):
    row = GOOD | {"score_chosen": 1, "score_rejected": 2}
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: 'score_rejected' is missing \(null\)"):
        pairs_of([row, row | {"score_rejected": None}], tokenizer, tmp_path, margin_from_scores=True)


WRONG_COLUMNS = [
    ([{"chosen": "a"}], "rows.jsonl: needs the columns 'chosen' and 'rejected' .*its columns are chosen"),
    ([{"chosen": 1, "rejected": 2}], r"rows.jsonl, row 0: 'chosen' has the type Value\('int64'\)"),
    ([{"chosen": "a", "rejected": None}], r"rows.jsonl, row 0: 'rejected' is missing \(null\)"),
    (
        [{"chosen": "a", "rejected": say("hi")}],
        "row 0: 'chosen' is text and 'rejected' is messages; they must be alike",
    ),
    (
        [{"prompt": say("hi"), "chosen": "a", "rejected": "b"}],
        "row 0: 'prompt' is messages and 'chosen' is text; write",
    ),
    ([{"chosen": ["a"], "rejected": ["b"]}], "row 0: 'chosen' has the type List"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG_COLUMNS, ids=lambda value: value if type(value) is str else "")
def test_wrong_columns(tokenizer, tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        pairs_of(rows, tokenizer, tmp_path)


def test_options_that_do_not_fit_the_data(tmp_path, tokenizer):
    with pytest.raises(InputError, match="rows.jsonl: there is no column 'score_chosen'; set margin_from_scores"):
        pairs_of([GOOD], tokenizer, tmp_path, margin_from_scores=True)
    both = GOOD | {"score_chosen": 1, "score_rejected": 0, "margin": 1}
    with pytest.raises(InputError, match="rows.jsonl: has a column 'margin'; set margin_from_scores to false"):
        pairs_of([both], tokenizer, tmp_path, margin_from_scores=True)
    with pytest.raises(InputError, match="rows.jsonl: conversations need a chat template.*chat_template_path"):
        pairs_of([TALK], word_tokenizer(chat_template=None), tmp_path)
    with pytest.raises(InputError, match="rows.jsonl: the tokenizer has no EOS token.*add_eos"):
        pairs_of([GOOD], word_tokenizer(eos_token=None), tmp_path)
    assert len(pairs_of([GOOD], word_tokenizer(eos_token=None), tmp_path, add_eos=False).dataset) == 1


BAD_BYTES = {
    b'{"chosen": "\xe9", "rejected": "b"}': "row 1: 'utf-8' codec can't decode .*; write the file in UTF-8",
    b'{"chosen": "a", "rejected": "\\ud800"}': "row 1: .*surrogate",
}


@pytest.mark.parametrize("line", BAD_BYTES)
@pytest.mark.parametrize("as_messages", [False, True])
def test_bytes_that_are_no_text(tokenizer, tmp_path, line, as_messages):
    lines = [b'{"chosen": "a", "rejected": "b"}', line]
    if as_messages:  # the key x of one row makes the reader store messages in another way (type Json)
        lines = [re.sub(rb'("[^"]*")([,}])', rb'[{"role": "user", "content": \1}]\2', line) for line in lines]
        lines.append(
            b'{"chosen": [{"role": "user", "content": "a", "x": 1}], "rejected": [{"role": "user", "content": "b"}]}'
        )
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=rf"rows.jsonl, {BAD_BYTES[line]}") as error:
        tokenize_pairs(load_raw(str(tmp_path / "rows.jsonl"), split="train"), tokenizer)
    assert "\n" not in str(error.value)


def test_a_row_is_named_by_its_file_and_by_its_place_before_selection(tokenizer, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train-1.jsonl", [GOOD, GOOD])
    write(folder / "train-2.jsonl", [GOOD, {"chosen": "a", "rejected": None}])
    with pytest.raises(InputError, match=r"folder/train-2.jsonl, row 1: 'rejected' is missing"):
        tokenize_pairs(load_raw(str(folder), split="train"), tokenizer)
    source = load_raw(write(tmp_path / "rows.jsonl", [GOOD, GOOD, {"chosen": "a", "rejected": None}]), split="train")
    with pytest.raises(InputError, match=r"rows.jsonl, row 2: 'rejected' is missing"):
        tokenize_pairs(source.select([2, 0]), tokenizer)


def test_a_template_that_writes_the_date(tmp_path, caplog):
    dated = word_tokenizer(chat_template="{{ date_string or strftime_now('%Y') }}" + TEMPLATE)
    pairs_of([TALK], dated, tmp_path)
    assert "chat_template_kwargs" in caplog.text
    caplog.clear()
    pairs_of([TALK], dated, tmp_path, chat_template_kwargs={"date_string": "date"})
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# ---------------------------------------------------------------- audit


def test_every_count_of_the_audit(tokenizer, tmp_path, caplog):
    train = [
        ("a b c", "a b d"),
        ("a b c", "a b d"),  # duplicate
        ("a b d", "a b c"),  # contradicts both
        ("x y", "x y"),  # identical
        ("x  y", "x y"),  # identical as tokens
        ("x", " \n"),  # empty
        ("a b c d e f", "a"),  # over_length
        ("x", "y"),
    ]
    test = [("y", "x"), ("a", "b"), ("a b c", "a b d"), ("x", "x")]
    names = [
        write(tmp_path / f"{i}.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows])
        for i, rows in enumerate((train, test))
    ]
    both = load_pairs(tokenizer, dataset_name=names[0], eval_dataset_name=names[1], max_length=4)
    assert both[0].audit == {
        "total": 8, "empty": 1, "identical": 2, "over_length": 1, "kept": 4, "truncated": 0,
        "duplicate": 1, "contradictory": 3, "mean_tokens": 3.5, "max_tokens": 4, "mean_shared_prefix": 1.5,
    }  # fmt: skip
    assert both[0].dataset["row"][:] == [0, 1, 2, 7] and both[0].texts(3)["chosen"] == "x"
    assert both[1].audit["in_train"] == 2 and both[1].audit["identical"] == 1 and both[1].audit["kept"] == 3
    assert "2 of the 3 test pairs are in the train set too" in caplog.text
    again = load_pairs(tokenizer, dataset_name=names[0], eval_dataset_name=names[1], max_length=4)  # from the cache
    assert [pairs.audit for pairs in again] == [pairs.audit for pairs in both]

    report = json.loads(json.dumps(data_report(*both)))
    assert report["train"] == both[0].audit | {
        "source": names[0], "format": "text_implicit_prompt", "fingerprint": both[0].fingerprint
    }  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(audit_table(*both))
    cells = [
        [cell.strip() for cell in line.split("│")[1:4]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert ["identical", "2", "1"] in cells and ["in_train", "", "2"] in cells and ["over_length", "1", "0"] in cells
    assert not any("truncated" in row for row in cells)
    assert audit_table(None, both[1]).row_count and list(data_report(None, both[1])) == ["test"]


def test_blank_answers_of_every_format_are_empty(tokenizer, tmp_path):
    prompt = {"prompt": "hi ", "chosen": "", "rejected": "a"}
    assert pairs_of([prompt, prompt | {"chosen": "b"}], tokenizer, tmp_path).audit["empty"] == 1
    assert (
        pairs_of([{"chosen": say("hi", " "), "rejected": say("hi", "b")}, TALK], tokenizer, tmp_path).audit["empty"]
        == 1
    )
    assert pairs_of([IDS | {"chosen_ids": []}, IDS], tokenizer, tmp_path).audit["empty"] == 1
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "city"}]}
    assert (
        pairs_of([{"chosen": [*say("hi"), call], "rejected": say("hi", "b")}], tokenizer, tmp_path).audit["empty"] == 0
    )
    padding = MASKED | {"chosen_mask": [0, 0]}
    assert pairs_of([padding, MASKED], tokenizer, tmp_path).audit["empty"] == 1


def test_no_pair_left(tokenizer, tmp_path):
    rows = [{"chosen": "a", "rejected": "a"}, {"chosen": "a b c", "rejected": "d"}]
    with pytest.raises(InputError, match=r"rows.jsonl: no pair is left of 2 \(1 identical, 1 over_length\)"):
        pairs_of(rows, tokenizer, tmp_path, max_length=2)


def test_fingerprint_is_of_the_kept_pairs_and_the_same_everywhere(tokenizer, tmp_path):
    known = "1c541d93c55de2b18106d9a8413caa3e43f9dfaa0546a59fac0317e0ea5ac75f"
    assert pairs_of([IDS, IDS | {"rejected_ids": [8, 11]}], tokenizer, tmp_path).fingerprint == known
    dropped = IDS | {"rejected_ids": [8, 9]}
    assert pairs_of([IDS, dropped, IDS | {"rejected_ids": [8, 11]}], tokenizer, tmp_path).fingerprint == known
    rows = [IDS | {"margin": 0}, IDS | {"rejected_ids": [8, 11], "margin": 1}]
    assert pairs_of(rows, tokenizer, tmp_path).fingerprint != known
    assert pairs_of(rows[::-1], tokenizer, tmp_path).fingerprint != pairs_of(rows, tokenizer, tmp_path).fingerprint


# ---------------------------------------------------------------- length


def arrays(*lists):
    return [np.array(ids, np.int32) for ids in lists]


@pytest.mark.parametrize(
    ("chosen", "rejected", "length"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 1),
        ([1], [2], 0),
        ([1], [1, 2], 0),
        ([5, 1], [6, 1], 0),
        ([], [], 0),
    ],
)
def test_shared_prefix_leaves_each_side_a_token(chosen, rejected, length):
    assert shared_prefix_length(*arrays(chosen, rejected)) == length


@pytest.mark.parametrize(
    ("chosen", "rejected", "bos", "want"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], None, ([3, 4, 5, 6], [3, 4, 7])),  # the same two tokens from both
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], 1, ([1, 4, 5, 6], [1, 4, 7])),  # BOS stays
        ([1, 5, 6, 7, 8, 9], [1, 4], None, ([6, 7, 8, 9], [4])),  # the prefix is used up; the short answer is whole
        ([1, 5, 6, 7, 8, 9], [1, 4], 1, ([1, 7, 8, 9], [1, 4])),
        ([2, 5, 6, 7, 8], [3, 6, 7, 8], None, ([5, 6, 7, 8], [3, 6, 7, 8])),  # nothing is shared
    ],
)
def test_truncate_left(chosen, rejected, bos, want):
    got = truncate_left(arrays(chosen, rejected), 4, bos)
    assert tuple(ids.tolist() for ids in got) == want


def test_overlength_drops_or_truncates(tokenizer, tmp_path):
    rows = [
        {"chosen": "a b c d", "rejected": "a b c e"},
        {"chosen": "a b c d e f g", "rejected": "a c d e f g"},  # the last four tokens are the same
        {"chosen": "a b", "rejected": "a c"},
    ]
    dropped = pairs_of(rows, tokenizer, tmp_path, max_length=4)
    assert (dropped.audit["over_length"], dropped.dataset["row"][:]) == (2, [2])
    cut = pairs_of(rows, tokenizer, tmp_path, max_length=4, overlength="truncate_left")
    assert decoded(cut, tokenizer) == [("b c d <eos>", "b c e <eos>"), ("a b <eos>", "a c <eos>")]
    assert cut.dataset[0]["prefix_length"] == 2
    assert (cut.audit["truncated"], cut.audit["identical"], cut.audit["over_length"]) == (1, 1, 0)
    assert pairs_of(rows, tokenizer, tmp_path, max_length=None).audit["max_tokens"] == 8


# ---------------------------------------------------------------- cache and processes


def refuse_to_work(*args, **kwargs):
    raise AssertionError("tokenized again")


def test_cached_for_the_same_options_only(tokenizer, tmp_path, monkeypatch):
    name = write(tmp_path / "rows.jsonl", [HH, GOOD])
    first = tokenize_pairs(load_raw(name, split="train"), tokenizer, max_length=9)
    monkeypatch.setattr(rm.data, "encode_batch", refuse_to_work)
    tokenizer(
        [["a b"], ["c"]][0], padding="max_length", max_length=9, truncation=True
    )  # leaves traces in the tokenizer
    again = tokenize_pairs(load_raw(name, split="train"), tokenizer, max_length=9)
    assert again.dataset[:] == first.dataset[:] and again.fingerprint == first.fingerprint
    template = word_tokenizer(chat_template="{{ messages[0].content }}")
    for other, options in (
        (tokenizer, {"max_length": 8}),
        (tokenizer, {"max_length": 9, "overlength": "truncate_left"}),
        (tokenizer, {"max_length": 9, "add_eos": False}),
        (tokenizer, {"max_length": 9, "chat_template_kwargs": {"style": "plain"}}),
        (template, {"max_length": 9}),
        (word_tokenizer(eos_token="<bos>"), {"max_length": 9}),
    ):
        with pytest.raises(AssertionError, match="tokenized again"):
            tokenize_pairs(load_raw(name, split="train"), other, **options)


def test_in_two_processes(tokenizer, tmp_path):
    rows = [{"chosen": f"a {w}", "rejected": "b", "id": w} for w in WORDS]
    one = pairs_of(rows, tokenizer, tmp_path)
    two = pairs_of([row | {"extra": 1} for row in rows], tokenizer, tmp_path, dataset_num_proc=2)
    assert two.dataset[:] == one.dataset[:] and two.audit == one.audit
    rows[-1]["rejected"] = None
    with pytest.raises(InputError, match=rf"rows.jsonl, row {len(rows) - 1}: 'rejected' is missing \(null\)"):
        pairs_of(rows, tokenizer, tmp_path, dataset_num_proc=2)


def tell(batch, rows, **_):
    raise RowError(rows[0], f"SIGTERM does {signal.getsignal(signal.SIGTERM)!r}")


def test_the_workers_inherit_no_handler(tokenizer, tmp_path, monkeypatch):
    """With one that lets them live, the end of the pool after a wrong row would wait for them for ever."""

    def handler(*_):
        os._exit(1)

    monkeypatch.setattr("rm.data.rows.encode_batch", tell)
    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(InputError, match="row [01]: SIGTERM does <Handlers.SIG_DFL: 0>"):
        pairs_of([{"chosen": "a", "rejected": "b"}] * 2, tokenizer, tmp_path, dataset_num_proc=2)
    assert signal.getsignal(signal.SIGTERM) is handler


# ---------------------------------------------------------------- encoding a shared start once

CORPUS = [
    "the cat sat on the mat, and then it's gone. 12345 times!",
    "naïve café: \u4f60\u597d 😀\n\n  two  spaces\tand a tab",
    "don't cut a word in two; unthinkable things happen",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe_tokenizer(pre_tokenizer, bos=False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    result = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", bos_token="<|start|>")
    if bos:
        single = [("<|start|>", result.bos_token_id)]
        result.backend_tokenizer.post_processor = processors.TemplateProcessing("<|start|> $A", special_tokens=single)
    return result


def _gpt2():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _llama3():
    split = pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits():  # not at spaces: tokens reach over them, so no text must be cut
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("splitter", [_gpt2, _llama3, _digits])
def test_a_shared_start_is_encoded_once_with_the_same_ids(splitter, bos):
    tokenizer = bpe_tokenizer(splitter(), bos)
    assert can_share_prefix(tokenizer)
    prompts = ["", "the cat ", "<|end|> on the <|end|>mat and", *CORPUS, " ".join(CORPUS), "a b c d <|e", "x  y  z"]
    answers = ["", " sat", "sat", "'s", "nd|> x", "\n\nthe end", " 12", "  spaces", "\u0301e", " naïve"]
    pairs = [(p + a, p + b) for p in prompts for a in answers for b in answers] + list(
        itertools.product(CORPUS, CORPUS)
    )
    random = np.random.default_rng(0)
    for _ in range(500):  # a change anywhere
        text = " ".join(random.permutation(CORPUS))
        start, end = random.integers(len(text), size=2)
        pairs.append((text, text[:start] + random.choice(answers) + text[end:]))
    chosen, rejected = zip(*pairs, strict=True)
    quiet = {"add_special_tokens": True, "share_prefix": True}
    got = encode_pairs(list(chosen), list(rejected), tokenizer, **quiet)
    assert got[0] == tokenizer(list(chosen))["input_ids"]
    assert got[1] == tokenizer(list(rejected))["input_ids"]


def test_where_the_second_text_is_cut():
    texts = (
        "the cat sat on the mat",
        "the cat sat on it",
    )  # "the cat sat on " is shared: "on" may go on, "sat" is a word
    encoding = bpe_tokenizer(_gpt2()).backend_tokenizer.encode(texts[0])
    position, token = _cut(encoding, *texts)
    assert texts[1][position:] == " on it" and encoding.token_to_chars(token)[0] == position
    vocabulary = {letter: i for i, letter in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "Ġa"])}
    one_word = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))  # tokens start at the spaces, but nothing splits there
    one_word.pre_tokenizer = _digits()
    texts = "b ab ab ab", "b ab ab b"
    assert one_word.encode(texts[0]).tokens[:3] == ["b", "Ġa", "b"]
    assert _cut(one_word.encode(texts[0]), *texts) == (0, 0)


def test_tokenizers_whose_texts_cannot_be_cut(tokenizer):
    assert can_share_prefix(tokenizer)
    assert not can_share_prefix(bpe_tokenizer(pre_tokenizers.Metaspace()))
    assert not can_share_prefix(bpe_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not can_share_prefix(bpe_tokenizer(pre_tokenizers.Split(Regex(r"(?<=a) | "), behavior="isolated")))
    assert not can_share_prefix(bpe_tokenizer(pre_tokenizers.Split(Regex(" "), behavior="merged_with_next")))
    ends = word_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 2)])
    assert not can_share_prefix(ends)
    greedy = word_tokenizer()
    greedy.add_tokens(["a b"])
    assert not can_share_prefix(greedy)
