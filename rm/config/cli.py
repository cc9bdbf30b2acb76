"""The command line and YAML files to a `RewardConfig` (default < YAML < command line), and the help page."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rm.config.errors import InputError
from rm.config.options import TINY_LLAMA, RewardConfig
from rm.config.redact import HIDDEN, redact
from rm.config.trl_names import answer

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"

# ---------------------------------------------------------------------------------------------- values


def _coerce(key: str, value: Any, where: str) -> Any:
    """`value` (from YAML or the command line) as the type of field `key`; `InputError` if it does not fit."""
    hint = get_type_hints(RewardConfig)[key]
    if isinstance(value, str) and value[:1] in ("[", "{", "("):
        value = _literal(value)
    if (
        isinstance(value, str) and "dict[" in str(hint) and "=" in value
    ):  # name=value,name=value, as for optim_args in TRL
        pairs = [pair.partition("=") for pair in re.split(r",(?![^(\[]*[)\]])", value)]
        value = {name.strip(): _literal(text.strip()) for name, _, text in pairs}
    accepts, choices = _alternatives(hint), _choices(hint)
    if value is False and "no" in choices:  # YAML reads a bare `no` as false
        value = "no"
    if hint == list[str] and (value is None or value in ("", "none")):
        return []
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in accepts:
        return None
    if isinstance(value, str) and list[str] in accepts and str not in accepts:
        value = [part.strip() for part in value.split(",")]
    is_number = not isinstance(value, bool) or bool in accepts
    try:
        if not is_number and choices == []:
            raise TypeError
        value = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise TypeError
    except (ValidationError, TypeError):
        wanted = ", ".join(map(str, choices)) if choices else str(getattr(hint, "__name__", hint))
        raise InputError(f"{where}: {key}={redact(value, key)!r} does not fit; expected {wanted}") from None
    return value


def _alternatives(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    """The values that a `Literal` type, or one among others, allows."""
    return [choice for a in _alternatives(hint) if get_origin(a) is Literal for choice in get_args(a)]


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # "true" is JSON, "True" is Python
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _check_key(key: str, where: str) -> str:
    names = [f.name for f in dataclasses.fields(RewardConfig)]
    if key not in names and (elsewhere := answer(key)):
        raise InputError(f"{where}: '{key}' is TRL's name; here: {elsewhere}")
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see --help for all keys"
        raise InputError(f"{where}: unknown key '{key}'{hint}")
    return key


# ---------------------------------------------------------------------------------------------- YAML


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this loader refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise InputError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """The typed options of one YAML file; `InputError` names the file and key of what is wrong."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
        json.dumps(values, default=str)  # raises ValueError for an alias that stands inside of what it names
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # TypeError: a key that is a list
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    return {k: _coerce(_check_key(str(k), path), v, path) for k, v in (values or {}).items()}


# ---------------------------------------------------------------------------------------------- command line


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """`--k=v`, `--k v`, `k=v`, bare `--flag`, `--list a b` → (YAML files, typed options)."""
    files, values, where = [], {}, "command line"
    hints = get_type_hints(RewardConfig)
    rest = list(argv)

    def starts_option(token: str) -> bool:
        return token.startswith("--") or token.split("=")[0].replace("-", "_") in hints and "=" in token

    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not token.startswith("--") and not equals:
            raise InputError(f"{where}: '{token}' is not an option; write --key=value or key=value")
        if key != "config":
            _check_key(key, where)
        if not equals:
            taken = []
            many = key in hints and ("list[" in str(hints[key]))
            while rest and not starts_option(rest[0]) and (many or not taken):
                if hints.get(key) is bool and rest[0].lower() not in ("true", "false"):
                    break
                taken.append(rest.pop(0))
            if not taken and hints.get(key) is not bool:
                raise InputError(f"{where}: --{key} needs a value")
            value = True if not taken else taken[0] if len(taken) == 1 else taken
        if key == "config":
            files.append(value)
        else:
            values[key] = _coerce(key, value, where)
    return files, values


def take_option(argv: list[str], name: str, is_flag: bool = False) -> tuple[Any, list[str]]:
    """The value (None: not given) of an option that is none of `RewardConfig`'s, and the command line without it.

    `--name=v`, `--name v`, `name=v`; a flag (true or false) may stand alone.
    """
    rest, value = list(argv), None
    while (place := next((i for i, token in enumerate(rest) if _names(token, name)), None)) is not None:
        _, equals, value = rest.pop(place).partition("=")
        has_value = place < len(rest) and not rest[place].startswith("--")
        has_value = has_value and (not is_flag or rest[place].lower() in ("true", "false"))
        if not equals and not has_value and not is_flag:
            raise InputError(f"command line: --{name} needs a value")
        if not equals:
            value = rest.pop(place) if has_value else "true"
    if not is_flag or value is None:
        return value, rest
    if value.lower() not in ("true", "false"):
        raise InputError(f"command line: {name}={value!r} does not fit; expected true or false")
    return value.lower() == "true", rest


def _names(token: str, name: str) -> bool:
    key, equals, _ = token.removeprefix("--").partition("=")
    return key.replace("-", "_") == name and bool(equals or token.startswith("--"))


def parse_config(argv: list[str]) -> RewardConfig:
    """The configuration of a command line.

    `--config FILE` may be given several times, the last one wins key by key. Without any, and with neither a model nor
    a data set named, the quickstart's file is used. Raises `InputError`; `--help` prints the options and exits.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text())
        raise SystemExit(0)
    files, values = split_arguments(argv)
    if not files and not {"model_name_or_path", "dataset_name"} & set(values):
        files = [str(QUICKSTART)]
    merged: dict[str, Any] = {}
    for file in files:
        merged |= read_yaml(file)
    merged |= values
    for key, value in merged.items():
        if HIDDEN in str(value):
            raise InputError(f"{key}: a secret in it was hidden when the config was written; give it again")
    for key, other in (("dataset_name", "model_name_or_path"), ("model_name_or_path", "dataset_name")):
        if merged.get(key, getattr(RewardConfig, key)) != getattr(RewardConfig, key) and other not in merged:
            raise InputError(
                f"{other} is not given, but {key} is; without it {getattr(RewardConfig, other)} would be used"
            )
    if merged.get("model_name_or_path", TINY_LLAMA) == TINY_LLAMA and not Path(TINY_LLAMA).exists():
        merged["model_name_or_path"] = str(QUICKSTART.parent / "tiny_llama")  # started from another folder
    return RewardConfig(**merged)


def help_text() -> str:
    """Every option in sections, one line each."""
    lines = [
        "usage: accelerate launch train_rm.py [--config FILE.yaml ...] [--key=value | --key value | key=value ...]",
        "",
        "Train a reward model. Precedence: default < --config files < command line. Without arguments: the quickstart.",
    ]
    hints = get_type_hints(RewardConfig)
    for f in dataclasses.fields(RewardConfig):
        if f.metadata["section"]:
            lines += ["", f.metadata["section"]]
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = "none" if default is None or default == [] else yaml.safe_dump(default).split("\n")[0]
        choices = _choices(hints[f.name])
        values = f" [{', '.join(choices)}]" if choices else ""
        lines.append(f"  --{f.name}={shown}  {f.metadata['help']}{values}")
    return "\n".join(lines)
