"""From a data set's name to its rows: hub, local files and folders, the embedded toy data; errors name file and row."""

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
import xxhash
from datasets import Dataset, DatasetDict
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError

from rm.config.errors import InputError
from rm.data.toy import toy_dataset

logger = logging.getLogger(__name__)

TOY_PAIRS = {"train": 8000, "test": 1000}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
EXTENSIONS = ".json, .jsonl, .parquet or .csv (also with .gz)"

logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # their errors are reported here


class MissingSplit(InputError):
    """The split does not exist; `splits` are those that do."""

    def __init__(self, name: str, split: str, splits: list[str]):
        fix = "set dataset_train_split or dataset_test_split, give eval_dataset_name, or hold out an eval_fraction"
        super().__init__(f"{name}: there is no split {split!r}, only {', '.join(splits)}; {fix}")
        self.splits = splits


@dataclass(frozen=True)
class Source:
    """One split as it was loaded.

    content: a hash of the files' content, or the hub's fingerprint; files: the local files, in order; rows: of a
    selection, the number of each row in the whole split.
    """

    dataset: Dataset
    name: str
    content: str
    files: tuple[str, ...] = ()
    rows: np.ndarray | None = None

    def row_name(self, row: int) -> str:
        """Row `row` of `dataset` as "FILE, row N"; N counts from 1 in the file (or in the split of a hub data set)."""
        row = row if self.rows is None else int(self.rows[row])
        for file in self.files if len(self.files) > 1 else ():
            num_rows = _prepared(Path(file), None)[0].info.splits["train"].num_examples
            if row < num_rows:
                return f"{file}, row {row + 1}"
            row -= num_rows
        return f"{self.name}, row {row + 1}"

    def select(self, rows) -> "Source":
        before = np.asarray(rows) if self.rows is None else self.rows[np.asarray(rows)]
        return dataclasses.replace(self, dataset=self.dataset.select(rows), rows=before)

    def first(self, num_rows: int | None) -> "Source":
        """The first `num_rows` rows (None: all); a warning and all rows where fewer exist."""
        if num_rows is None or num_rows == len(self.dataset):
            return self
        if num_rows > len(self.dataset):
            logger.warning("%s: %d rows requested, %d exist; using all", self.name, num_rows, len(self.dataset))
        return self.select(range(min(num_rows, len(self.dataset))))

    @property
    def key(self) -> str:
        """Differs wherever the rows could."""
        return f"{self.content}-{'all' if self.rows is None else xxhash.xxh3_128_hexdigest(self.rows.tobytes())}"


def load_source(
    name: str,
    *,
    split: str,
    dataset_config: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    accept_only_split: bool = False,
) -> Source:
    """One split of a hub data set, a local file or folder, a `save_to_disk` folder, or the embedded "toy" data.

    Args:
        max_samples: use the first N rows (None: all); of the toy data N are drawn from `seed`.
        accept_only_split: use the only split where `split` does not exist. A file has one split, "train".

    Raises:
        InputError: missing, empty or broken files, no such split, the hub is not reached.
    """
    try:
        source = _open(name, dataset_config, split, max_samples, seed)
    except MissingSplit as error:
        if not accept_only_split or len(error.splits) != 1:
            raise
        source = _open(name, dataset_config, error.splits[0], max_samples, seed)
    if len(source.dataset) == 0:
        raise InputError(f"{source.name}: there are no rows; give a data set with preference pairs")
    return source.first(max_samples)


def _open(name: str, config: str | None, split: str, max_samples: int | None, seed: int) -> Source:
    """All rows of the split. Any error of a reader becomes one line that names the file."""
    if name == "toy":
        if split not in TOY_PAIRS:
            raise MissingSplit(name, split, list(TOY_PAIRS))
        toy = toy_dataset(split, max_samples or TOY_PAIRS[split], seed)
        return Source(toy, f"toy, split {split}", toy._fingerprint)
    if "://" in name:
        raise InputError(f"{name}: is a URL; download the file and give its path")
    path = Path(name).expanduser()
    is_local = os.path.exists(path) or path.is_absolute() or name.startswith((".", "~")) or _extension(path) in BUILDERS
    if is_local and not os.path.exists(path):
        raise InputError(f"{name}: there is no such file or folder")
    if path.is_file() and _extension(path) not in BUILDERS:
        raise InputError(f"{name}: unknown extension; use {EXTENSIONS}")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{name}: the file is empty")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = _pick_split(datasets.load_from_disk(str(_plain_path(path))), name, split)
            content = "".join(map(_hash_file, sorted(path.rglob("*.arrow"))))
            return Source(dataset, f"{name}, split {split}", f"{content}-{split}")
        with progress_bars(not path.is_file() or path.stat().st_size > 100e6):
            dataset, files, content = _build(path if is_local else name, config, split)
    except InputError:
        raise
    except Exception as error:  # dozens of types: Arrow's, pandas', gzip's, Unicode's, the hub's
        if not is_local:
            problem = f"no local file or folder, and the hub does not provide it: {one_line(error)}"
            raise InputError(f"{name}: {problem}") from error
        if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)) and path.is_dir():
            raise InputError(f"{name}: the folder has no data files; use {EXTENSIONS}") from error
        files = [path] if path.is_file() else sorted(path.rglob("*.jsonl*"))
        files = [file for file in files if _extension(file) in (".json", ".jsonl")]
        found = (_first_bad_row(file, name if file == path else str(file)) for file in files)
        raise InputError(next(filter(None, found), f"{name}: cannot be read: {one_line(error)}")) from error
    return Source(dataset, name if path.is_file() else f"{name}, split {split}", content, files)


