"""A data set's name to its rows: hub, local files and folders, the embedded toy data; errors that name file and row."""

import contextlib
import dataclasses
import gzip
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.json
from datasets import Dataset, DatasetDict
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError

from rm.config.errors import InputError
from rm.data.toy import toy_dataset

logger = logging.getLogger(__name__)

TOY_PAIRS = {"train": 8000, "test": 1000}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
EXTENSIONS = ".json, .jsonl, .parquet or .csv (also with .gz)"

logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # they log what they raise, and we report it


class MissingSplit(InputError):
    """The split that was asked for does not exist; `splits` are those that do."""

    def __init__(self, name: str, split: str, splits: list[str]):
        fix = "set dataset_train_split or dataset_test_split, give eval_dataset_name, or hold out an eval_fraction"
        super().__init__(f"{name}: there is no split {split!r}, only {', '.join(splits)}; {fix}")
        self.splits = splits


@dataclass(frozen=True)
class Source:
    """One split as it was loaded, with what it takes to name one of its rows to a person."""

    dataset: Dataset
    name: str
    files: tuple[str, ...] = ()  # the local files that hold the rows, in order
    rows: np.ndarray | None = None  # for a selection, each row's number in the whole split

    def row_name(self, row: int) -> str:
        """Row `row` of `dataset` as "FILE, row N", N counted from 0 in the file (or in the split of a hub data set)."""
        row = row if self.rows is None else int(self.rows[row])
        for file in self.files if len(self.files) > 1 else ():
            num_rows = len(_build(Path(file), None, "train")[0])
            if row < num_rows:
                return f"{file}, row {row}"
            row -= num_rows
        return f"{self.name}, row {row}"

    def select(self, rows) -> "Source":
        before = np.asarray(rows) if self.rows is None else self.rows[np.asarray(rows)]
        return dataclasses.replace(self, dataset=self.dataset.select(rows), rows=before)

    def first(self, num_rows: int | None) -> "Source":
        """The first `num_rows` rows in the data set's order (None: all); a warning and all rows where fewer exist."""
        if num_rows is None or num_rows == len(self.dataset):
            return self
        if num_rows > len(self.dataset):
            logger.warning("%s: %d pairs asked for, %d exist; using all", self.name, num_rows, len(self.dataset))
        return self.select(range(min(num_rows, len(self.dataset))))


def load_raw(
    dataset_name: str,
    *,
    split: str,
    dataset_config: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    accept_only_split: bool = False,
) -> Source:
    """One split of a hub data set, a local file or folder, a `save_to_disk` folder, or the embedded "toy" data.

    `max_samples` takes the first N rows in the data set's order (None: all); of the toy data N are drawn, by `seed`.
    A file has one split, "train". `accept_only_split`: if the data set has one split only, that is it.
    Raises `InputError`: files that are missing, empty or broken, no such split, the hub not reached.
    """
    try:
        source = _open(dataset_name, dataset_config, split, max_samples, seed)
    except MissingSplit as error:
        if not accept_only_split or len(error.splits) != 1:
            raise
        source = _open(dataset_name, dataset_config, error.splits[0], max_samples, seed)
    if len(source.dataset) == 0:
        raise InputError(f"{source.name}: there are no rows; give a data set with preference pairs")
    return source.first(max_samples)


def _open(name: str, config: str | None, split: str, max_samples: int | None, seed: int) -> Source:
    """All rows of the split. Whatever a reader raises becomes one line that names the file."""
    if name == "toy":
        if split not in TOY_PAIRS:
            raise MissingSplit(name, split, list(TOY_PAIRS))
        return Source(toy_dataset(split, max_samples or TOY_PAIRS[split], seed), f"toy, split {split}")
    if "://" in name:
        raise InputError(f"{name}: is a URL; download the file and give its path")
    path = Path(name).expanduser()
    is_local = path.exists() or path.is_absolute() or name.startswith((".", "~")) or _extension(path) in BUILDERS
    if is_local and not path.exists():
        raise InputError(f"{name}: there is no such file or folder")
    if path.is_file() and _extension(path) not in BUILDERS:
        raise InputError(f"{name}: unknown extension; use {EXTENSIONS}")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{name}: the file is empty")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset, files = _pick_split(datasets.load_from_disk(str(path)), name, split), ()
        else:
            with progress_bars(not path.is_file() or path.stat().st_size > 100e6):
                dataset, files = _build(path if is_local else name, config, split)
    except InputError:
        raise
    except Exception as error:  # dozens of types: Arrow's, pandas', gzip's, Unicode's, the hub's
        if not is_local:
            hub = f"no local file or folder, and the hub does not give it: {one_line(error)}"
            raise InputError(f"{name}: {hub}") from error
        if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)) and path.is_dir():
            raise InputError(f"{name}: the folder holds no data files; use {EXTENSIONS}") from error
        files = [path] if path.is_file() else sorted(path.rglob("*.jsonl*"))
        files = [file for file in files if _extension(file) in (".json", ".jsonl")]
        found = (_first_bad_row(file, name if file == path else str(file)) for file in files)
        raise InputError(next(filter(None, found), f"{name}: cannot be read: {one_line(error)}")) from error
    return Source(dataset, name if path.is_file() else f"{name}, split {split}", files)


