"""Reads the files of an offline W&B run: its history, config and tables as W&B would upload them."""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as pb

BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def run_dir(output_dir: Path) -> Path:
    """The folder of the only offline run under `output_dir`."""
    (folder,) = (Path(output_dir) / "wandb").glob("offline-run-*")
    return folder


def records(folder: Path) -> Iterator[pb.Record]:
    """All records of run-ID.wandb: a LevelDB log (7 bytes of file header, then chunks in blocks of 32 KiB, each with
    checksum, length and kind) of protobuf messages."""
    (log,) = folder.glob("run-*.wandb")
    data, at, message = log.read_bytes(), 7, b""
    while at < len(data):
        rest = BLOCK - at % BLOCK
        if rest < 7:  # too short for a chunk: padding
            at += rest
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        at += 7 + length
        message = chunk if kind in (WHOLE, FIRST) else message + chunk
        if kind in (WHOLE, LAST):
            yield pb.Record.FromString(message)


def items(update) -> dict:
    """{key: value} of a record's items; nested keys are joined with dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}


def history(folder: Path) -> list[dict]:
    """One dict for each call of `log`."""
    return [items(record.history.item) for record in records(folder) if record.HasField("history")]


def summary(folder: Path) -> dict:
    merged = {}
    for record in records(folder):
        merged |= items(record.summary.update)
    return merged


def config(folder: Path) -> dict:
    merged = {}
    for record in records(folder):
        merged |= items(record.run.config.update) | items(record.config.update)
    return merged


def tables(folder: Path, name: str) -> list[tuple[dict, list, list]]:
    """(the other values of its history line, columns, rows) of every Table logged under `name`."""
    found = []
    for line in history(folder):
        if line.get(f"{name}._type") == "table-file":
            raw = (folder / "files" / line[f"{name}.path"]).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == line[f"{name}.sha256"]
            table = json.loads(raw)
            assert len(table["data"]) == line[f"{name}.nrows"]
            found.append((line, table["columns"], table["data"]))
    return found


def pages(folder: Path, name: str) -> list[tuple[dict, str]]:
    """(the other values of its history line, HTML) of every Html logged under `name`."""
    found = []
    for line in history(folder):
        if line.get(f"{name}._type") == "html-file":
            raw = (folder / "files" / line[f"{name}.path"]).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == line[f"{name}.sha256"]
            found.append((line, raw.decode()))
    return found
