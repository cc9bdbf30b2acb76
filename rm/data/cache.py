"""The tokenized rows of a data set, cached by the content of the data and the options that decide the tokens."""

import dataclasses
import gc
import hashlib
import inspect
import json
import logging
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import transformers
import xxhash
from datasets import Dataset, Features, List, Value
from filelock import FileLock

from rm.config.errors import InputError
from rm.config.folders import damage, discard_folder, new_folder, publish_folder
from rm.data.audit import DROPPED, audit_counts, fingerprint
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS
from rm.data.dataset import DataSet, PreferenceData, arrays_of, flat, ragged
from rm.data.formats import DATA_LAYOUTS, Encoding, RowError, label, read_row
from rm.data.load import Source, check_late_rows, progress_bars
from rm.data.render import is_blank
from rm.data.tokenize import Tree, encode_examples, usable_part

logger = logging.getLogger(__name__)


def tokenize_source(
    source: Source, name: str, tokenizer: Any, encoding: Encoding, dataset_num_proc: int | None = None
) -> PreferenceData:
    """Check every row, render and tokenize it, drop what cannot be used and count it. Cached on disk.

    Raises:
        InputError: a wrong row, or no comparison is left.
    """
    table = _cached_table(source, tokenizer, encoding, dataset_num_proc or 1)
    counts, _ = ragged(table, "chosen")
    kept = np.flatnonzero(counts)
    dataset = table if len(kept) == len(table) else table.select(kept)
    audit = audit_counts(arrays_of(dataset), {reason: int(flat(table, reason).sum()) for reason in DROPPED})
    logger.info("%s: format %s, %d of %d pairs kept", source.name, encoding.format, audit["kept"], audit["total"])
    if len(kept) == 0:
        why = ", ".join(f"{audit[reason]} {reason}" for reason in DROPPED if audit[reason])
        raise InputError(f"{source.name}: no pair is left of {len(table)} ({why}); raise max_length or fix the data")
    digest = fingerprint(arrays_of(dataset))
    part = DataSet(source, encoding, audit, digest, len(dataset))
    return PreferenceData(dataset, {name: part}, audit, digest, tokenizer)


def _cached_table(source: Source, tokenizer: Any, encoding: Encoding, num_proc: int) -> Dataset:
    """All rows through `encode_batch`, or the files that an earlier call wrote for the same content and options.

    A damaged folder of the cache (`rm.config.folders.damage`) is made again.
    """
    key = _cache_key(source, tokenizer, encoding)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "reward_prompts", key)
    if damage(folder) is None:  # several processes verify at the same time
        return _read_table(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # other processes wait, and read the result
        if folder.is_dir() and (problem := damage(folder)):
            logger.warning("the token cache in %s is damaged (%s); the data are tokenized again", folder, problem)
            discard_folder(folder)
        if not folder.is_dir():
            _write_table(folder, source, tokenizer, encoding, num_proc)
        return _read_table(folder)


def _read_table(folder: Path) -> Dataset:
    return datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))])


def _write_table(folder: Path, source: Source, tokenizer: Any, encoding: Encoding, num_proc: int) -> None:
    layout = DATA_LAYOUTS[encoding.data_layout]
    columns = {*layout.columns, *layout.optional, *encoding.numbers.values()}
    columns |= {"id", "subset", "tools", "chat_template_kwargs"}
    columns |= {column for names in encoding.answer_numbers.values() for column in names}
    check_late_rows(source, columns)
    rows = source.dataset.select_columns([c for c in source.dataset.column_names if c in columns]).with_format(None)
    num_proc, features, hidden = min(num_proc, len(rows)), _features(), new_folder(folder)
    gc.disable()  # the cycle collector would search the lists of each batch again: a quarter of the time
    is_main = threading.current_thread() is threading.main_thread()
    # a pool ends its workers by SIGTERM and waits for them; they must not inherit a handler that lets them live
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL) if num_proc > 1 and is_main else None
    try:
        with progress_bars(len(rows) > 20_000 and sys.stderr.isatty()):
            rows.map(
                encode_batch,
                with_indices=True,
                batched=True,
                fn_kwargs={"tokenizer": tokenizer, "encoding": encoding, "features": features},
                features=features,
                num_proc=num_proc if num_proc > 1 else None,
                cache_file_name=str(hidden / "tokens.arrow"),
                new_fingerprint=folder.name,
                desc="Tokenizing",
            )
        publish_folder(hidden, folder)
    except RowError as error:
        raise InputError(f"{source.row_name(error.row)}: {error}") from None
    except UnicodeDecodeError as error:  # the JSON and Parquet readers accept wrong bytes
        row = next(row for row in range(len(rows)) if not _is_readable(rows, row))
        raise InputError(f"{source.row_name(row)}: {error}; write the file in UTF-8") from None
    finally:
        gc.enable()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        shutil.rmtree(hidden, ignore_errors=True)


