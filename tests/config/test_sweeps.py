"""The sweeps of configs/ as programs: a Slurm array task that is stopped and queued again, and an Optuna study."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, lines, wait_until

pytestmark = pytest.mark.slow
TORCHRUN = "torchrun --standalone --nproc_per_node=2"


@pytest.mark.parametrize("launcher, stopped", [("python", 128 + signal.SIGTERM), (TORCHRUN, 1)], ids=["1", "2"])
def test_a_slurm_task_that_reaches_its_limit_is_queued_again(tmp_path, launcher, stopped):
    """With one or two plain processes, and a stand-in for scontrol that writes down its arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/bash\necho "$@" >> scontrol.log\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    for name in ("rm", "configs", "train_rm.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = (ROOT / "tests" / "small.yaml").read_text().replace("max_steps: 4", "max_steps: 300")
    (tmp_path / "small.yaml").write_text(small)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = (ROOT / "configs" / "sweep_slurm.sh").read_text()
    assert script.count("\npython train_rm.py") == 1
    (tmp_path / "sweep.sh").write_text(script.replace("\npython train_rm.py", f"\n{launcher} train_rm.py"))
    env = os.environ | {"PATH": path, "CONFIG": "small.yaml", "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "77"}
    folder = tmp_path / "runs" / "sweep" / "5"
    metrics, log = folder / "metrics.jsonl", tmp_path / "scontrol.log"

    def start() -> subprocess.Popen:
        return subprocess.Popen(["bash", "sweep.sh"], cwd=tmp_path, env=env)

    for name, queued in (("SIGTERM", 0), ("SIGUSR1", 1)):
        task = start()
        before = len(lines(folder, "step")) if metrics.exists() else 0
        wait_until(lambda n=before + 2: metrics.exists() and len(lines(folder, "step")) >= n)
        task.send_signal(getattr(signal, name))
        assert task.wait(60) == stopped
        assert list((folder / "checkpoints").glob("step-*")) and not (folder / "finished.json").exists()
        assert (log.read_text() if log.exists() else "") == "requeue 77_5\n" * queued
    task = start()
    assert task.wait(300) == 0 and (folder / "finished.json").exists()
    assert len(lines(folder, "train/loss")) == 300
    config = json.loads((folder / "results.json").read_text())["config"]
    assert (config["learning_rate"], config["seed"]) == (1e-5, 2)


def test_two_workers_share_an_optuna_study(tmp_path):
    optuna = pytest.importorskip("optuna")
    options = [f"--config={ROOT / 'tests' / 'small.yaml'}", "--eval_steps=2", "--trials=2"]
    command = [sys.executable, ROOT / "configs" / "sweep_optuna.py", tmp_path / "study", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    study = optuna.load_study(study_name=str(tmp_path / "study"), storage=f"sqlite:///{tmp_path / 'study'}.db")
    assert [worker.returncode for worker in workers] == [0, 0] and "the best: trial-" in said[0]
    for trial in study.trials:
        summary = json.loads((tmp_path / "study" / f"trial-{trial.number}" / "results.json").read_text())["summary"]
        assert trial.value == summary["eval/accuracy"] and set(trial.intermediate_values) <= {2, 4}
        assert summary["train/steps"] == 4
    assert len(study.trials) == 4
