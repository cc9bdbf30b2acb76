"""The tokenized rows of a data set, cached by the content of the data and the options that decide the tokens.

With `group_by_prompt` rows that share a prompt are merged; with `max_answers` prompts with more answers are split.
"""

import dataclasses
import gc
import hashlib
import inspect
import json
import logging
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import transformers
import xxhash
from datasets import Dataset, Features, List, Value
from filelock import FileLock

from rm.config.errors import InputError
from rm.config.files import damage, discard_folder, naming, new_folder, publish_folder
from rm.data.audit import DROPPED, NOTED, audit_counts, fingerprint
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS
from rm.data.dataset import DataSet, PreferenceData, arrays_of, flat, prompt_hash, ragged
from rm.data.example import SIDES, Encoding, RowError
from rm.data.formats import OTHERS, detect_format, read_row
from rm.data.layouts import DataLayout
from rm.data.load import Source, check_late_rows
from rm.data.prompt import example_of
from rm.data.tokenize import encode_examples, make_tree, usable_part

logger = logging.getLogger(__name__)

Row = dict[str, Any]  # of the cached table


def tokenize_source(
    source: Source,
    name: str,
    tokenizer: Any,
    config: Any,
    as_conversation: bool = False,
    select: Callable[[Dataset], Dataset] = lambda table: table,
) -> PreferenceData:
    """Check every row, render and tokenize it, group it by prompt, drop what cannot be used and count it.

    The tokens are cached on disk for the same content and options. A damaged folder of the cache is made again.
    `select` chooses rows of the cached table, one for each prompt; only these are used and counted.

    Raises:
        InputError: unknown columns, a wrong row, or no comparison is left.
    """
    encoding = detect_format(source, config, tokenizer, as_conversation)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "reward_prompts", _cache_key(source, tokenizer, encoding))
    if damage(folder):  # several processes verify at the same time
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # other processes wait, and read the result
            if (problem := damage(folder)) and folder.is_dir():
                logger.warning("the token cache in %s is damaged (%s); the data are tokenized again", folder, problem)
                discard_folder(folder)
            if problem:
                with naming(folder):
                    _write_table(folder, source, tokenizer, encoding, config.dataset_num_proc or 1)
    table = select(_read_table(folder))
    kept = np.flatnonzero(ragged(table, "chosen")[0])
    dataset = table if len(kept) == len(table) else table.select(kept)
    arrays = arrays_of(dataset)
    audit = audit_counts(arrays, {reason: int(flat(table, reason).sum()) for reason in DROPPED})
    counts = audit["kept"], audit["total"]
    logger.info("%s: format %s, %d of %d comparisons kept", source.name, encoding.format, *counts)
    if count := audit["ends_with_user"]:
        problem = "rows have conversations that end with a message of the user, not with an answer"
        logger.warning("%s: %d %s", source.name, count, problem)
    if negative := int((arrays["margin"] < 0).sum()):
        level, counts = logging.WARNING if negative == audit["kept"] else logging.INFO, (negative, audit["kept"])
        logger.log(level, "%s: %d of %d margins are negative; are labels swapped?", source.name, *counts)
    if audit["kept"] > len(kept):
        audit["prompts_dropped"] = len(table) - len(kept)
        counts = len(kept), audit["tree_tokens"], audit["pair_tokens"]
        logger.info("%s: %d prompts of %d tokens as groups; as separate pairs %d tokens", source.name, *counts)
    if len(kept) == 0:
        why = ", ".join(f"{audit[reason]} {reason}" for reason in DROPPED if audit[reason])
        raise InputError(f"{source.name}: no pair is left of {len(table)} ({why}); raise max_length or fix the data")
    part = DataSet(source, encoding, audit, fingerprint(arrays), len(dataset))
    return PreferenceData(dataset, {name: part}, audit, part.fingerprint, tokenizer)


def _write_table(folder: Path, source: Source, tokenizer: Any, encoding: Encoding, num_proc: int) -> None:
    paths = [*encoding.roles.values(), *OTHERS, *encoding.numbers.values()]
    paths += [column for columns in encoding.answer_numbers.values() for column in columns]
    columns = {c for c in source.dataset.column_names if any(f"{path}.".startswith(f"{c}.") for path in paths)}
    check_late_rows(source, columns)
    rows = source.dataset.select_columns(sorted(columns)).with_format(None)
    num_proc, features, hidden = min(num_proc, len(rows)), _features(), new_folder(folder)
    gc.disable()  # the cycle collector would search the lists of each batch again: a quarter of the time
    # a pool ends its workers by SIGTERM and waits for them; they must not inherit a handler that lets them live
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL) if num_proc > 1 else None
    try:
        rows.map(
            encode_batch,
            with_indices=True,
            batched=True,
            fn_kwargs={"source": source, "tokenizer": tokenizer, "encoding": encoding, "features": features},
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(hidden / "tokens.arrow"),
            new_fingerprint=folder.name,
            desc="Tokenizing",
        )
        if encoding.group_by_prompt or encoding.max_answers:
            _group_table(hidden, encoding, features)
        publish_folder(hidden, folder)
    except UnicodeDecodeError:  # the JSON and Parquet readers accept wrong bytes
        for row in range(len(rows)):
            try:
                rows[row]
            except UnicodeDecodeError as error:
                raise InputError(f"{source.row_name(row)}: {error}; write the file in UTF-8") from None
        raise
    finally:
        gc.enable()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        shutil.rmtree(hidden, ignore_errors=True)


