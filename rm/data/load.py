"""From a data set's name to its rows: hub, local files and folders, the embedded toy data; errors name file and row."""

import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa
import pyarrow.json
import xxhash
from datasets import Dataset, DatasetDict

from rm.config.errors import InputError
from rm.data.toy import LABELS, toy_dataset

logger = logging.getLogger(__name__)

TOY_ROWS = {"train": 8000, "test": 1000}
BLOCK = 16 << 20  # bytes; a row of JSON lines must fit into a block
MAX_DEPTH = 500  # brackets in a line of JSON whose nesting is checked
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # their errors are reported here
if not sys.stderr.isatty():
    datasets.disable_progress_bars()


@dataclass(frozen=True)
class Source:
    """One split as it was loaded.

    dataset: its rows, or the first of them. content: a hash of the files' content, or the hub's fingerprint.
    files: the local files, in order.
    """

    dataset: Dataset
    name: str
    content: str
    files: Sequence[str] = ()

    def row_name(self, row: int) -> str:
        """Row `row` of `dataset` as "FILE, row N"; N counts from 1 in the file (or in the split of a hub data set)."""
        for file in self.files if len(self.files) > 1 else ():
            num_rows = _prepared(Path(file), None)[0].info.splits["train"].num_examples
            if row < num_rows:
                return f"{file}, row {row + 1}"
            row -= num_rows
        return f"{self.name}, row {row + 1}"


def load_source(
    name: str,
    *,
    split: str,
    dataset_config: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    accept_only_split: bool = False,
) -> Source:
    """One split of a hub data set, a local file or folder, a `save_to_disk` folder, or the embedded data.

    Args:
        max_samples: use the first N rows (None, or fewer exist: all); of the toy data N are drawn from `seed`.
        accept_only_split: use the only split where `split` does not exist. A file has one split, "train".

    Raises:
        InputError: missing, empty or broken files, no such split, the hub is not reached.
    """
    path, files, cache = Path(os.path.expanduser(name)), [], datasets.config.HF_DATASETS_CACHE
    exists, is_file = os.path.exists(path), os.path.isfile(path)
    is_path = path.is_absolute() or name.startswith((".", "~")) or _extension(path) in BUILDERS
    if not exists and (is_path or len(name) > 255):
        raise InputError(f"{name}: there is no such file or folder")
    try:
        os.makedirs(cache, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        fix = "set HF_HOME to a folder that can be written"
        raise InputError(f"the cache of data sets cannot be written ({error}); {fix}") from None
    if is_file and _extension(path) not in BUILDERS:
        raise InputError(f"{name}: unknown extension; use {', '.join(BUILDERS)}, also with .gz")
    try:
        if name in ("toy", "toy_groups"):
            split = _choose_split(name, split, TOY_ROWS, accept_only_split)
            labels = (dataset_config or LABELS[0]) if name == "toy_groups" else dataset_config
            if labels and (name == "toy" or labels not in LABELS):
                raise InputError(f"{name}: there is no dataset_config {labels!r}; toy_groups has {', '.join(LABELS)}")
            dataset = toy_dataset(split, max_samples or TOY_ROWS[split], seed, labels)
            content = dataset._fingerprint
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(_plain_path(path)))
            splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
            split = _choose_split(name, split, splits, accept_only_split)
            dataset, content = splits[split], "".join(map(_hash_file, sorted(path.rglob("*.arrow"))))
        else:
            builder, content = _prepared(path if exists else name, dataset_config)
            if split.partition("[")[0] not in builder.info.splits:  # "train[:10%]" is a split too
                split = _choose_split(name, split, builder.info.splits, accept_only_split)
            dataset = builder.as_dataset(split=split)
            content = content or dataset._fingerprint
            if exists:
                files = [str(path)] if is_file else list(map(_target, builder.config.data_files.get(split, ())))
    except InputError:
        raise
    except Exception as error:  # dozens of types: Arrow's, pandas', gzip's, Unicode's, the hub's
        if not exists:
            raise InputError(f"{name}: no local file or folder, and the hub has none: {one_line(error)}") from error
        for file in [path] if is_file else sorted(path.rglob("*.jsonl")):
            _check_json_lines(file, name if file == path else str(file), pa.schema([]))
        raise InputError(f"{name}: cannot be read: {one_line(error)}") from error
    title = name if is_file else f"{name}, split {split}"
    if max_samples is not None and max_samples > len(dataset):
        logger.warning("%s: %d rows requested, %d exist; using all", title, max_samples, len(dataset))
    elif max_samples is not None:
        dataset = dataset.take(max_samples)
    return Source(dataset, title, f"{content}-{split}", files)


def _choose_split(name: str, split: str, splits: Iterable[str], accept_only_split: bool) -> str:
    splits = list(splits)
    if split in splits:
        return split
    if accept_only_split and len(splits) == 1:
        return splits[0]
    fix = "set dataset_train_split or dataset_test_split, give eval_dataset_name, or hold out an eval_fraction"
    raise InputError(f"{name}: there is no split {split!r}, only {', '.join(splits)}; {fix}")


