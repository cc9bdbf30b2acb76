"""Folders that are damaged, incomplete or of another kind: one line with the reason."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_classifier, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny import base, load, options

from rm.config.errors import InputError
from rm.data.tokenizer import load_tokenizer
from rm.model.load import load_saved_model

WEIGHTS = "model.safetensors"
LATIN = '"\u00e9"'.encode("latin-1")  # a letter whose byte is not UTF-8


def put(name: str, content: bytes):
    return lambda path: (path / name).write_bytes(content)


def remove(*patterns: str):
    return lambda path: [file.unlink() for pattern in patterns for file in path.glob(pattern)]


def change(**values):
    def write(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return write


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


TOKENIZER, LOADED = "no tokenizer could be loaded from 'model': ", "'model' could not be loaded as a reward model: "
NO_JSON = TOKENIZER + ".*config.json' is not a valid JSON file"
BROKEN = LOADED + "its safetensors file is broken, download it again"
MODELS = {  # what is done to a copy of the base model: the message
    "config is cut": (put("config.json", b'{"a": '), NO_JSON),
    "config is no object": (put("config.json", b"[1]"), TOKENIZER + "TypeError: .* must be a mapping, not list"),
    "config is latin": (put("config.json", b'{"a": %s}' % LATIN), NO_JSON),
    "no config": (remove("config.json"), LOADED + ".*in its config.json"),
    "wrong type": (change(num_attention_heads="four"), TOKENIZER + ".*'num_attention_heads' expected int"),
    "wrong value": (change(num_attention_heads=0), TOKENIZER + "ZeroDivisionError"),
    "wrong name": (change(hidden_act="sine"), LOADED + "KeyError: 'sine'"),
    "unknown kind": (change(model_type="new"), LOADED + ".*does not know the architecture new"),
    "other shape": (change(hidden_size=64), LOADED + r"model.embed_tokens.weight has the shape \[64, 32\]; "),
    "weights are cut": (cut, BROKEN),
    "weights are noise": (put("model.safetensors", b"\xff" * 5000), BROKEN),
    "weights are empty": (put("model.safetensors", b""), BROKEN),
    "no tokenizer": (remove("token*"), "'model': the folder has no tokenizer files; copy those of the base"),
    "tokenizer is cut": (put("tokenizer.json", b"{"), TOKENIZER + "JSONDecodeError: Expecting property"),
    "tokenizer is empty": (put("tokenizer.json", b"{}"), TOKENIZER + "KeyError"),
    "tokenizer is latin": (put("tokenizer.json", b'{"a": %s}' % LATIN), TOKENIZER + "UnicodeDecodeError: "),
    "its config is a list": (put("tokenizer_config.json", b"[1]"), TOKENIZER + "AttributeError: 'list'"),
    "missing": (shutil.rmtree, "'model': there is no such folder; give a model's folder or its name on the hub"),
}  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    """model(spoil, folder) → the name of a spoiled copy."""
    monkeypatch.chdir(tmp_path)

    def make(spoil, folder: str | None = None) -> str:
        shutil.copytree(folder or base(), tmp_path / "model")
        spoil(tmp_path / "model")
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize("name", MODELS)
def test_model(model, tmp_path, name):
    spoil, message = MODELS[name]
    path = model(spoil)
    with pytest.raises(InputError) as error:
        load(path)
    text = str(error.value).replace(f"{tmp_path}/", "")
    assert re.match(message, text) and "\n" not in text and len(text) < 500, text


def test_saved_model(model, tmp_path):
    def load_saved(path: str):
        return load_saved_model(path, load_tokenizer(options(path)), options(path))

    for labels in (1, 2):
        tiny_classifier("llama", num_labels=labels).save_pretrained(tmp_path / f"{labels}")
        tiny_tokenizer().save_pretrained(tmp_path / f"{labels}")
    load_saved(str(tmp_path / "1"))
    with pytest.raises(InputError, match=r"score.weight has the shape \[2, 32\]; .* \[1, 32\].* num_labels=2: "):
        load_saved(str(tmp_path / "2"))
    with pytest.raises(InputError, match="is not a trained reward model: it lacks score.weight"):
        load_saved(base())
    for name in ("config is cut", "weights are cut", "no tokenizer", "missing"):
        spoil, message = MODELS[name]
        with pytest.raises(InputError, match=message.replace("'model'", "'.*/model'")):
            load_saved(model(spoil, str(tmp_path / "1")))
        shutil.rmtree(tmp_path / "model", ignore_errors=True)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight"])
def test_a_head_of_another_form_is_named(model, caplog, name):
    path = model(lambda path: save_file(load_file(path / WEIGHTS) | {name: torch.zeros(1, 32)}, path / WEIGHTS))
    load(path)
    with pytest.raises(InputError, match="is not a trained reward model: it lacks score.weight"):
        load_saved_model(path, load_tokenizer(options(path)), options(path))
    assert caplog.text.count(f"'{path}': its head is of another form and is not used: {name}") == 2


def test_a_head_of_one_row_needs_no_num_labels(model, tmp_path):
    tiny_classifier("llama", num_labels=1).save_pretrained(tmp_path / "one")
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    without = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    path = model(put("config.json", json.dumps(without).encode()), str(tmp_path / "one"))
    load_saved_model(path, load_tokenizer(options(path)), options(path))


def test_chat_template_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_bytes(b"{{ %s }}" % LATIN)
    for name, problem in (("t.jinja", "UnicodeDecodeError: "), ("none.jinja", "OSError: ")):
        message = f"^chat_template_path='{name}' is neither a Jinja file nor a tokenizer: {problem}"
        with pytest.raises(InputError, match=message):
            load_tokenizer(options(base(), chat_template_path=name))
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert load_tokenizer(options(base(), chat_template_path="t.jinja")).chat_template == "{{ messages }}"