def _is_readable(rows: Dataset, row: int) -> bool:
    try:
        return bool(rows[row])
    except UnicodeDecodeError:
        return False


def _cache_key(source: Source, tokenizer: Any, encoding: Encoding) -> str:
    """Hex digits (32) that differ wherever the tokens or the numbers could, also after an edit of the code."""
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer("")  # resets padding and truncation, which an earlier call may have left in its definition
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = [tokenizer.special_tokens_map, tokenizer.chat_template, transformers.__version__]
    registry = {name: dataclasses.asdict(c) for name, c in (COMPARISON_COLUMNS | ANSWER_COLUMNS).items()}
    code = [inspect.getsource(inspect.getmodule(f)) for f in (read_row, is_blank, usable_part, _features)]
    parts = [code, source.key, content, special, dataclasses.asdict(encoding), registry]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _features() -> Features:
    """The columns of the cached table: those of `PreferenceData`, and the counts for the audit."""
    int32 = Value("int32")
    features = {"id": Value("string"), "subset": Value("string"), "row": Value("int64")}
    features |= {"prefix_ids": List(int32), "answer_ids": List(List(int32)), "answer_hash": List(Value("int64"))}
    features |= {"prefix_length": int32, "answer_lengths": List(int32), "answer": List(int32)}
    features |= {"chosen": List(int32), "rejected": List(int32)}
    features |= dict.fromkeys((*COMPARISON_COLUMNS, *ANSWER_COLUMNS), List(Value("float32")))
    return Features(features | {"truncated": Value("bool")} | dict.fromkeys(DROPPED, int32))


def encode_batch(batch, indices: list[int], *, tokenizer: Any, encoding: Encoding, features: Features) -> pa.Table:
    """A table of `features` with one row for each row of `batch`. Raises `RowError` with the row's number."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    out: dict[str, list] = {name: [] for name in features}
    examples = []
    for i, row in zip(indices, rows, strict=True):
        try:
            examples.append(read_row(row, encoding))
            out["id"].append(label(row, "id") if "id" in row else str(i))
            subset = label(row, "subset") if "subset" in row else None
            out["subset"].append("(empty)" if subset is not None and not subset.strip() else subset)
        except RowError as error:
            raise RowError(error.problem, i) from None
    encoded = encode_examples(examples, tokenizer, encoding)
    for i, example, sequences in zip(indices, examples, encoded, strict=True):
        if isinstance(sequences, RowError):
            raise RowError(sequences.problem, i)
        blank = [example.kind != "tokens" and is_blank(answer) for answer in example.answers]
        part = usable_part(sequences, blank, example.comparisons, encoding, tokenizer.bos_token_id)
        tree = part.tree or Tree(np.zeros(0, np.int32), [])
        out["row"].append(i)
        out["prefix_ids"].append(tree.prefix)
        out["answer_ids"].append(tree.answers)
        out["prefix_length"].append(len(tree.prefix))
        out["answer_lengths"].append(list(map(len, tree.answers)))
        out["answer_hash"].append([_hash(sequence) for sequence in tree.sequences()])
        out["answer"].append(part.answers)
        out["chosen"].append([chosen for chosen, _ in part.comparisons])
        out["rejected"].append([rejected for _, rejected in part.comparisons])
        for columns, places in ((COMPARISON_COLUMNS, part.kept), (ANSWER_COLUMNS, part.answers)):
            for name, column in columns.items():
                values = example.columns.get(name)
                out[name].append([column.default if values is None else values[p] for p in places])
        out["truncated"].append(part.truncated)
        for reason, count in part.dropped.items():
            out[reason].append(count)
    out["prefix_ids"] = _lists(out["prefix_ids"])
    flat_answers = _lists([ids for answers in out["answer_ids"] for ids in answers])
    offsets = np.cumsum([0, *map(len, out["answer_ids"])], dtype=np.int32)
    out["answer_ids"] = pa.ListArray.from_arrays(offsets, flat_answers)
    return pa.table(out, schema=features.arrow_schema)


def _hash(ids: np.ndarray) -> int:
    """A signed 64-bit hash of int32 token ids, the same on every machine."""
    return xxhash.xxh64_intdigest(ids.astype("<i4", copy=False).tobytes()) - (1 << 63)


def _lists(sequences: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([*sequences, np.zeros(0, np.int32)]))
