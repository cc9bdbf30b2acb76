"""Whole runs of the program on a tiny model, for the tests that need one: start them, read what they left, compare."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent

SMALL = [f"--config={ROOT / 'tests' / 'small.yaml'}"]
KILL_AT = """
import os, pathlib, shutil
from rm.config import files
from rm.train import checkpoint, sharding
count, rank = [0], os.environ.get("RANK", "0")
def kill(function):
    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == {n} and rank == "{rank}":
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return counted
save = checkpoint.Checkpoints.save
def counting(self):
    if self.state.step == {step}:  # from here on, every operation on files counts
        for owner, name in [(checkpoint, "save_file"), (files, "fsync"), (files, "digest"), (sharding, "digest"),
                            (shutil, "rmtree"), (os, "unlink"), (os, "fsync"), (pathlib.Path, "mkdir"),
                            (pathlib.Path, "rename"), (pathlib.Path, "write_text")]:
            setattr(owner, name, kill(getattr(owner, name)))
    save(self)
    with open("-".join(["saved", rank, str(self.state.step)]), "w") as file:
        file.write(str(count[0]))
checkpoint.Checkpoints.save = counting
"""  # kill `rank` at operation `n` from the checkpoint of `step` on; saved-RANK-STEP has their number


def merged(options: list[str]) -> list[str]:
    """A command line in which the last of equal options is kept: the program takes each option once."""
    last: dict[str, list[str]] = {}
    for option in options:
        if option.startswith("--") or "=" in option:
            name = option if option.startswith("--config=") else option.removeprefix("--").partition("=")[0]
            last.pop(name, None)
            last[name] = [option]
        else:
            last[name].append(option)  # the value of the option before it
    return [word for words in last.values() for word in words]


def reset_accelerate():
    """Accelerate keeps its state in singletons; a second run in one process starts afresh."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def lines(folder, key="train/loss"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(one, other, loss=1e-6, weight=1e-5):
    np.testing.assert_allclose(lines(one), lines(other), atol=loss)
    # AdamW and clipping hide a wrong scale of the gradient; its norm does not
    np.testing.assert_allclose(lines(one, "optim/grad_norm"), lines(other, "optim/grad_norm"), rtol=1e-4)
    assert lines(one, "optim/learning_rate") == lines(other, "optim/learning_rate")
    np.testing.assert_allclose(lines(one, "eval/loss"), lines(other, "eval/loss"), atol=1e-5)
    np.testing.assert_allclose(*map(all_traces, (one, other)), atol=1e-4)
    a, b = weights(one), weights(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=weight, rtol=0, msg=name)


def all_traces(folder) -> list[float]:
    """The rewards along all answers in samples/."""
    paths = sorted((folder / "samples").iterdir())
    records = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    pairs = [record for record in records if "answers" not in record]
    traces = [record[f"token_rewards_{side}"] for record in pairs for side in ("chosen", "rejected")]
    traces += [answer["token_rewards"] for record in records for answer in record.get("answers", ())]
    return [reward for trace in traces for _, reward in trace]


def program(*options: str, launcher=(sys.executable,), cwd=None, script=ROOT / "train_rm.py"):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(script), *merged([*SMALL, *options])]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


def wait_until(condition, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def record(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("speed/")} for row in rows]


def summary(folder) -> dict:
    """The summary in results.json without what depends on the clock, the memory and the place."""
    values = json.loads((folder / "results.json").read_text())["summary"]
    return {k: v for k, v in values.items() if k != "output_dir" and not k.startswith("speed/")}


def in_copy(run: Path, name: str, step: int) -> str:
    """The option with which a copy of `run`, next to it, resumes from its checkpoint after `step`."""
    folder = shutil.copytree(run, run.parent / name)
    return f"--resume_from_checkpoint={folder / 'checkpoints' / f'step-{step}'}"


def assert_same_bits(one, other, also_kept=True):
    """Two runs that cannot be told apart but by the clock; `also_kept`: and have the same checkpoints."""
    kept = [{path.name for path in (run / "checkpoints").glob("step-*") if path.suffix == ""} for run in (one, other)]
    assert kept[0] == kept[1] or not also_kept
    for name in kept[0] & kept[1]:
        states = [json.loads((run / "checkpoints" / name / "state.json").read_text()) for run in (one, other)]
        assert all(states[0][key] == states[1][key] for key in ("best", "skipped_steps"))
    assert record(one) == record(other)
    assert summary(one) == summary(other)
    (name,) = {path.name for path in one.glob("*.safetensors")}
    assert (one / name).read_bytes() == (other / name).read_bytes()


def mixture(folder: Path) -> list[str]:
    """Two files of different formats in `folder`, and the options to train on them and evaluate on two sets."""
    from rm.data.toy import toy_dataset

    def text(row):
        start = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in row["prompt"]) + "<|assistant|>"
        return {side: start + row[side][0]["content"] for side in ("chosen", "rejected")} | {"margin": 0.25}

    train, test = toy_dataset("train", 80, 42), toy_dataset("test", 30, 42)
    for name, rows in {
        "plain": [text(row) for row in train.select(range(40))],
        "talk": list(train.select(range(40, 80))),
        "plain-test": [text(row) for row in test.select(range(12))],
        "talk-test": list(test.select(range(12, 30))),
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {name: str(folder / f"{name}-test.jsonl") for name in ("plain", "talk")}
    options = [f"--dataset_name={[str(folder / f'{name}.jsonl') for name in names]}", "--dataset_weights=[1.5, 0.5]"]
    return [*options, f"--eval_dataset_name={names}"]
