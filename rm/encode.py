"""Raw rows to tokens, batch by batch: check, render with the chat template, encode, cut to length.

All of it runs in the workers of a `datasets` map, so a wrong row raises `RowError`, which survives the way back.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features

from rm.audit import EMPTY, IDENTICAL, KEPT, OVER_LENGTH
from rm.load import one_line
from rm.shared_start import encode_pairs

SIDES = ("chosen", "rejected")
TEMPLATE_ERRORS = (jinja2.TemplateError, AttributeError, KeyError, TypeError, ValueError)


class RowError(Exception):
    """A wrong row: its number in the data set that is mapped, and what is wrong with it."""

    def __init__(self, row: int, problem: str):
        super().__init__(row, problem)  # both as args, or unpickling fails and the main process waits for ever
        self.row, self.problem = row, problem


@dataclass(frozen=True)
class Recipe:
    """All that decides, besides the row and the tokenizer, what a row's tokens are: the cache key is made of it."""

    format: str
    columns: dict[str, str]  # what it is -> the column that holds it
    numbers: tuple[str, ...]  # numeric columns
    add_eos: bool
    max_length: int | None
    overlength: str
    chat_template_kwargs: dict[str, Any]
    vocab_size: int
    share_prefix: bool  # `can_share_prefix(tokenizer)`


def encode_batch(batch, rows: list[int], *, tokenizer, recipe: Recipe, features: Features) -> pa.Table:
    """A table of `features` with one row for each row of `batch`, whose numbers are `rows`. Raises `RowError`."""
    numbers = {name: _numbers(batch, name, rows) for name in recipe.numbers}
    if recipe.format == "tokenized":
        chosen, rejected = (_stored_ids(batch, rows, side, recipe) for side in SIDES)
        blank = [False] * len(rows)
    else:
        is_text = recipe.format.startswith("text")
        texts, blank = _texts(batch, rows, recipe) if is_text else _rendered(batch, rows, tokenizer, recipe)
        chosen, rejected = _encode(texts, rows, tokenizer, recipe)

    out = {name: [] for name in features}
    for pair in zip(chosen, rejected, blank, strict=True):
        status, truncated, *ids = _judge(*pair, recipe, tokenizer.bos_token_id)
        out["status"].append(status)
        out["truncated"].append(truncated)
        out["prefix_length"].append(shared_prefix_length(*ids))
        for side, values in zip(SIDES, ids, strict=True):
            out[f"input_ids_{side}"].append(values)
            out[f"length_{side}"].append(len(values))
            out[f"hash_{side}"].append(_hash(values))
    for side in SIDES:
        out[f"input_ids_{side}"] = _list_array(out[f"input_ids_{side}"])
    out["row"] = rows
    out["id"] = _labels(batch, "id", rows) if "id" in batch else [str(row) for row in rows]
    if "subset" in features:
        out["subset"] = _labels(batch, "subset", rows)
    if "true_margin" in features:
        out["true_margin"] = numbers["true_margin"]
    if "score_chosen" in numbers:
        out["margin"] = (numbers["score_chosen"] - numbers["score_rejected"]).astype(np.float32)
    else:
        out["margin"] = numbers.get("margin", np.zeros(len(rows))).astype(np.float32)
    return pa.table(out, schema=features.arrow_schema)


# ---------------------------------------------------------------- what happens to a pair


def _judge(chosen: np.ndarray, rejected: np.ndarray, blank: bool, recipe: Recipe, bos: int | None) -> tuple:
    """(status, truncated, chosen ids, rejected ids); a pair that is not kept has no ids: it is only counted."""
    status, truncated = KEPT, False
    longest = max(len(chosen), len(rejected))
    if blank or not len(chosen) or not len(rejected):
        status = EMPTY
    elif np.array_equal(chosen, rejected):
        status = IDENTICAL
    elif longest > (recipe.max_length or math.inf) and recipe.overlength == "drop":
        status = OVER_LENGTH
    elif longest > (recipe.max_length or math.inf):
        truncated = True
        chosen, rejected = truncate_left(chosen, rejected, recipe.max_length, bos)
        status = IDENTICAL if np.array_equal(chosen, rejected) else KEPT
    if status != KEPT:
        chosen = rejected = np.zeros(0, np.int32)
    return status, truncated, chosen, rejected


