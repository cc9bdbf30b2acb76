"""Preference pairs for training: one call loads, checks, renders and tokenizes them, and counts what was dropped.

The format is found from the columns of the data set:

    text_implicit_prompt           chosen, rejected: strings that begin alike (hh-rlhf)
    text_explicit_prompt           prompt, chosen, rejected: strings
    conversation_implicit_prompt   chosen, rejected: lists of messages {"role": ..., "content": ...} that begin alike
    conversation_explicit_prompt   prompt, chosen, rejected: lists of messages
    tokenized                      input_ids_chosen, input_ids_rejected (or chosen_ids, rejected_ids, or
                                   chosen_input_ids, rejected_input_ids), each with an attention mask or without

Optional columns: margin, or score_chosen and score_rejected (`margin_from_scores`), id, subset, true_margin; for
conversations also tools and chat_template_kwargs. A wrong row raises `DataError`; unusable ones are counted.
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
from datasets import Dataset, Features, LargeList, List, Value

from rm.audit import DROPPED, KEPT, audit_counts, audit_table, count_in_train, data_report, fingerprint
from rm.encode import encode_batch
from rm.load import DataError, Source, check_late_rows, load_raw, progress_bars
from rm.render import (
    SIDES,
    Recipe,
    RowError,
    answer,
    describe,
    shared_messages,
    shared_text,
    transcript,
    without_none,
)
from rm.shared_start import can_share_prefix

__all__ = ["DataError", "Pairs", "audit_table", "data_report", "load_pairs", "load_raw", "tokenize_pairs"]
logger = logging.getLogger(__name__)

VERSION = 1  # part of every cache key: raise it when the tokens or the columns of a row change
AUDIT_COLUMNS = ("status", "truncated", "prefix_length", "margin", "length_chosen", "length_rejected")
HASH_COLUMNS = ("hash_chosen", "hash_rejected")
TOKEN_COLUMNS = (  # ids and attention mask of a side
    ("input_ids_{}", "attention_mask_{}"),
    ("{}_ids", "{}_mask"),
    ("{}_input_ids", "{}_attention_mask"),
)


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
        row = self.dataset[i]
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
        if self.format.startswith("conversation"):
            prompt, chosen, rejected = transcript(prompt), answer(chosen), answer(rejected)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def load_pairs(
    tokenizer: Any,
    *,
    dataset_name: str,
    dataset_config: str | None = None,
    dataset_train_split: str = "train",
    dataset_test_split: str = "test",
    eval_dataset_name: str | None = None,
    eval_fraction: float | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Pairs, Pairs]:
    """The train and the test pairs; `options` are those of `tokenize_pairs`, names as in `load_raw`.

    The test pairs are a random `eval_fraction` of the train split, or else `dataset_test_split` of `eval_dataset_name`
    (or its only split), or of `dataset_name`. On several processes call it inside
    `accelerator.main_process_first()`: the first one works, the others read its cache. Raises `DataError`.
    """
    load = {"dataset_config": dataset_config, "seed": seed}
    if eval_fraction is not None:
        train, test = _hold_out(load_raw(dataset_name, split=dataset_train_split, **load), eval_fraction, seed)
        train, test = train.first(max_train_samples), test.first(max_eval_samples)
    else:
        train = load_raw(dataset_name, split=dataset_train_split, max_samples=max_train_samples, **load)
        if eval_dataset_name is not None:
            load |= {"dataset_config": None, "accept_only_split": True}
        name = eval_dataset_name or dataset_name
        test = load_raw(name, split=dataset_test_split, max_samples=max_eval_samples, **load)
    train, test = tokenize_pairs(train, tokenizer, **options), tokenize_pairs(test, tokenizer, **options)
    test.audit["in_train"] = count_in_train(*(_arrays(pairs.dataset, HASH_COLUMNS) for pairs in (train, test)))
    if test.audit["in_train"]:
        logger.warning(
            "%s: %d of the %d test pairs are in the train set too; their accuracy says nothing about new data",
            *(test.source, test.audit["in_train"], test.audit["kept"]),
        )
    return train, test


def _hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """(rest, random `fraction`) of the rows, each in the order of the data set, which reads faster from disk."""
    num_rows = len(source.dataset)
    num_test = max(1, round(fraction * num_rows))
    if num_test >= num_rows:
        raise DataError(f"{source.name}: eval_fraction={fraction} of {num_rows} rows leaves none to train on")
    order = np.random.default_rng(seed).permutation(num_rows)
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return source.select(train), source.select(test)


def tokenize_pairs(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlength: str = "drop",
    add_eos: bool = True,
    margin_from_scores: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    dataset_num_proc: int | None = None,
) -> Pairs:
    """Check every row, render and tokenize it, drop what cannot be used and count it.

    Text is prompt + answer as one string, with the tokenizer's default special tokens, and then EOS (`add_eos`). A
    conversation is rendered whole by the chat template, which writes its own special tokens. Token columns are taken
    as they are. `max_length` counts the tokens of one sequence (None: no limit); longer pairs are dropped, or cut with
    `overlength="truncate_left"` (see `truncate_left`). The result is cached on disk, under a key of the raw data's
    fingerprint, the tokenizer's content and these options.

    Raises `DataError`: a wrong row, an unknown format, a tokenizer without chat template or EOS, no pair left.
    """
    assert overlength in ("drop", "truncate_left"), overlength
    format_name, columns = detect_format(source)
    recipe = Recipe(
        format=format_name,
        columns=columns,
        numbers=_number_columns(source, margin_from_scores),
        add_eos=add_eos,
        max_length=max_length,
        overlength=overlength,
        chat_template_kwargs=chat_template_kwargs or {},
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        share_prefix=can_share_prefix(tokenizer),
    )
    _check_tokenizer(source, tokenizer, recipe)
    table = _cached_map(source, tokenizer, recipe, dataset_num_proc or 1)
    arrays = _arrays(table, AUDIT_COLUMNS + HASH_COLUMNS)
    counts, kept = audit_counts(arrays), np.flatnonzero(arrays["status"] == KEPT)
    logger.info("%s: format %s, %d of %d pairs kept", source.name, format_name, len(kept), len(table))
    if len(kept) == 0:
        why = ", ".join(f"{counts[name]} {name}" for name in DROPPED if counts[name])
        raise DataError(f"{source.name}: no pair is left of {len(table)} ({why}); raise max_length or mend the data")
    digest = fingerprint({name: values[kept] for name, values in arrays.items()})
    dataset = table.remove_columns(["status", "truncated"])
    if len(kept) < len(table):
        dataset = dataset.select(kept)
    return Pairs(dataset, source.dataset, format_name, source.name, counts, digest, tokenizer)


def _arrays(dataset: Dataset, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Whole columns of numbers, 8 bytes a pair at most; by way of Arrow: the numpy format loops over the rows."""
    table = dataset.select_columns(list(names)).with_format("arrow")[:]
    return {name: table[name].to_numpy() for name in names}


