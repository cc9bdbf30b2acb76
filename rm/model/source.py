"""Where a model comes from: a folder or a hub name, an adapter or a whole model; one line for what is wrong with it."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import find_adapter_config_file

from rm.config.errors import InputError

TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


def check_folder(name: str) -> None:
    """Raise `InputError` if `name` can only be a folder and does not exist; the hub would complain about its form."""
    is_path = Path(name).is_absolute() or name.startswith((".", "runs/")) or name.count("/") > 1 or Path(name).is_file()
    if is_path and not Path(name).is_dir():
        raise InputError(f"'{name}': there is no such folder; give a model's folder or its name on the hub")


def find_base(name: str, revision: str = "main") -> tuple[str, str, dict[str, Any] | None]:
    """(base model, its revision, adapter_config.json) of an adapter; (name, revision, None) of a whole model."""
    check_folder(name)
    with loading(f"no model could be loaded from '{name}'"):
        if (file := find_adapter_config_file(name, revision=revision)) is None:
            return name, revision, None
        adapter = json.loads(Path(file).read_text(encoding="utf-8"))
        base, base_revision = adapter.get("base_model_name_or_path"), adapter.get("revision") or "main"
    if not base:
        raise InputError(f"'{name}' is an adapter without base_model_name_or_path; set it in adapter_config.json")
    check_folder(base)
    return base, base_revision, adapter


def lacks(name: str, *patterns: str) -> bool:
    """Whether `name` is a folder without files that match `patterns`."""
    return Path(name).is_dir() and not any(list(Path(name).glob(pattern)) for pattern in patterns)


@contextmanager
def loading(message: str) -> Iterator[None]:
    """Turn an error of a library that reads files of the user into `InputError`: "message: reason", one line.

    A damaged file makes the libraries raise almost any exception: only their calls belong into the block.
    """
    try:
        yield
    except Exception as error:
        reason = in_one_line(error)
        if isinstance(error, SafetensorError):
            reason = f"its safetensors file is broken, download it again ({reason})"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "its weights are a pickle that is more than tensors, and was not run; weights must be safetensors"
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its own, which was not run; read it, then allow it with trust_remote_code=true"
        elif "Unrecognized configuration class" in str(error):
            reason = "transformers has no sequence classifier of this architecture"
        raise InputError(f"{message}: {reason}") from error


def in_one_line(error: Exception) -> str:
    """Type and message of `error`, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
