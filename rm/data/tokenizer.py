"""The tokenizer of a model, and where its files are: a folder or a name on the hub, perhaps of an adapter."""

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from rm.config.errors import InputError
from rm.config.options import RewardConfig

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|reward_pad|>"
PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


def load_tokenizer(config: RewardConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model_name_or_path` (or of its base), padding on the right with a token that is not EOS.

    With pad == EOS, transformers' pooling would score a sequence one token early. Raises `InputError`.
    """
    name, revision = config.model_name_or_path, config.model_revision
    check_folder(name)
    if lacks(name, *TOKENIZER_FILES):
        name, revision, _ = find_base(name, revision)
    if lacks(name, *TOKENIZER_FILES):
        raise InputError(f"'{name}': the folder has no tokenizer files; copy those of the base model into it")
    with loading(f"no tokenizer could be loaded from '{name}'"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
        free = [t for t in PAD_CANDIDATES if t in special and t not in (tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.add_special_tokens({"pad_token": free[0] if free else PAD_TOKEN})
        logger.info(f"pad token: {tokenizer.pad_token!r} ({'of the vocabulary' if free else 'added'}; never EOS)")
    if (path := config.chat_template_path) is not None:
        with loading(f"chat_template_path='{path}' is neither a Jinja file nor a tokenizer"):
            if Path(path).is_file():
                template = Path(path).read_text(encoding="utf-8")
            else:
                template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        if template is None:
            raise InputError(f"chat_template_path='{path}': this tokenizer has no chat template")
        tokenizer.chat_template = template
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if Path(template).name != template:  # it becomes a file name when the tokenizer is saved
            raise InputError(f"'{name}': its chat template {template!r} has a path for a name; set chat_template_path")
    return tokenizer


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
    if not base or adapter.get("task_type") != "SEQ_CLS":
        needs = "its adapter_config.json needs task_type SEQ_CLS and base_model_name_or_path"
        raise InputError(f"'{name}' is an adapter without a reward head or without a base: {needs}")
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
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if isinstance(error, SafetensorError):
            reason = f"its safetensors file is broken, download it again ({reason})"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "its weights are a pickle that is more than tensors, and was not run; weights must be safetensors"
        elif "Unrecognized configuration class" in str(error):
            kind = str(error).partition("'")[2].partition("'")[0].rpartition(".")[2].removesuffix("Config")
            reason = f"transformers has no sequence classifier for the architecture {kind}; give another model"
        elif "does not recognize this architecture" in str(error):
            kind = str(error).partition("`")[2].partition("`")[0]
            reason = f"the installed transformers does not know the architecture {kind}; update it"
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its own, which was not run; read it, then allow it with trust_remote_code=true"
        raise InputError(f"{message}: {reason}") from error
