"""Tests of metrics.jsonl: every number is in the file at once, and a resumed run continues it."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from rm.config.files import DiskError
from rm.log.trackers import RunLog

TOKEN = "hf_" + "a" * 34


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines(tmp_path, config):
    before = time.time()
    log = RunLog(config(), tmp_path / "run", "n", {}, None, True)
    path = tmp_path / "run" / "metrics.jsonl"
    log.log({"train/loss": np.float32(0.5), "train/pairs": np.int64(64), "eval/accuracy": math.nan}, 10)
    assert path.read_text().endswith("}\n")  # before `close`
    log.log({"train/loss": math.inf, f"eval/{TOKEN}/key": -math.inf}, 20)
    log.sync()
    log.close()
    assert log.num_lines == 2
    first, second = lines(path)
    assert before - 1 < first.pop("time") <= second.pop("time") <= time.time() + 1
    assert first == {"step": 10, "train/loss": 0.5, "train/pairs": 64, "eval/accuracy": "NaN"}
    assert second == {"step": 20, "train/loss": "Infinity", "eval/[redacted]/key": "-Infinity"}
    assert isinstance(first["train/pairs"], int) and math.isnan(float(first["eval/accuracy"]))


@pytest.fixture
def continued(tmp_path, config):
    """continued(n): the log of a run that resumes after `n` lines."""
    return lambda resume_lines: RunLog(config(), tmp_path, "n", {}, resume_lines, True)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_resume(tmp_path, continued, end, caplog):
    """The lines after the checkpoint and a torn last line go to metrics.jsonl.bak."""
    path = tmp_path / "metrics.jsonl"
    old = "".join(json.dumps({"step": step}) + end for step in (1, 2, 3)) + '{"step": 4, "to'
    path.write_bytes(old.encode())
    log = continued(2)
    log.log({}, 3)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3] and log.num_lines == 3
    backup = path.with_name("metrics.jsonl.bak")
    assert backup.read_bytes() == old.encode()
    backup.unlink()
    assert continued(3).num_lines == 3 and not backup.exists() and not caplog.records
    assert continued(5).num_lines == 3 and "has 3 of the 5 lines" in caplog.text
    assert continued(None).num_lines == 0 and path.read_text() == ""  # a new run
    assert len(lines(backup)) == 3


def test_error_names_the_file(tmp_path, continued):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(DiskError, match=f"Is a directory: '{path}'"):
        continued(1)
    path.rmdir()
    log = continued(None)
    log._file.close()
    log._file = open("/dev/full", "a")
    with pytest.raises(DiskError, match=f"No space left on device: '{path}'"):
        log.log({"a": 1}, 1)
