"""Preference pairs of one split: one call checks, renders and tokenizes them, and counts what was dropped.

The format is found from the columns of the data set:

    text_implicit_prompt           chosen, rejected: strings that begin alike (hh-rlhf)
    text_explicit_prompt           prompt, chosen, rejected: strings
    conversation_implicit_prompt   chosen, rejected: lists of messages {"role": ..., "content": ...} that begin alike
    conversation_explicit_prompt   prompt, chosen, rejected: lists of messages
    conversation_from_text         text_explicit_prompt made a conversation (`text_as_conversation`): the prompt is the
                                   user's message, the answers are the assistant's
    tokenized                      input_ids_chosen, input_ids_rejected (or chosen_ids, rejected_ids, or
                                   chosen_input_ids, rejected_input_ids), each with an attention mask or without

Optional columns: margin, or score_chosen and score_rejected (`margin_from_scores`), id, subset, true_margin; for
conversations also tools and chat_template_kwargs. A wrong row raises `InputError`; unusable ones are counted.
"""

import contextlib
import dataclasses
import gc
import glob
import hashlib
import json
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
import xxhash
from datasets import Dataset, Features, List, Value

from rm.config.errors import InputError
from rm.data.audit import DROPPED, KEPT, audit_counts, fingerprint
from rm.data.formats import check_tokenizer, detect_format, number_columns
from rm.data.load import Source, check_late_rows, progress_bars
from rm.data.render import (
    FROM_TEXT,
    SIDES,
    Recipe,
    RowError,
    answer,
    shared_messages,
    shared_text,
    transcript,
    without_none,
)
from rm.data.shared_start import can_share_prefix
from rm.data.tokenize import encode_batch

logger = logging.getLogger(__name__)

VERSION = 2  # part of every cache key: raise it when the tokens or the columns of a row change
AUDIT_COLUMNS = ("status", "truncated", "prefix_length", "margin", "length_chosen", "length_rejected")
HASH_COLUMNS = ("hash_chosen", "hash_rejected")


@dataclass(frozen=True)
class Pairs:
    """The usable pairs of one split, tokenized, on disk.

    Columns of `dataset`, one row for each kept pair: `id` (str), `subset` (str, if the data have it), `row` (its row in
    `raw`), `input_ids_chosen`, `input_ids_rejected` (lists of int32: the whole sequences), `prefix_length` (number of
    tokens that both start with; each side has at least one more), `length_chosen`, `length_rejected`, `margin`
    (float32; 0 without one), `true_margin` (float64, if the data have it), `hash_chosen`, `hash_rejected` (int64, of
    the token ids).
    """

    dataset: Dataset
    raw: Dataset
    format: str
    source: str
    audit: dict[str, int | float]
    fingerprint: str  # sha256 over the kept pairs' tokens and margins, the same on every machine
    tokenizer: Any = dataclasses.field(repr=False)

    def texts(self, i: int) -> dict[str, str]:
        """Pair `i` for a person: "prompt" (what both sides share), and what differs as "chosen" and "rejected"."""
        return self.texts_of(self.dataset[i])

    def texts_of(self, row: dict[str, Any]) -> dict[str, str]:
        """The same for a row of `dataset`."""
        if self.format == "tokenized":
            n = row["prefix_length"]
            ids = (row["input_ids_chosen"][:n], row["input_ids_chosen"][n:], row["input_ids_rejected"][n:])
            return dict(zip(("prompt", *SIDES), map(self.tokenizer.decode, ids), strict=True))
        raw = self.raw[row["row"]]
        prompt, chosen, rejected = (without_none(raw.get(name)) for name in ("prompt", *SIDES))
        if self.format.endswith("implicit_prompt"):
            shared = shared_text if self.format.startswith("text") else shared_messages
            n = shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if self.format.startswith("conversation") and self.format != FROM_TEXT:
            prompt, chosen, rejected = transcript(prompt), answer(chosen), answer(rejected)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def prompts(self) -> np.ndarray:
        """A number for each pair's prompt, the same for equal ones, on every machine: int64 [n]. In the formats with an
        implicit prompt that is what both sides share, so that two pairs may seem to have different ones."""
        if self.format == "tokenized":
            columns = self.dataset.select_columns(["input_ids_chosen", "prefix_length"]).with_format("numpy")
            prompts = (row["input_ids_chosen"][: row["prefix_length"]].astype("<i4") for row in columns)
            return np.array([xxhash.xxh64_intdigest(ids.tobytes()) for ids in prompts], np.uint64).view(np.int64)
        raw = self.raw.select_columns([name for name in ("prompt", *SIDES) if name in self.raw.column_names])
        shared = {"text_implicit_prompt": shared_text, "conversation_implicit_prompt": shared_messages}.get(self.format)
        numbers = []
        for row in raw.with_format(None).select(arrays_of(self.dataset, ("row",))["row"]):
            prompt = row["chosen"][: shared(row["chosen"], row["rejected"])] if shared else row["prompt"]
            text = prompt if isinstance(prompt, str) else json.dumps(without_none(prompt), ensure_ascii=False)
            numbers.append(xxhash.xxh64_intdigest(text.encode("utf-8", "backslashreplace")))
        return np.array(numbers, np.uint64).view(np.int64)


