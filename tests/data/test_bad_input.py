"""Wrong rows, files, configs and models given to the whole program: exit code 2 and one line that names the fix."""

import csv
import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import tiny_classifier, tiny_tokenizer
from runs import SMALL, reset_accelerate

import train_rm

GOOD = {"chosen": "rinse the rice.", "rejected": "what a silly question."}  # words of tiny_llama, the default model
WORDS = [{"chosen": "w3 w4", "rejected": f"w{i}"} for i in range(5, 13)]  # those of `models`
TALK = {side: [{"role": "user", "content": "w3"}, {"role": "assistant", "content": w}] for side, w in GOOD.items()}
LATIN = '"\u00e9"'.encode("latin-1")  # a letter whose byte is no UTF-8

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models: `base`, a causal LM with weights and tokenizer; `reward`, a classifier with one output."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    reward = tiny_classifier("llama")
    reward.save_pretrained(folder / "reward")
    AutoModelForCausalLM.from_config(reward.config).save_pretrained(folder / "base")
    tiny_classifier("llama", num_labels=2).save_pretrained(folder / "two_labels")
    for name in ("reward", "base", "two_labels"):
        tiny_tokenizer(None if name == "base" else "<pad>").save_pretrained(folder / name)
    return folder


# ---------------------------------------------------------------- rows


def json_lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = {  # a wrong row after three good ones of the same kind: (good row, wrong row, what the message says)
    "null": (GOOD, GOOD | {"rejected": None}, "'rejected' is missing (null), expected text"),
    "missing": (GOOD, {"chosen": "w3"}, "'rejected' is missing (null), expected text"),
    "number": (GOOD, GOOD | {"rejected": 5}, "'rejected' is a number, expected text, as in the other rows"),
    "list": (GOOD, GOOD | {"rejected": ["w3"]}, "'rejected' is a list, expected text, as in the other rows"),
    "messages": (GOOD, TALK, "'chosen' is a list, expected text, as in the other rows"),
    "text": (TALK, GOOD, "'chosen' is text, expected a list of messages, as in the other rows"),
    "surrogate": (GOOD, GOOD | {"rejected": "\ud800"}, "cannot be read: UnicodeEncodeError: .*surrogates not allowed"),
    "no object": (GOOD, ["w3", "w4"], "is not an object with keys"),
    "no message": (TALK, TALK | {"rejected": ["w3"]}, "rejected[0] is text, expected a message with role and content"),
    "margin": (GOOD | {"margin": 1}, GOOD | {"margin": "x"}, "'margin' is text, expected a number"),
}


@pytest.mark.parametrize("array", [False, True], ids=["jsonl", "json"])
@pytest.mark.parametrize("name", ROWS)
def test_row(fails, tmp_path, name, array):
    good, wrong, message = ROWS[name]
    rows = [good, good, good, wrong]
    file = "rows.json" if array else "rows.jsonl"
    (tmp_path / file).write_bytes(json.dumps(rows).encode() if array else json_lines(*rows))
    if array and name == "no object":
        message = "'chosen' is missing (null), expected text"  # to the reader of arrays it is an object without keys
    start, _, end = message.partition(".*")
    last = fails(f"--dataset_name={file}", "--eval_fraction=0.5")
    assert last.startswith(f"{file}, row 3: {start}") and end in last


def test_row_of_numbers_only(fails, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json_lines(*[{"chosen": 1, "rejected": 2}] * 3))
    last = fails("--dataset_name=rows.jsonl", "--eval_fraction=0.5")
    assert last == "rows.jsonl, row 0: 'chosen' has the type Value('int64'), expected text or messages"


def test_null_in_parquet(fails, tmp_path):
    table = pa.table({"chosen": ["rice"] * 2, "rejected": ["rinse", None]})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    last = fails("--dataset_name=rows.parquet", "--eval_fraction=0.5")
    assert last.startswith("rows.parquet, row 1: 'rejected' is missing (null), expected text")


# ---------------------------------------------------------------- files


def latin_parquet(path: Path) -> None:
    offsets = pa.array([0, 5, 6], pa.int32()).buffers()[1]
    wrong = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"rinse\xe9")])
    pa.parquet.write_table(pa.table({"chosen": ["rice", "rice"], "rejected": wrong}), path)