def _build(path: Path | str, config: str | None, split: str) -> tuple[Dataset, tuple[str, ...]]:
    """What `datasets.load_dataset` does, but we also want the list of files and of splits that its builder knows."""
    if isinstance(path, Path) and path.is_file():
        builder_name, options = BUILDERS[_extension(path)], {"data_files": {"train": str(path.resolve())}}
        if builder_name == "csv":  # as they stand: pandas would read "NA" as null and "007" as 7
            options["converters"] = dict.fromkeys(("prompt", "chosen", "rejected", "id", "subset"), str)
            options["keep_default_na"] = False
    else:
        builder_name, options = str(path.resolve() if isinstance(path, Path) else path), {}
    builder = datasets.load_dataset_builder(builder_name, config, **options)
    builder.download_and_prepare()
    if split.partition("[")[0] not in builder.info.splits:  # "train[:10%]" is a split too
        raise MissingSplit(str(path), split, list(builder.info.splits))
    if builder.info.splits[split.partition("[")[0]].num_examples == 0:
        raise InputError(f"{path}: there are no rows; give a data set with preference pairs")
    files = (builder.config.data_files or {}).get(split, ())
    return builder.as_dataset(split=split), tuple(str(file) for file in files if os.path.isfile(file))


def _pick_split(saved: Dataset | DatasetDict, name: str, split: str) -> Dataset:
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise MissingSplit(name, split, list(splits))
    return splits[split]


def _extension(path: Path) -> str:
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def one_line(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    while error.__cause__:
        error = error.__cause__
    if isinstance(error, StopIteration):  # what the JSON reader raises where there is nothing to read
        return "the file is empty"
    fix = "; write the file in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return " ".join(f"{type(error).__name__}: {error}{fix}".split())


def _first_bad_row(path: Path, name: str) -> str | None:
    """Where and why the fast reader refused a JSON file, as "NAME, row N: ...", by a slow second reading."""
    row = None
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if file.peek(1)[:1] == b"[":
                values = json.loads(file.read().decode())
            else:
                values = (json.loads(line.decode()) for line in file if line.strip())
            row = 0
            for value in values:
                json.dumps(value, ensure_ascii=False).encode()  # finds lone surrogates
                if not isinstance(value, dict):
                    return f"{name}, row {row}: is not an object with keys"
                row += 1
    except Exception as error:
        return f"{name}{'' if row is None else f', row {row}'}: cannot be read: {one_line(error)}"
    return None


def check_late_rows(source: Source, columns: set[str]) -> None:
    """Raise `InputError` for a value whose type differs from that of the first 10 MB of a JSON file.

    `datasets` 5.2 infers the types from that first part. Where a later part differs (one number among the strings), it
    re-encodes the *whole part* as JSON and stores that as text: thousands of answers get quotes and escapes, without a
    word. So JSON lines are read once more, in C++ and in constant memory, with the types given.
    """
    fields = [field for field in source.dataset.features.arrow_schema if field.name in columns]
    schema = pa.schema([field for field in fields if "extension" not in str(field.type)])  # not type Json: any value
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pa.json.ReadOptions(block_size=16 << 20)  # a row must fit into a block
    for file in map(Path, source.files):
        if _extension(file) not in (".json", ".jsonl"):
            continue
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            if stream.peek(1)[:1] == b"[":  # read in one part, by a reader that takes a lone surrogate for nothing
                name = source.name if len(source.files) == 1 else str(file)
                if re.search(rb"\\u[dD][89a-fA-F]", stream.read()) and (bad := _first_bad_row(file, name)):
                    raise InputError(bad)
                continue
            row = 0
            try:
                for batch in pa.json.open_json(stream, read, parse):
                    row += batch.num_rows
            except pa.ArrowInvalid as error:
                message, _, row_of_block = str(error).rpartition(" in row ")
                where = f"{source.name if len(source.files) == 1 else file}, row {row + int(row_of_block or 0)}"
                fix = "; give the column one type" if "changed" in message else ""
                raise InputError(f"{where}: {message}{fix}") from error


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets` where the work takes no longer than a look at them."""
    hide = not show and not datasets.utils.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