def _read_table(folder: Path) -> Dataset:
    return datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))])


def _group_table(folder: Path, encoding: Encoding, features: Features) -> None:
    """Replace the table in `folder` by one with a row for each group."""
    tokens, files = _read_table(folder), list(folder.glob("*.arrow"))
    prompts = flat(tokens, "prompt").tolist() if encoding.group_by_prompt else range(len(tokens))

    def group_batch(batch: dict[str, list]) -> pa.Table:
        merged = (merge_rows([tokens[i] for i in members]) for members in batch["rows"])
        limit = encoding.max_answers
        table = [part for row in merged for part in (split_row(row, limit) if limit else [row])]
        return pa.Table.from_pylist(table, schema=features.arrow_schema)

    options = {"features": features, "new_fingerprint": folder.name, "cache_file_name": str(folder / "groups.arrow")}
    Dataset.from_dict({"rows": same_prompt(prompts)}).map(group_batch, batched=True, desc="Grouping", **options)
    for file in files:
        file.unlink()


def _cache_key(source: Source, tokenizer: Any, encoding: Encoding) -> str:
    """Hex digits (32) that differ wherever the tokens or the numbers could, also after an edit of the code."""
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer("")  # resets padding and truncation, which an earlier call may have left in its definition
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = [tokenizer.special_tokens_map, tokenizer.chat_template, transformers.__version__]
    registry = {name: dataclasses.asdict(c) for name, c in (COMPARISON_COLUMNS | ANSWER_COLUMNS).items()}
    functions = (read_row, Encoding, DataLayout, example_of, usable_part, prompt_hash, _features)
    code = [inspect.getsource(inspect.getmodule(f)) for f in functions]
    parts = [code, source.content, len(source.dataset), content, special, dataclasses.asdict(encoding), registry]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _features() -> Features:
    """The columns of the cached table: those of `PreferenceData`, and the counts for the audit."""
    text, int32, int64 = map(Value, ("string", "int32", "int64"))
    features = {"id": text, "subset": text, "prompt": int64, "row": List(int64)}
    features |= {"prefix_ids": List(int32), "answer_ids": List(List(int32)), "answer_hash": List(int64)}
    features |= {"prefix_length": int32, "answer_row": List(int64)}
    features |= dict.fromkeys(("answer_lengths", "answer", "chosen", "rejected"), List(int32))
    features |= dict.fromkeys((*COMPARISON_COLUMNS, *ANSWER_COLUMNS), List(Value("float32")))
    return Features(features | dict.fromkeys((*NOTED, *DROPPED), int32))


def encode_batch(batch, indices, *, source: Source, tokenizer: Any, encoding: Encoding, features: Features) -> pa.Table:
    """A table of `features` with one row for each row of `batch`. Raises `InputError`."""
    examples, table = [], []
    for values in zip(*batch.values(), strict=True):
        try:
            examples.append(read_row(dict(zip(batch, values, strict=True)), encoding))
        except RowError as error:
            examples.append(error)
    for i, example, sequences in zip(indices, examples, encode_examples(examples, tokenizer, encoding), strict=True):
        if isinstance(sequences, RowError):
            raise InputError(f"{source.row_name(i)}: {sequences}")
        part = usable_part(example, sequences, encoding, tokenizer.bos_token_id)
        row = token_columns({_hash(ids): ids for ids in part.sequences})
        row |= {"id": example.id or str(i), "subset": example.subset}
        row |= {"prompt": prompt_hash(example, row["prefix_ids"]), "row": [i] * len(part.kept)}
        row |= {"answer": part.answers, "answer_row": [i] * len(part.answers)}
        row |= dict.fromkeys((*NOTED, *DROPPED), 0) | part.noted | part.dropped | {"tied": example.num_tied}
        row |= {side: [comparison[n] for comparison in part.comparisons] for n, side in enumerate(SIDES)}
        for columns, places in ((COMPARISON_COLUMNS, part.kept), (ANSWER_COLUMNS, part.answers)):
            for name, column in columns.items():
                values = example.columns.get(name)
                row[name] = [column.default if values is None else values[p] for p in places]
        table.append(row)
    return pa.Table.from_pylist(table, schema=features.arrow_schema)