# ---------------------------------------------------------------- format


def detect_format(source: Source) -> tuple[str, dict[str, str]]:
    """The name of the format, and the columns that it reads (what it is -> column), by the columns' types."""
    features = source.dataset.features
    for ids, mask in TOKEN_COLUMNS:
        columns = {side: ids.format(side) for side in SIDES}
        if all(column in features for column in columns.values()):
            masks = {f"mask_{side}": mask.format(side) for side in SIDES if mask.format(side) in features}
            for column in (columns | masks).values():
                _check_integers(source, column)
            return "tokenized", columns | masks
    if not all(side in features for side in SIDES):
        raise DataError(
            f"{source.name}: needs the columns 'chosen' and 'rejected' (text or messages), or 'input_ids_chosen' and "
            f"'input_ids_rejected'; its columns are {', '.join(features)}"
        )
    kinds = {column: _kind(source, column) for column in ("prompt", *SIDES) if column in features}
    if kinds["chosen"] != kinds["rejected"]:
        how = f"'chosen' is {kinds['chosen']} and 'rejected' is {kinds['rejected']}; they must be alike"
        raise DataError(f"{source.row_name(0)}: {how}")
    family = "text" if kinds["chosen"] == "text" else "conversation"
    columns = {column: column for column in kinds}
    if "prompt" not in kinds or (kinds["prompt"], family) == ("text", "conversation"):
        return f"{family}_implicit_prompt", columns  # a prompt of text beside conversations repeats their start
    if kinds["prompt"] != kinds["chosen"]:
        fix = 'write the answers as [{"role": "assistant", "content": ...}]'
        raise DataError(f"{source.row_name(0)}: 'prompt' is messages and 'chosen' is text; {fix}")
    return f"{family}_explicit_prompt", columns