def comma_separated(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        csv.writer(file).writerows([("chosen", "rejected"), *(("w3", f"w{i}") for i in range(5000))])
    path.write_bytes(path.read_bytes()[:-30])


def saved(path: Path) -> None:
    datasets.Dataset.from_list([GOOD] * 4).save_to_disk(path)
    (arrow,) = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])


def folder(**files: bytes):
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)

    return write


MANY = json_lines(*({"chosen": f"rice {i}", "rejected": f"rinse {i}"} for i in range(5000)))
EMPTY = {f"{kind}{z}": (b"", f"{kind}{z}: the file is empty") for kind in ("json", "jsonl", "csv", "parquet")
         for z in ("", ".gz")}  # fmt: skip
FILES = {f"empty.{name}": (content, f"empty.{message}") for name, (content, message) in EMPTY.items()} | {
    "missing.jsonl": (None, "missing.jsonl: there is no such file or folder"),
    "pairs.txt": (b"w3", "pairs.txt: unknown extension; use .json, .jsonl, .parquet or .csv (also with .gz)"),
    "pairs.pkl": (b"\x80\x04.", "pairs.pkl: unknown extension; use .json"),
    "empty": (folder(), "empty: the folder holds no data files; use .json"),
    "other": (folder(README_md=b"hello"), "other: the folder holds no data files; use .json"),
    "no/data": (None, "no/data: no local file or folder, and the hub does not give it: ConnectionError"),
    "https://host/pairs.jsonl": (None, "https://host/pairs.jsonl: is a URL; download the file and give its path"),
    "zipped nothing.jsonl.gz": (gzip.compress(b""), "zipped nothing.jsonl.gz: cannot be read: the file is empty"),
    "plain.jsonl.gz": (MANY, "plain.jsonl.gz: cannot be read: BadGzipFile"),
    "cut.jsonl.gz": (gzip.compress(MANY)[:-30], r"cut.jsonl.gz, row \d+: cannot be read: EOFError"),
    "cut.json.gz": (gzip.compress(b"[" + MANY)[:-30], "cut.json.gz: cannot be read: EOFError"),
    "cut.csv.gz": (comma_separated, "cut.csv.gz: cannot be read: EOFError"),
    "cut.jsonl": (json_lines(GOOD) + b'{"chosen": "w3', "cut.jsonl, row 1: cannot be read: JSONDecodeError"),
    "cut.parquet": (lambda path: (latin_parquet(path), path.write_bytes(path.read_bytes()[:-9])),
                    "cut.parquet: cannot be read: ArrowInvalid: Parquet magic bytes not found"),
    "cut": (saved, "cut: cannot be read: ArrowInvalid"),
    "folder": (folder(train_jsonl=json_lines(GOOD) + b"{"), "folder/train.jsonl, row 1: cannot be read: JSONDecode"),
    "latin.jsonl": (json_lines(GOOD) + b'{"chosen": "w3", "rejected": %s}' % LATIN,
                    "latin.jsonl, row 1: 'utf-8' codec can't decode byte 0xe9 .*; write the file in UTF-8"),
    "latin.json": (b'[{"chosen": "w3", "rejected": %s}]' % LATIN,
                   "latin.json: cannot be read: UnicodeDecodeError: .*; write the file in UTF-8"),
    "latin.csv": (b"chosen,rejected\nw3,%s\n" % LATIN,
                  "latin.csv: cannot be read: UnicodeDecodeError: .*; write the file in UTF-8"),
    "latin.parquet": (latin_parquet, "latin.parquet, row 1: 'utf-8' codec can't decode .*; write the file in UTF-8"),
    "same.jsonl": (json_lines(*[GOOD | {"rejected": GOOD["chosen"]}] * 4),
                   r"same.jsonl: no pair is left of 2 \(2 identical\); raise max_length or mend the data"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_file(fails, tmp_path, name):
    content, message = FILES[name]
    if content is not None:
        content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    last = fails(f"--dataset_name={name}", "--eval_fraction=0.5")
    assert re.match(message.replace("(also", r"\(also").replace("gz)", r"gz\)"), last.replace(f"{tmp_path}/", "")), last


def test_more_pairs_asked_for_than_exist(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(json_lines(*({"chosen": "rice", "rejected": f"rice {i}"} for i in range(8))))
    reset_accelerate()
    data = ["--dataset_name=pairs.jsonl", "--eval_dataset_name=pairs.jsonl", "--max_train_samples=99"]
    monkeypatch.setattr(sys, "argv", ["train_rm.py", *SMALL, "--max_steps=1", "--output_dir=out", *data])
    assert train_rm.run() == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "pairs.jsonl: 99 pairs asked for, 8 exist; using all" in warnings
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["train"]["total"] == 8


# ---------------------------------------------------------------- several data sets

LENGTH = "give a list with one for each of the 2 data sets"
SEVERAL = {
    "too few weights": (["--dataset_weights=[1]"], f"dataset_weights=[1.0]: {LENGTH}"),
    "too many weights": (["--dataset_weights", "1", "2", "3"], f"dataset_weights=[1.0, 2.0, 3.0]: {LENGTH}"),
    "zero": (["--dataset_weights=[1, 0]"], "dataset_weights=[1.0, 0.0]: 0 must be greater than 0 and at most 100"),
    "negative": (["--dataset_weights=[-1, 1]"], "dataset_weights=[-1.0, 1.0]: -1 must be greater than 0 and at most"),
    "huge": (["--dataset_weights=[1, 1e9]"], "dataset_weights=[1.0, 1000000000.0]: 1e+09 must be greater than 0 and"),
    "nan": (["--dataset_weights=[1, NaN]"], "dataset_weights=[1.0, nan]: nan must be greater than 0 and at most 100"),
    "no number": (["--dataset_weights=[1, 'x']"], "command line: dataset_weights=[1, 'x'] does not fit; expected list"),
    "one number": (["--dataset_weights=0.5"], "command line: dataset_weights='0.5' does not fit; expected list"),
    "empty": (["--dataset_name=[]"], "dataset_name=[]: names no data set"),
    "an empty name": (["--dataset_name=['a.jsonl', '']"], "dataset_name=['a.jsonl', '']: names no data set"),
    "no evaluation set": (["--eval_dataset_name={}"], "eval_dataset_name={}: names no data set"),
    "a list without quotes": (["--dataset_name=[a.jsonl, b.jsonl]"], "dataset_name='[a.jsonl, b.jsonl]': is no list"),
    "one configuration": (["--dataset_config=x"], f"dataset_config='x': {LENGTH}, null for one without"),
    "three configurations": (["--dataset_config=['x', 'y', 'z']"], f"dataset_config=['x', 'y', 'z']: {LENGTH}, null"),
    "a configuration of nothing": (["--eval_dataset_config=x"], "eval_dataset_config='x': does nothing without eval_"),
    "twice": (["--dataset_name=['a.jsonl', 'a.jsonl']"], "dataset_name: a.jsonl is given twice; use dataset_weights"),
    "evaluated twice": (["--eval_dataset_name", "a.jsonl", "a.jsonl"], "eval_dataset_name: a.jsonl is given twice; g"),
    "a name with a slash": (["--eval_dataset_name={'a/b': 'a.jsonl', 'c': 'b.jsonl'}"], "eval_dataset_name: 'a/b' is"),
    "a metric's name": (["--eval_dataset_name={'loss': 'a.jsonl', 'c': 'b.jsonl'}"], "eval_dataset_name: a set cannot"),
    "unknown": (["--dataset_name=['a.jsonl', 'c.jsonl']"], "c.jsonl: there is no such file or folder"),
    "unknown on the hub": (["--dataset_name=['a.jsonl', 'no/data']"], "no/data: no local file or folder, and the hub"),
    "unknown evaluation set": (["--eval_dataset_name=['a.jsonl', 'd.jsonl']"], "d.jsonl: there is no such file or"),
    "a small weight": (["--dataset_weights=[1, 0.01]"], "b.jsonl: dataset_weights=0.01 draws none of 4 pairs"),
    "a metric of no set": (["--metric_for_best_model=eval/c/accuracy", "--eval_steps=1"],
                           "metric_for_best_model=eval/c/accuracy: no such metric; the nearest of "),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_data_sets(fails, tmp_path, name):
    options, message = SEVERAL[name]
    for file in ("a.jsonl", "b.jsonl"):
        (tmp_path / file).write_bytes(json_lines(*[GOOD] * 4))
    data = ["--dataset_name=['a.jsonl', 'b.jsonl']", "--eval_dataset_name=['a.jsonl', 'b.jsonl']"]
    if name == "a configuration of nothing":
        data[1] = "--eval_fraction=0.5"
    last = fails(*data, *options)
    assert last.startswith(message), last


def test_a_wrong_row_of_several_data_sets(fails, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*[GOOD] * 4))
    (tmp_path / "b.jsonl").write_bytes(json_lines(TALK, TALK | {"rejected": None}))
    last = fails("--dataset_name=['a.jsonl', 'b.jsonl']", "--eval_dataset_name=a.jsonl")
    assert last.startswith("b.jsonl, row 1: 'rejected' is missing (null)")


# ---------------------------------------------------------------- configs

CONFIGS = {
    "unknown": (b"sed: 1\n", "c.yaml: unknown key 'sed'; did you mean seed?"),
    "duplicate": (b"seed: 1\nseed: 2\n", "c.yaml: line 2: key 'seed' is given twice"),
    "wrong type": (b"seed: abc\n", "c.yaml: seed='abc' does not fit; expected int"),
    "contradictory": (b"lora_r: 8\n", "lora_r=8: does nothing while use_peft is false"),
    "latin": (b"run_name: %s\n" % LATIN, "c.yaml: 'utf-8' codec can't decode byte 0xe9"),
    "no YAML": (b"a: [\n", "c.yaml: while parsing a flow"),
    "tag": (b"run_name: !!python/object/apply:os.getcwd []\n", "c.yaml: could not determine a constructor for the tag"),
    "list": (b"- a\n", "c.yaml: expected `key: value` lines"),
    "key": (b"{[a]: 1}\n", "c.yaml: "),
    "circle": (b"chat_template_kwargs: &a {x: *a}\n", "c.yaml: "),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(fails, tmp_path, name):
    content, message = CONFIGS[name]
    (tmp_path / "c.yaml").write_bytes(content)
    assert fails("--config=c.yaml").startswith(message)


def test_missing_config_and_wrong_command_line(fails):
    assert fails("--config=none.yaml") == "none.yaml: cannot be read (No such file or directory)"
    assert fails("--seed=abc") == "command line: seed='abc' does not fit; expected int"
    assert fails("--learning_rat=1").endswith("unknown key 'learning_rat'; did you mean learning_rate?")
    assert fails("--train_batch_size=8", "--per_device_train_batch_size=8").endswith("is given too; give one of them")


# ---------------------------------------------------------------- models


def put(name: str, content: bytes | None):
    return lambda path: (path / name).unlink() if content is None else (path / name).write_bytes(content)


def no_tokenizer(path: Path) -> None:
    for file in path.glob("token*"):
        file.unlink()


def change(**values):
    def write(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return write


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


TOKENIZER, LOADED = "no tokenizer could be loaded from 'model': ", "'model' could not be loaded as a reward model: "
BROKEN = LOADED + "its safetensors file is broken, download it again"
MODELS = {  # what is done to a copy of the base model: the message
    "config is cut": (put("config.json", b'{"a": '), TOKENIZER + "config.json cannot be read: Expecting value"),
    "config is no object": (put("config.json", b"[1]"), TOKENIZER + "config.json is not a JSON object"),
    "config is latin": (put("config.json", b'{"a": %s}' % LATIN), TOKENIZER + "config.json cannot be read: 'utf-8'"),
    "no config": (put("config.json", None), "no model could be loaded from 'model': the folder has no config.json"),
    "wrong type": (change(num_attention_heads="four"), TOKENIZER + ".*'num_attention_heads' expected int"),
    "wrong value": (change(num_attention_heads=0), TOKENIZER + "ZeroDivisionError"),
    "wrong name": (change(hidden_act="sine"), LOADED + "KeyError: 'sine'"),
    "unknown kind": (change(model_type="new"), "no model could be loaded from 'model': .*does not recognize this"),
    "other shape": (change(hidden_size=64), LOADED + "its weights have other shapes than its config.json says"),
    "weights are cut": (cut, BROKEN),
    "weights are noise": (put("model.safetensors", b"\xff" * 5000), BROKEN),
    "weights are empty": (put("model.safetensors", b""), BROKEN),
    "no tokenizer": (no_tokenizer, TOKENIZER + "the folder has no tokenizer files; copy those of the base model"),
    "tokenizer is cut": (put("tokenizer.json", b"{"), TOKENIZER + "tokenizer.json cannot be read: Expecting property"),
    "tokenizer is empty": (put("tokenizer.json", b"{}"), TOKENIZER + "KeyError"),
    "tokenizer is latin": (put("tokenizer.json", b'{"a": %s}' % LATIN), TOKENIZER + "tokenizer.json cannot be read:"),
    "its config is a list": (put("tokenizer_config.json", b"[1]"), TOKENIZER + "tokenizer_config.json is not a JSON"),
    "missing": (shutil.rmtree, "'model': there is no such folder; give a model's folder or its name on the hub"),
}


@pytest.fixture
def model(models, tmp_path, monkeypatch):
    """model(name, spoil) → options with a copy of that model, spoiled, and with pairs that it can read."""
    (tmp_path / "pairs.jsonl").write_bytes(json_lines(*WORDS))

    def make(name: str, spoil=lambda path: None) -> list[str]:
        shutil.copytree(models / name, tmp_path / "model")
        spoil(tmp_path / "model")
        return [f"--model_name_or_path={tmp_path / 'model'}", "--dataset_name=pairs.jsonl", "--eval_fraction=0.5"]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_model(fails, model, tmp_path, name):
    spoil, message = MODELS[name]
    last = fails(*model("base", spoil))
    assert re.match(message, last.replace(f"{tmp_path}/", "")), last


@pytest.mark.parametrize("name", ["config is cut", "weights are cut", "no tokenizer", "missing"])
def test_trained_model(fails, model, tmp_path, name):
    spoil, message = MODELS[name]
    last = fails(f"--model={model('reward', spoil)[0].split('=')[1]}", "dataset_name=pairs.jsonl", module="rm.evaluate")
    assert re.match(message, last.replace(f"{tmp_path}/", "")), last


def test_number_of_labels(fails, model):
    assert fails(*model("two_labels")).endswith("model' is a classifier with 2 labels; a reward model has 1")


@pytest.mark.parametrize("name", ["base", "two_labels"])
def test_model_without_a_trained_head(fails, model, name):
    path = model(name)[0].split("=")[1]
    last = fails(f"--model={path}", "dataset_name=pairs.jsonl", module="rm.evaluate")
    assert last == f"'{path}' is not a trained reward model: it has no head with one output"


def test_model_without_pad_token_is_trained_with_one_of_its_own(model, tmp_path, monkeypatch, capsys):
    """Not an error: a pad token is added, and saved with the model."""
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    options = [*SMALL, *model("base"), "--max_train_samples=none", "--max_eval_samples=none", "--max_steps=1"]
    monkeypatch.setattr(sys, "argv", ["train_rm.py", *options, "--output_dir=out"])
    assert train_rm.run() == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == "<|reward_pad|>"


def test_chat_template_file(fails, model, tmp_path):
    options = model("base")
    (tmp_path / "t.jinja").write_bytes(b"{{ %s }}" % LATIN)
    last = fails(*options, "--chat_template_path=t.jinja")
    assert last.startswith("chat_template_path='t.jinja' cannot be read: 'utf-8' codec") and last.endswith("in UTF-8")
    last = fails(*options, "--chat_template_path=none.jinja")
    assert last == "chat_template_path='none.jinja' is neither a Jinja file nor a tokenizer with a chat template"
    (tmp_path / "t.jinja").write_text("{% for m in messages %}")
    (tmp_path / "pairs.jsonl").write_bytes(json_lines(*[TALK] * 4))
    last = fails(*options, "--chat_template_path=t.jinja")
    assert last.startswith("pairs.jsonl, row 0: the chat template refuses the messages: TemplateSyntaxError")