def token_columns(sequences: dict[int, np.ndarray]) -> Row:
    """The token columns of a prompt. `sequences`: {hash: tokens of prompt and answer}."""
    tree = make_tree(list(sequences.values()))
    row = {"prefix_ids": tree.prefix, "prefix_length": len(tree.prefix), "answer_hash": list(sequences)}
    return row | {"answer_ids": tree.answers, "answer_lengths": list(map(len, tree.answers))}


def _hash(ids: np.ndarray) -> int:
    """A signed 64-bit hash of int32 token ids, the same on every machine."""
    return xxhash.xxh64_intdigest(ids.astype("<i4", copy=False).tobytes()) - (1 << 63)


# ---------------------------------------------------------------- groups
def same_prompt(prompts: Sequence[int]) -> list[list[int]]:
    """The rows of each prompt, in order of first appearance. `prompts`: the hash of the prompt of each row."""
    return pd.Series(range(len(prompts))).groupby(np.asarray(prompts), sort=False).agg(list).tolist()


def merge_rows(rows: Sequence[Row]) -> Row:
    """One prompt with all answers and comparisons of `rows`, whose prompts are equal.

    Answers with equal tokens become one answer, with the columns of the first one. All comparisons are kept, including
    duplicate and contradictory ones. `id` and `subset` are those of the first row.
    """
    sequences: dict[int, np.ndarray] = {}  # by hash, in the order of the answers
    place_of: dict[int, int] = {}
    of_answers, of_pairs = ("answer", "answer_row", *ANSWER_COLUMNS), ("row", *COMPARISON_COLUMNS)
    merged: Row = {name: [] for name in (*SIDES, *of_answers, *of_pairs)}
    for row in rows:
        for n, (content, tokens) in enumerate(zip(row["answer_hash"], row["answer_ids"], strict=True)):
            if content not in sequences:
                place_of[content] = len(sequences)
                sequences[content] = np.array([*row["prefix_ids"], *tokens], np.int32)
                for name in of_answers:
                    merged[name].append(row[name][n])
        for side in SIDES:
            merged[side] += [place_of[row["answer_hash"][n]] for n in row[side]]
        for name in of_pairs:
            merged[name] += row[name]
    merged |= {name: rows[0][name] for name in ("id", "subset", "prompt")}
    merged |= {count: sum(row[count] for row in rows) for count in (*NOTED, *DROPPED)}
    return merged | token_columns(sequences)


def split_row(row: Row, max_answers: int) -> Iterator[Row]:
    """Split a prompt into parts with at most `max_answers` answers each. The first part gets all audit counts.

    Comparisons between answers of different parts are dropped and counted as "split".
    """
    pairs = list(zip(row["chosen"], row["rejected"], strict=True))
    parts = partition(len(row["answer_ids"]), pairs, max_answers) or [[]]  # without answers: its counts
    part_of = {n: p for p, part in enumerate(parts) for n in part}
    for p, part in enumerate(parts):
        kept = [c for c, (chosen, rejected) in enumerate(pairs) if part_of[chosen] == part_of[rejected] == p]
        piece = {name: [row[name][n] for n in part] for name in ("answer", "answer_row", *ANSWER_COLUMNS)}
        piece |= {name: [row[name][c] for c in kept] for name in ("row", *COMPARISON_COLUMNS)}
        piece |= {side: [part.index(row[side][c]) for c in kept] for side in ("chosen", "rejected")}
        piece |= {name: row[name] for name in ("subset", "prompt")}
        piece |= {"id": row["id"] if len(parts) == 1 else f"{row['id']}.{p + 1}"}
        piece |= {count: row[count] if p == 0 else 0 for count in (*NOTED, *DROPPED)}
        if p == 0:
            piece["split"] += sum(part_of[chosen] != part_of[rejected] for chosen, rejected in pairs)
        sequences = {row["answer_hash"][n]: np.array([*row["prefix_ids"], *row["answer_ids"][n]]) for n in part}
        yield piece | token_columns(sequences)


def partition(num_answers: int, pairs: Sequence[tuple[int, int]], max_answers: int) -> list[list[int]]:
    """Split the answers into sorted parts of at most `max_answers`. A greedy search keeps compared `pairs` together.

    Each comparison, the most frequent first, unites the sets of its answers if they fit into a part; sets share parts.
    """
    set_of = [[n] for n in range(num_answers)]
    for (one, other), _ in Counter(tuple(sorted(pair)) for pair in pairs).most_common():
        if set_of[one] is not set_of[other] and len(set_of[one]) + len(set_of[other]) <= max_answers:
            united = set_of[one] + set_of[other]
            for n in united:
                set_of[n] = united
    parts: list[list[int]] = []
    for members in sorted({id(s): s for s in set_of}.values(), key=len, reverse=True):  # first-fit decreasing
        home = next((part for part in parts if len(part) + len(members) <= max_answers), None)
        home.extend(members) if home is not None else parts.append(list(members))
    return sorted(sorted(part) for part in parts)