def _kind(source: Source, column: str) -> str:
    """Is it "text" or "messages"? By the type of the column; where rows differ (type Json), by the first row."""
    feature = source.dataset.features[column]
    if feature in (Value("string"), Value("large_string")):
        return "text"
    if isinstance(feature, List | LargeList):
        item = feature.feature
        if isinstance(item, dict | datasets.Json) or item == Value("null"):  # null: all lists are empty
            return "messages"
    if isinstance(feature, datasets.Json) or feature == Value("null"):
        first = source.dataset[0][column]
        if type(first) in (str, list):
            return "text" if type(first) is str else "messages"
        raise DataError(f"{source.row_name(0)}: {column!r} is {describe(first)}, expected text or messages")
    raise DataError(f"{source.row_name(0)}: {column!r} has the type {feature}, expected text or messages")


def _check_integers(source: Source, column: str) -> None:
    """Raise `DataError`, naming the first wrong row, unless the column's type is a list of integers."""
    feature = source.dataset.features[column]
    if isinstance(feature, List | LargeList) and "int" in getattr(feature.feature, "dtype", ""):
        return
    rows = enumerate(source.dataset[column])
    bad = next((row for row, ids in rows if type(ids) is not list or any(type(i) is not int for i in ids)), 0)
    raise DataError(f"{source.row_name(bad)}: {column!r} is not a list of integers")


def _number_columns(source: Source, margin_from_scores: bool) -> tuple[str, ...]:
    features, scores = source.dataset.features, tuple(f"score_{side}" for side in SIDES)
    if margin_from_scores and "margin" in features:
        raise DataError(f"{source.name}: has a column 'margin'; set margin_from_scores to false, or remove the column")
    if margin_from_scores and not all(column in features for column in scores):
        missing = next(column for column in scores if column not in features)
        raise DataError(f"{source.name}: there is no column {missing!r}; set margin_from_scores to false, or add it")
    margin = scores if margin_from_scores else ("margin",)
    return tuple(column for column in (*margin, "true_margin") if column in features)


def _check_tokenizer(source: Source, tokenizer: Any, recipe: Recipe) -> None:
    if recipe.format.startswith("text") and recipe.add_eos and tokenizer.eos_token_id is None:
        raise DataError(f"{source.name}: the tokenizer has no EOS token to append to text; set add_eos to false")
    if recipe.format.startswith("conversation"):
        if not tokenizer.chat_template:
            fix = "set chat_template_path, or give the data as text"
            raise DataError(f"{source.name}: conversations need a chat template, the tokenizer has none; {fix}")
        has_date = "strftime_now" in str(tokenizer.chat_template)
        if has_date and not any("date" in key for key in recipe.chat_template_kwargs):
            logger.warning(
                "the chat template may write today's date into the prompt, and rewards would change from day to day; "
                'fix it, for most templates with chat_template_kwargs: {"date_string": "26 Jul 2024"}'
            )


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
        raise DataError(f"{source.row_name(error.row)}: {error.problem}") from None
    except UnicodeDecodeError as error:  # the JSON and Parquet readers let wrong bytes pass
        row = next(row for row in range(len(dataset)) if not _is_readable(dataset, row))
        raise DataError(f"{source.row_name(row)}: {error}; write the file in UTF-8") from None
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
