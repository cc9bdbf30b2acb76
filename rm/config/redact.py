"""Remove secrets from configs, command lines and texts before they are written, shown or uploaded."""

import ast
import json
import re
from typing import Any

HIDDEN = "[redacted]"
SECRET_NAMES = {"token", "key", "apikey", "secret", "password", "passwd", "passphrase", "credential", "credentials"}
TOKEN_KINDS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image"}  # eos_token is not a secret
COMMIT_NAMES = {"revision", "commit", "sha", "hash", "fingerprint"}  # their values look like an old W&B key
OLD_WANDB_KEY = r"\b[0-9a-f]{40}\b"
SECRET_VALUES = r"\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_\w{20,}|(?<=://)[^/\s'\"]+(?=@)"  # the last: user:password@


def redact(value: Any, name: str = "") -> Any:
    """A copy of `value` without secrets, at any depth; `name` is the name of the value.

    Hides texts and collections whose name has a word such as token, key, secret or password (`hub_token`, `apiKey`; not
    `eos_token`, not `micro_batch_tokens`). In every text, hides hub tokens, W&B keys and `user:password@`.
    """
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    is_secret = words & SECRET_NAMES and not ("token" in words and words & TOKEN_KINDS)
    if is_secret and value and isinstance(value, (str, dict, list, tuple)):
        return HIDDEN
    if isinstance(value, dict):
        return {redact(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        value = re.sub(SECRET_VALUES, HIDDEN, value)
        return value if words & COMMIT_NAMES else re.sub(OLD_WANDB_KEY, HIDDEN, value)
    return value


def redact_arguments(argv: list[str]) -> list[str]:
    """A command line without secrets in `--key=value`, `key=value` and `--key value`, also inside dicts and lists."""
    hidden, name = [], ""
    for argument in argv:
        is_option = argument.startswith("--")  # otherwise it may be the value of the option before it
        key, equals, value = (argument if is_option else _redact_argument(argument, name)).partition("=")
        name = key if is_option else name
        hidden.append(redact(key) + equals + _redact_argument(value, key))
    return hidden


def _redact_argument(text: str, name: str) -> str:
    value = read_literal(text)
    if isinstance(value, (dict, list)) and (hidden := redact(value, name)) != value:
        return str(hidden)
    return redact(text, name)


def read_literal(text: str) -> Any:
    """Parse JSON ("true") or a Python literal ("True"); return other texts unchanged. Tuples become lists."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(value) if isinstance(value, tuple) else value
    return text


def safe_line(message: str) -> str:
    """`message` for a terminal: one line without secrets, and without characters that move the cursor or set colors."""
    return redact("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))