def _prepared(place: Path | str, config: str | None) -> tuple[datasets.DatasetBuilder, str]:
    """(builder whose rows are in the cache, hash of all local files and of their split).

    The cache of `datasets` compares modification times only: replaced content with the old time would not be noticed.
    """
    path, options, content = str(_plain_path(place) if isinstance(place, Path) else place), {}, ""
    if os.path.isfile(path):
        options = {"data_files": {"train": path}}
        path = BUILDERS[_extension(place)]
    builder = datasets.load_dataset_builder(path, config, **options)
    if isinstance(place, Path):
        files = builder.config.data_files
        if builder.name == "csv":  # as they are: pandas would read "NA" as null and "007" as 7
            options["converters"] = dict.fromkeys(("prompt", "chosen", "rejected", "id", "subset"), str)
            options["keep_default_na"] = False
            with _open(Path(next(iter(files.values()))[0])) as stream:
                header = stream.readline()
            separator = "semicolons" if b";" in header else "tabs" if b"\t" in header else None
            if separator and b"," not in header:
                fix = "separate them by commas: pandas.read_csv(file, sep=None).to_csv(file, index=False)"
                raise InputError(f"{place}: the columns are separated by {separator}; {fix}")
        splits = [[str(split), *map(_hash_file, of_split)] for split, of_split in files.items()]
        content = xxhash.xxh3_128_hexdigest(json.dumps(splits).encode())
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE, "content", content))
        builder = datasets.load_dataset_builder(path, config, **options)
    for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()) if content else ():
        if _extension(Path(file)) in (".json", ".jsonl") and not os.path.exists(builder.cache_dir):
            _check_nesting(Path(file), _target(file))
    builder.download_and_prepare()
    if builder.name == "csv" and "__index_level_0__" in builder.info.features:
        raise InputError(f"{place}: rows have more fields than the header; put texts with commas into quotes")
    return builder, content


def _plain_path(path: Path) -> Path:
    """`path`, or a place in the cache with links to it, or to its files, where its name could be a pattern."""
    path = path.resolve()
    if not re.search(r"[*?\[\]{}]|::", str(path)):  # what `datasets` takes for a pattern, or a chain of file systems
        return path
    name = "data" + _extension(path) + ".gz" * (path.suffix == ".gz")
    targets = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()} or {Path(name): path}
    folder = Path(datasets.config.HF_DATASETS_CACHE, "links")
    folder /= xxhash.xxh3_128_hexdigest(b"\0".join(map(os.fsencode, sorted(targets.values()))))
    for link, target in targets.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / link).symlink_to(target)
    return folder if path.is_dir() else folder / name


def _target(file: str) -> str:
    """The file itself, where `file` is a link of `_plain_path`."""
    return os.readlink(file) if file.startswith(str(Path(datasets.config.HF_DATASETS_CACHE, "links"))) else file


def _hash_file(file: str | Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _extension(path: Path) -> str:
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def one_line(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    while error.__cause__:
        error = error.__cause__
    fix = "; write the file in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return " ".join(f"{type(error).__name__}: {error}{fix}".split())


def check_late_rows(source: Source, columns: set[str]) -> None:
    """Raise `InputError` for a value whose type differs from that of the first 10 MB of a file of JSON lines.

    Where a later part differs (one number among the strings), `datasets` 5.2 stores it as JSON text without a warning.
    """
    fields = [field for field in source.dataset.features.arrow_schema if field.name in columns]
    schema = pa.schema([field for field in fields if "extension" not in str(field.type)])  # not type Json: any value
    for file in source.files:
        _check_json_lines(Path(file), source.name if len(source.files) == 1 else file, schema)


def _check_nesting(file: Path, name: str) -> None:
    """Raise `InputError` for a line that is nested so deeply that Arrow would crash: only lines with many brackets are
    parsed here."""
    with _open(file) as stream:
        is_array = stream.peek(1)[:1] == b"["  # is read by another parser, which has a limit
        for row, line in enumerate(() if is_array else stream, start=1):
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
                try:
                    json.loads(line)
                except RecursionError:
                    raise InputError(f"{name}, row {row}: is nested too deeply") from None
                except ValueError:
                    pass  # Arrow names the problem


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")


def _check_json_lines(file: Path, name: str, schema: pa.Schema) -> None:
    """Raise `InputError` for the first line that is no JSON object of the schema; in C++ and in constant memory."""
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pa.json.ReadOptions(block_size=BLOCK)
    row = 1
    try:
        with _open(file) as stream:
            if _extension(file) not in (".json", ".jsonl") or stream.peek(1)[:1] == b"[":  # is read as a whole
                return
            for batch in pa.json.open_json(stream, read, parse):
                row += batch.num_rows
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        message, _, row_of_block = str(error).partition(" in row ")
        fixes = {"changed": "; give the column one type", "straddling": f"; a row may have {BLOCK >> 20} MB"}
        fix = "".join(text for word, text in fixes.items() if word in message)
        raise InputError(f"{name}, row {row + int(row_of_block or 0)}: {message}{fix}") from error