def _build(place: Path | str, config: str | None, split: str) -> tuple[Dataset, tuple[str, ...], str]:
    """(rows, local files, content) by `datasets.load_dataset`'s own builder."""
    builder, content = _prepared(place, config)
    if split.partition("[")[0] not in builder.info.splits:  # "train[:10%]" is a split too
        raise MissingSplit(str(place), split, list(builder.info.splits))
    if builder.info.splits[split.partition("[")[0]].num_examples == 0:
        raise InputError(f"{place}: there are no rows; give a data set with preference pairs")
    dataset = builder.as_dataset(split=split)
    files = (builder.config.data_files or {}).get(split, ()) if isinstance(place, Path) else ()
    files = (str(place),) if os.path.isfile(place) else tuple(_target(str(file)) for file in files)
    return dataset, files, f"{content}-{split}" if content else dataset._fingerprint


def _prepared(place: Path | str, config: str | None) -> tuple[datasets.DatasetBuilder, str]:
    """(builder whose rows are in the cache, hash of all local files and of their split).

    The cache of `datasets` compares modification times only: replaced content with the old time would not be noticed.
    """
    path, options = str(_plain_path(place) if isinstance(place, Path) else place), {}
    if os.path.isfile(path):
        options = {"data_files": {"train": path}}
        path = BUILDERS[_extension(place)]
        if path == "csv":  # as they are: pandas would read "NA" as null and "007" as 7
            options["converters"] = dict.fromkeys(("prompt", "chosen", "rejected", "id", "subset"), str)
            options["keep_default_na"] = False
    builder, content = datasets.load_dataset_builder(path, config, **options), ""
    if isinstance(place, Path):
        splits = [[str(split), *map(_hash_file, files)] for split, files in builder.config.data_files.items()]
        content = xxhash.xxh3_128_hexdigest(json.dumps(splits).encode())
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE, "content", content))
        builder = datasets.load_dataset_builder(path, config, **options)
    builder.download_and_prepare()
    return builder, content


PATTERN = re.compile(r"[*?\[\]{}]|::")  # what `datasets` takes for a pattern, or for a chain of file systems


def _plain_path(path: Path) -> Path:
    """`path`, or a place in the cache with links to it, or to its files, where its name could be a pattern."""
    path = path.resolve()
    if not PATTERN.search(str(path)):
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
    """xxh3-128 of the content."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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
    if isinstance(error, StopIteration):  # raised by the JSON reader for an empty file
        return "the file is empty"
    fix = "; write the file in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return " ".join(f"{type(error).__name__}: {error}{fix}".split())


def _first_bad_row(path: Path, name: str) -> str | None:
    """Where and why the fast reader rejected a JSON file, as "NAME, row N: ...", by a slow second reading."""
    row = None
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if file.peek(1)[:1] == b"[":
                values = json.loads(file.read().decode())
            else:
                values = (json.loads(line.decode()) for line in file if line.strip())
            row = 1
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
    stores the whole part as JSON text without a warning: thousands of answers get quotes and escapes. So JSON lines
    are read once more, in C++ and in constant memory, with the types given.
    """
    fields = [field for field in source.dataset.features.arrow_schema if field.name in columns]
    schema = pa.schema([field for field in fields if "extension" not in str(field.type)])  # not type Json: any value
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pa.json.ReadOptions(block_size=16 << 20)  # a row must fit into a block
    for file in map(Path, source.files):
        if _extension(file) not in (".json", ".jsonl"):
            continue
        name = source.name if len(source.files) == 1 else str(file)
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            if stream.peek(1)[:1] == b"[":  # read as a whole, by a reader that replaces a lone surrogate by nothing
                if re.search(rb"\\u[dD][89a-fA-F]", stream.read()) and (bad := _first_bad_row(file, name)):
                    raise InputError(bad)
                continue
            row = 1
            try:
                for batch in pa.json.open_json(stream, read, parse):
                    row += batch.num_rows
            except pa.ArrowInvalid as error:
                message, _, row_of_block = str(error).rpartition(" in row ")
                fix = "; give the column one type" if "changed" in message else ""
                raise InputError(f"{name}, row {row + int(row_of_block or 0)}: {message or error}{fix}") from error


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets` unless `show`."""
    hide = not show and not datasets.utils.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