def tokenize_pairs(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlength: str = "drop",
    add_eos: bool = True,
    text_as_conversation: bool = False,
    margin_from_scores: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    dataset_num_proc: int | None = None,
) -> Pairs:
    """Check every row, render and tokenize it, drop what cannot be used and count it.

    Text is prompt + answer as one string, with the tokenizer's default special tokens, and then EOS (`add_eos`). A
    conversation is rendered whole by the chat template, which writes its own special tokens; `text_as_conversation`
    makes one of every prompt and answer of text, where the prompt is a column of its own. Token columns are taken as
    they are. `max_length` counts the tokens of one sequence (None: no limit); longer pairs are dropped, or cut with
    `overlength="truncate_left"` (see `truncate_left`). The result is cached on disk, under a key of the raw data's
    fingerprint, the tokenizer's content and these options.

    Raises `InputError`: a wrong row, an unknown format, a tokenizer without chat template or EOS, no pair left.
    """
    assert overlength in ("drop", "truncate_left"), overlength
    format_name, columns = detect_format(source)
    if text_as_conversation and format_name == "text_explicit_prompt":
        format_name = FROM_TEXT
    recipe = Recipe(
        format=format_name,
        columns=columns,
        numbers=number_columns(source, margin_from_scores),
        add_eos=add_eos,
        max_length=max_length,
        overlength=overlength,
        chat_template_kwargs=chat_template_kwargs or {},
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        share_prefix=can_share_prefix(tokenizer),
    )
    check_tokenizer(source, tokenizer, recipe)
    table = _cached_map(source, tokenizer, recipe, dataset_num_proc or 1)
    arrays = arrays_of(table, AUDIT_COLUMNS + HASH_COLUMNS)
    counts, kept = audit_counts(arrays), np.flatnonzero(arrays["status"] == KEPT)
    logger.info("%s: format %s, %d of %d pairs kept", source.name, format_name, len(kept), len(table))
    if len(kept) == 0:
        why = ", ".join(f"{counts[name]} {name}" for name in DROPPED if counts[name])
        raise InputError(f"{source.name}: no pair is left of {len(table)} ({why}); raise max_length or mend the data")
    digest = fingerprint({name: values[kept] for name, values in arrays.items()})
    dataset = table.remove_columns(["status", "truncated"])
    if len(kept) < len(table):
        dataset = dataset.select(kept)
    return Pairs(dataset, source.dataset, format_name, source.name, counts, digest, tokenizer)


def arrays_of(dataset: Dataset, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Whole columns of numbers, 8 bytes a pair at most, past `dataset[:]`, which loops over selected rows."""
    arrays = {name: dataset.data.column(name).to_numpy() for name in names}
    if dataset._indices is None:
        return arrays
    rows = dataset._indices.column(0).to_numpy()
    return {name: values[rows] for name, values in arrays.items()}


# ---------------------------------------------------------------- cached tokens


def _cached_map(source: Source, tokenizer: Any, recipe: Recipe, num_proc: int) -> Dataset:
    """All rows through `encode_batch`, or the file that an earlier call wrote for the same data and options."""
    dataset, key = source.dataset, _cache_key(source, tokenizer, recipe)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "reward_pairs")  # not beside the data: they may be read-only
    folder.mkdir(parents=True, exist_ok=True)
    columns = {*recipe.read, *recipe.numbers, "id", "subset"}
    if not glob.glob(f"{folder / key}*.arrow"):
        check_late_rows(source, columns)
    dataset = dataset.select_columns([column for column in dataset.column_names if column in columns])
    num_proc = min(num_proc, len(dataset))
    features = _features(source)
    try:
        with progress_bars(len(dataset) > 20_000), _no_collector(), _workers_that_end(num_proc):
            table = dataset.with_format("arrow" if recipe.format == "tokenized" else None).map(
                encode_batch,
                with_indices=True,
                batched=True,
                fn_kwargs={"tokenizer": tokenizer, "recipe": recipe, "features": features},
                features=features,
                num_proc=num_proc if num_proc > 1 else None,
                cache_file_name=str(folder / f"{key}.arrow"),
                new_fingerprint=key,
                desc="Tokenizing",
            )
    except RowError as error:
        raise InputError(f"{source.row_name(error.row)}: {error.problem}") from None
    except UnicodeDecodeError as error:  # the JSON and Parquet readers let wrong bytes pass
        row = next(row for row in range(len(dataset)) if not _is_readable(dataset, row))
        raise InputError(f"{source.row_name(row)}: {error}; write the file in UTF-8") from None
    return table.with_format(None)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cycle collector, which would walk over all modules and each batch's lists again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _workers_that_end(num_proc: int) -> Iterator[None]:
    """SIGTERM acts as always: after a wrong row the pool ends its workers by it, and waits for them without a limit.

    They would inherit a handler that lets them live: of an earlier run in this process, say, or of a job framework.
    """
    if num_proc == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _is_readable(dataset: Dataset, row: int) -> bool:
    try:
        return bool(dataset[row])
    except UnicodeDecodeError:
        return False


def _cache_key(source: Source, tokenizer: Any, recipe: Recipe) -> str:
    """Hex digits (32) that differ wherever the tokens could."""
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer("")  # resets padding and truncation, which an earlier call may have left in its definition
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = [tokenizer.special_tokens_map, tokenizer.chat_template, transformers.__version__]
    parts = [VERSION, source.dataset._fingerprint, content, special, dataclasses.asdict(recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _features(source: Source) -> Features:
    """The columns of the cached table: those of `Pairs`, and `status` and `truncated` for the audit."""
    ids, int32 = List(Value("int32")), Value("int32")
    features = {"id": Value("string"), "row": Value("int64"), "input_ids_chosen": ids, "input_ids_rejected": ids}
    features |= {"prefix_length": int32, "length_chosen": int32, "length_rejected": int32, "margin": Value("float32")}
    features |= {"hash_chosen": Value("int64"), "hash_rejected": Value("int64")}
    features |= {"status": Value("int8"), "truncated": Value("bool")}
    optional = {"subset": Value("string"), "true_margin": Value("float64")}
    return Features(features | {name: kind for name, kind in optional.items() if name in source.dataset.features})