def shared_prefix_length(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Number of equal leading tokens, at most so many that each side keeps one token of its own."""
    limit = max(min(len(chosen), len(rejected)) - 1, 0)
    differ = chosen[:limit] != rejected[:limit]
    return int(differ.argmax()) if differ.any() else limit


def truncate_left(chosen: np.ndarray, rejected: np.ndarray, max_length: int, bos: int | None) -> tuple:
    """Both sides at most `max_length` tokens long, cut at the start, so that the answers stay.

    The same number of tokens of the shared prefix goes from both, enough for the longer side: what is left of the
    prompt is the same for both. Only where the prefix is used up, a side whose answer is still too long keeps its last
    tokens. A BOS that both sides start with stays in front, since models lean on it.
    """
    keep = int(bos is not None and max_length > 1 and chosen[0] == bos and rejected[0] == bos)
    spare = max(shared_prefix_length(chosen, rejected) - keep, 0)
    start = keep + min(spare, max(len(chosen), len(rejected)) - max_length)
    return tuple(np.concatenate([ids[:keep], ids[start:][keep - max_length :]]) for ids in (chosen, rejected))


def _hash(ids: np.ndarray) -> int:
    """A signed 64-bit hash of int32 token ids, the same on every machine."""
    return xxhash.xxh64_intdigest(ids.astype("<i4", copy=False).tobytes()) - (1 << 63)


def _list_array(sequences: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(sequences))


# ---------------------------------------------------------------- checked columns


def _values(batch, column: str) -> list:
    values = batch[column]
    return values.to_pylist() if isinstance(values, pa.ChunkedArray) else values


def describe(value: Any) -> str:
    """What a person would call the type of a JSON value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {type(None): "missing (null)", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"a {type(value).__name__}")


def _expect(values: list, kinds: tuple[type, ...], column: str, rows: list[int], expected: str) -> list:
    """`values`; raises `RowError` for the first that is not of one of the types."""
    for row, value in zip(rows, values, strict=True):
        if type(value) not in kinds:
            raise RowError(row, f"{column!r} is {describe(value)}, expected {expected}")
    return values


def _numbers(batch, column: str, rows: list[int]) -> np.ndarray:
    values = np.array(_expect(_values(batch, column), (int, float), column, rows, "a number"), dtype=np.float64)
    if not (good := np.abs(values) <= np.finfo(np.float32).max).all():
        bad = int(good.argmin())
        raise RowError(rows[bad], f"{column!r} is {values[bad]}, expected a finite number")
    return values


def _labels(batch, column: str, rows: list[int]) -> list[str]:
    return [str(value) for value in _expect(_values(batch, column), (str, int), column, rows, "text or a number")]


def _stored_ids(batch, rows: list[int], side: str, recipe: Recipe) -> list[np.ndarray]:
    """Token ids (int32) of a column of lists, without the positions that the attention mask calls padding."""
    arrays = []
    for column in (recipe.columns[side], recipe.columns.get(f"mask_{side}", recipe.columns[side])):
        array = batch[column].combine_chunks()
        if array.null_count or array.values.null_count:
            lists = enumerate(array.to_pylist())
            bad = next((i for i, values in lists if values is None or None in values), 0)
            raise RowError(rows[bad], f"{column!r} is missing or has a missing (null) element")
        arrays.append(array.to_numpy(zero_copy_only=False))
    result = []
    for row, ids, mask in zip(rows, *arrays, strict=True):
        column = recipe.columns[side]
        if f"mask_{side}" in recipe.columns:
            if len(ids) != len(mask) or not np.isin(mask, (0, 1)).all():
                raise RowError(row, f"{column!r} needs an attention mask of as many 0s and 1s as it has tokens")
            ids = ids[np.asarray(mask, bool)]
        if len(ids) and not 0 <= ids.min() <= ids.max() < recipe.vocab_size:
            bad = ids[(ids < 0) | (ids >= recipe.vocab_size)][0]
            raise RowError(row, f"{column!r} has the token id {bad}, the tokenizer 0 to {recipe.vocab_size - 1}")
        result.append(np.asarray(ids, np.int32))
    return result


# ---------------------------------------------------------------- rows to texts


def _texts(batch, rows: list[int], recipe: Recipe) -> tuple[list[list[str]], list[bool]]:
    """The texts of both sides, prompt included, and for each pair whether an answer is blank."""
    expected = "text, as in the other rows"
    parts = {name: _expect(_values(batch, name), (str,), name, rows, expected) for name in recipe.columns}
    texts = [parts[side] for side in SIDES]
    blank = [not chosen.strip() or not rejected.strip() for chosen, rejected in zip(*texts, strict=True)]
    if "prompt" in parts:
        texts = [[prompt + answer for prompt, answer in zip(parts["prompt"], side, strict=True)] for side in texts]
    return texts, blank


def _rendered(batch, rows: list[int], tokenizer, recipe: Recipe) -> tuple[list[list[str]], list[bool]]:
    """The conversations of both sides as the chat template renders them, and whether an answer is blank."""
    parts = {name: _values(batch, name) for name in recipe.columns}
    names = parts if recipe.format == "conversation_explicit_prompt" else SIDES
    for name in names:
        _check_messages(parts[name], name, rows)
        parts[name] = [without_none(messages) for messages in parts[name]]
    conversations = [parts[side] for side in SIDES]
    blank = [_is_blank(chosen[-1]) or _is_blank(rejected[-1]) for chosen, rejected in zip(*conversations, strict=True)]
    if "prompt" in names:
        conversations = [[a + b for a, b in zip(parts["prompt"], side, strict=True)] for side in conversations]
    elif "prompt" in parts:
        _check_redundant_prompt(parts, rows)
    variables = _template_variables(batch, rows, recipe)
    return [_render(side, variables, rows, tokenizer) for side in conversations], blank


def _check_messages(column: list, name: str, rows: list[int]) -> None:
    """Raise `RowError` unless every value is a list of one message or more, each with a role and a content."""
    _expect(column, (list,), name, rows, "a list of messages, as in the other rows")
    for row, messages in zip(rows, column, strict=True):
        if not messages:
            raise RowError(row, f"{name!r} is an empty list, expected one message or more")
        for i, message in enumerate(messages):
            if type(message) is not dict:
                raise RowError(row, f"{name}[{i}] is {describe(message)}, expected a message with role and content")
            if type(message.get("role")) is not str:
                raise RowError(row, f"{name}[{i}]['role'] is {describe(message.get('role'))}, expected text")
            content = message.get("content")
            if type(content) not in (str, list) and (content is not None or not message.get("tool_calls")):
                raise RowError(row, f"{name}[{i}]['content'] is {describe(content)}, expected text")


def _check_redundant_prompt(parts: dict[str, list], rows: list[int]) -> None:
    """A prompt of text beside whole conversations (UltraFeedback) is ignored, but only where they do contain it."""
    _expect(parts["prompt"], (str,), "prompt", rows, "text, as in the other rows")
    for row, prompt, *sides in zip(rows, parts["prompt"], parts["chosen"], parts["rejected"], strict=True):
        if not all(any(message.get("content") == prompt for message in messages[:-1]) for messages in sides):
            fix = 'give it as [{"role": "user", "content": ...}]'
            raise RowError(row, f"'prompt' is text, but not a message of 'chosen' and 'rejected'; {fix}")


def _is_blank(message: dict) -> bool:
    content = message.get("content") or ""
    return not (content.strip() if isinstance(content, str) else content) and not message.get("tool_calls")


def without_none(value: Any) -> Any:
    """Without the keys that are None: `datasets` adds the keys of other rows so, and a template would print them."""
    if type(value) is dict:
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if type(value) is list else value


def _template_variables(batch, rows: list[int], recipe: Recipe) -> list[dict]:
    """For each row the keyword arguments of its rendering: its tools, the run's variables, and the row's own."""
    columns = []
    for name, kind, expected in (("tools", list, "a list"), ("chat_template_kwargs", dict, "an object")):
        values = _values(batch, name) if name in batch else [None] * len(rows)
        with contextlib.suppress(ValueError):  # not JSON: then text is what `_expect` complains about
            values = [json.loads(value) if isinstance(value, str) else value for value in values]
        values = [kind() if value is None else without_none(value) for value in values]
        columns.append(_expect(values, (kind,), name, rows, expected))
    return [{"tools": tools or None, **recipe.chat_template_kwargs, **own} for tools, own in zip(*columns, strict=True)]


def _render(conversations: list, variables: list[dict], rows: list[int], tokenizer) -> list[str]:
    if all(kwargs == variables[0] for kwargs in variables):  # all in one call
        with contextlib.suppress(*TEMPLATE_ERRORS):  # they come again below, and there the row is known
            return tokenizer.apply_chat_template(conversations, tokenize=False, **variables[0])
    texts = []
    for row, conversation, kwargs in zip(rows, conversations, variables, strict=True):
        try:
            texts.append(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
        except TEMPLATE_ERRORS as error:
            raise RowError(row, f"the chat template refuses the messages: {one_line(error)}") from error
    return texts


# ---------------------------------------------------------------- texts to token ids


def _encode(texts: list[list[str]], rows: list[int], tokenizer, recipe: Recipe) -> list[list[np.ndarray]]:
    """Token ids (int32) of both sides."""
    is_text = recipe.format.startswith("text")  # a chat template writes its own special tokens, and its own EOS
    try:
        sides = encode_pairs(*texts, tokenizer, add_special_tokens=is_text, share_prefix=recipe.share_prefix)
    except Exception:  # a lone surrogate, say; the library does not tell where
        for row, pair in zip(rows, zip(*texts, strict=True), strict=True):
            try:
                tokenizer(list(pair), add_special_tokens=is_text)
            except Exception as error:
                raise RowError(row, f"the tokenizer cannot read the text: {one_line(error)}") from error
        raise
    if is_text and recipe.add_eos:
        eos = tokenizer.eos_token_id
        sides = [[ids if not ids or ids[-1] == eos else [*ids, eos] for ids in side] for side in sides]
    return [[np.array(ids, np.int32) for ids in side] for side in sides]
