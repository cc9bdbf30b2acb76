"""Rows to tokens, batch by batch: render, encode, judge, cut to length.

It runs in the workers of a `datasets` map.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features

from rm.data.audit import EMPTY, IDENTICAL, KEPT, OVER_LENGTH
from rm.data.load import one_line
from rm.data.render import SIDES, Recipe, RowError, column_values, labels, numbers, render
from rm.data.shared_start import encode_pairs

PIECE = 250  # rows: while one piece is tokenized, on every core, the next one is rendered and the last one judged


def encode_batch(batch, rows: list[int], *, tokenizer, recipe: Recipe, features: Features) -> pa.Table:
    """A table of `features` with one row for each row of `batch`, whose numbers are `rows`. Raises `RowError`."""
    given = {name: numbers(batch, name, rows) for name in recipe.numbers}
    out = {name: [] for name in features}
    for pair in _tokens(batch, rows, tokenizer, recipe):
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
    out["id"] = labels(batch, "id", rows) if "id" in batch else [str(row) for row in rows]
    if "subset" in features:
        out["subset"] = [name if name.strip() else "(empty)" for name in labels(batch, "subset", rows)]
    if "true_margin" in features:
        out["true_margin"] = given["true_margin"]
    if "score_chosen" in given:
        out["margin"] = (given["score_chosen"] - given["score_rejected"]).astype(np.float32)
    else:
        out["margin"] = given.get("margin", np.zeros(len(rows))).astype(np.float32)
    return pa.table(out, schema=features.arrow_schema)


def _tokens(batch, rows: list[int], tokenizer, recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """(chosen ids, rejected ids, whether an answer is blank) of every row."""
    if recipe.format == "tokenized":
        yield from (
            (*ids, False) for ids in zip(*(_stored_ids(batch, rows, side, recipe) for side in SIDES), strict=True)
        )
        return
    columns = {name: column_values(batch, name) for name in batch if name in recipe.read}
    futures, blanks = [], []
    with ThreadPoolExecutor(1) as pool:
        for start in range(0, len(rows), PIECE):
            piece = {name: values[start : start + PIECE] for name, values in columns.items()}
            numbered = rows[start : start + PIECE]
            texts, blank = render(piece, numbered, tokenizer, recipe)
            futures.append(pool.submit(_encode, texts, numbered, tokenizer, recipe))
            blanks.append(blank)
        for future, blank in zip(futures, blanks, strict=True):
            yield from zip(*future.result(), blank, strict=True)


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
        chosen, rejected = truncate_left((chosen, rejected), recipe.max_length, bos)
        status = IDENTICAL if np.array_equal(chosen, rejected) else KEPT
    if status != KEPT:
        chosen = rejected = np.zeros(0, np.int32)
    return status, truncated, chosen, rejected


def shared_prefix_length(*sequences: np.ndarray) -> int:
    """Number of equal leading tokens, at most so many that each sequence keeps one token of its own."""
    limit = max(min(map(len, sequences)) - 1, 0)
    first, *others = (ids[:limit] for ids in sequences)
    differ = np.any([ids != first for ids in others], axis=0) if others else np.zeros(0, bool)
    return int(differ.argmax()) if differ.any() else limit


def truncate_left(sequences: Sequence[np.ndarray], max_length: int, bos: int | None) -> tuple[np.ndarray, ...]:
    """All sequences (the two of a pair) at most `max_length` tokens long, cut at the start, so that the answers stay.

    The same number of tokens of the shared prefix goes from all, enough for the longest: what is left of the prompt is
    the same for all. Only where the prefix is used up, a sequence whose answer is still too long keeps its last tokens.
    A BOS that all start with stays in front, since models lean on it.
    """
    keep = int(bos is not None and max_length > 1 and all(ids[0] == bos for ids in sequences))
    spare = max(shared_prefix_length(*sequences) - keep, 0)
    start = keep + min(spare, max(map(len, sequences)) - max_length)
    return tuple(np.concatenate([ids[:keep], ids[start:][keep - max_length :]]) for ids in sequences)


def _hash(ids: np.ndarray) -> int:
    """A signed 64-bit hash of int32 token ids, the same on every machine."""
    return xxhash.xxh64_intdigest(ids.astype("<i4", copy=False).tobytes()) - (1 << 63)


def _list_array(sequences: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(sequences))


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
    end = [tokenizer.eos_token_id] if is_text and recipe.add_eos else []
    return [[with_end(ids, end) for ids in side] for side in sides]


def with_end(ids: list[int], end: list[int]) -> np.ndarray:
    """`ids` as int32, and then the token `end` unless they end with it (an empty text stays empty)."""
    return np.array(ids if not ids or ids[-1:] == end else ids + end, np.int32)
