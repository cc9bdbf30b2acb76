"""Signals, to the program and to its launchers; a launcher that dies; one that is missing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, SMALL, assert_same_bits, lines, merged, record, wait_until, weights

from rm.train.processes import LAUNCHERS, STOP_SIGNALS, StopSignal

ENDLESS = ["dataset_name=toy", *SMALL, "--max_steps=100000", "--logging_steps=4", "--output_dir=out"]
LATEST = "--resume_from_checkpoint=latest"


def trains(folder) -> bool:
    return (folder / "out" / "metrics.jsonl").exists() and len(lines(folder / "out", "step")) >= 2


def checkpoints(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "out" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("name, count", [("SIGTERM", 1), ("SIGINT", 2), ("SIGUSR1", 1)])
def test_a_signal_writes_a_checkpoint(zygote, tmp_path, name, count):
    """To one process only: all agree on the step, and all end."""
    runs = zygote.start_many(count, ENDLESS, tmp_path)
    wait_until(lambda: trains(tmp_path))
    os.kill(runs[-1].pid, getattr(signal, name))
    assert [run.wait(30) for run in runs] == [-signal.SIGTERM] * count  # which a shell calls 143
    (step,) = checkpoints(tmp_path)
    assert lines(tmp_path / "out", "step")[-1] in range(step - 3, step + 1)
    assert f"stopped after step {step}; resume with --resume_from_checkpoint=latest --output_dir=out" in runs[0].stderr
    assert "Traceback" not in runs[0].stderr and not (tmp_path / "out" / "results.json").exists()


def test_stopped_between_two_log_lines_it_ends_with_the_same_bits(zygote, tmp_path):
    """What is logged is a mean since the last line: its first part must be in the checkpoint."""
    options = ["dataset_name=toy", *SMALL, "--max_steps=40", "--logging_steps=20"]
    zygote.run(2, [*options, "--output_dir=whole"], tmp_path)
    stop = f"import os, signal, train_rm\nskip = train_rm.seed_everything\n{STOP_AT.format(step=29)}"
    runs = zygote.start_many(2, [*options, "--output_dir=parts"], tmp_path, fault=stop)
    assert [run.wait() for run in runs] == [-signal.SIGTERM] * 2
    assert len(lines(tmp_path / "parts", "train/loss")) == 1
    zygote.run(2, [*options, "--output_dir=parts", LATEST], tmp_path)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", also_kept=False)


@pytest.mark.parametrize("count, when", [(1, 1), (1, 2), (2, 2)])
def test_a_signal_during_an_evaluation(zygote, tmp_path, count, when):
    """Also during the last one, after which there may be no time to save."""
    options = ["dataset_name=toy", *SMALL, "--max_steps=4", "--eval_steps=2"]
    zygote.run(count, [*options, "--output_dir=whole"], tmp_path)
    fault = SIGNAL_IN_EVALUATION.format(when=when)
    runs = zygote.start_many(count, [*options, "--output_dir=parts"], tmp_path, fault=fault)
    assert [run.wait() for run in runs] == [-signal.SIGTERM] * count
    step = 2 * when
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == [f"step-{step}"]
    assert f"stopped after step {step}" in runs[0].stderr
    zygote.run(count, [*options, "--output_dir=parts", LATEST], tmp_path)
    assert record(tmp_path / "whole") == record(tmp_path / "parts")
    assert weights(tmp_path / "whole").keys() == weights(tmp_path / "parts").keys()


SIGNAL_IN_EVALUATION = """
import os, signal, train_rm
evaluate, calls = train_rm.Evaluator.__call__, []
def interrupted(self, step):
    calls.append(1)
    if len(calls) == {when}:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(self, step)
train_rm.Evaluator.__call__ = interrupted
"""
STOP_AT = """
def seed_everything(seed, step, rank):
    if step == {step} and rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    skip(seed, step, rank)
train_rm.seed_everything = seed_everything
"""
SLOW_STEPS = """
import time, train_rm
loss = train_rm.pairwise_loss
def slow(*args, **kwargs):
    time.sleep(0.3)
    if train_rm.LATER: time.sleep(30)
    return loss(*args, **kwargs)
train_rm.pairwise_loss, train_rm.LATER = slow, False
receive = train_rm.StopSignal._receive
def received(self, *args):
    train_rm.LATER = True
    receive(self, *args)
train_rm.StopSignal._receive = received
"""


def test_a_second_signal_ends_at_once(zygote, tmp_path):
    run = zygote.start(ENDLESS, tmp_path, fault=SLOW_STEPS)  # from the first signal on a step takes 30 s
    wait_until(lambda: trains(tmp_path))
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(run.pid, signal.SIGINT)  # Ctrl-C reaches a process twice, from the terminal and from torchrun
    time.sleep(1.2)
    assert run.poll() is None
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(timeout=3) == -signal.SIGINT
    assert checkpoints(tmp_path) == []


def test_before_the_first_step_a_signal_ends_at_once(zygote, tmp_path):
    slow = "import time, train_rm\ntrain_rm.load_data = lambda *_, **__: (open('loading', 'w'), time.sleep(60))"
    run = zygote.start(ENDLESS, tmp_path, fault=slow)
    wait_until((tmp_path / "loading").exists)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(timeout=3) == -signal.SIGINT
    assert "interrupted; nothing had to be saved" in run.stderr and "Traceback" not in run.stderr
    run = zygote.start([*ENDLESS, "--overwrite_output_dir"], tmp_path, fault=slow)
    time.sleep(0.5)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(timeout=3) == -signal.SIGTERM


def start(launcher: list[str], folder, options=ENDLESS) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(ROOT / "train_rm.py"), *options]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder)


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def is_alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_accelerate_launch_of_one_process_leaves_no_orphan(tmp_path):
    """It passes no signal on, and when it is gone nobody waits for the trainer."""
    launcher = start(["accelerate.commands.launch", "--cpu", "--num_processes=1"], tmp_path)
    wait_until(lambda: trains(tmp_path))
    (trainer,) = descendants(launcher.pid)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=10) == -signal.SIGTERM
    wait_until(lambda: not is_alive(trainer), timeout=20)
    (step,) = checkpoints(tmp_path)
    assert f"stopped after step {step}" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on(tmp_path, number):
    launcher = start(["torch.distributed.run", "--standalone", "--nproc_per_node=2"], tmp_path)
    wait_until(lambda: trains(tmp_path))
    trainers = descendants(launcher.pid)
    launcher.send_signal(number)
    if number == signal.SIGINT:  # as from a terminal: to all of them
        for pid in trainers:
            os.kill(pid, number)
    assert launcher.wait(timeout=40) != 0
    assert not any(map(is_alive, trainers))
    (step,) = checkpoints(tmp_path)
    assert f"stopped after step {step}" in (tmp_path / "log").read_text()


SRUN = """#!/bin/bash
shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    tasks[rank]=$!
done
echo "${tasks[@]}" > tasks
for task in "${tasks[@]}"; do wait "$task"; code=$?; done
exit $code
"""
SCONTROL = "#!/bin/bash\nif [ $1 = show ]; then echo 127.0.0.1; else echo $* >> queue; fi\n"


@pytest.mark.slow
def test_slurm_puts_a_stopped_job_back_and_no_other(tmp_path):
    """The real script and processes; in place of Slurm two processes on this machine."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train_rm.py").symlink_to(ROOT / "train_rm.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "MASTER_PORT": port}
    env |= {"PATH": path, "ACCELERATE_USE_FSDP": "false", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "configs" / "slurm.sh"), *merged([*ENDLESS, "--max_steps=300", "--save_steps=1000"])]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        wait_until(lambda: trains(tmp_path))
        for pid in map(int, (tmp_path / "tasks").read_text().split()):
            os.kill(pid, signal.SIGUSR1)
        assert job.wait(timeout=90) == 143, (tmp_path / "log").read_text()
        assert (tmp_path / "queue").read_text() == "requeue 7\n"
        (step,) = checkpoints(tmp_path)
        assert 0 < step < 300
        assert subprocess.run(command, cwd=tmp_path, env=env, stdout=log, stderr=log, timeout=200).returncode == 0
    assert f"step-{step}: {step} steps are done" in (tmp_path / "log").read_text()
    assert (tmp_path / "queue").read_text() == "requeue 7\n" and weights(tmp_path / "out")
    wrong = subprocess.run([*command, "--max_steps=-1"], cwd=tmp_path, env=env, capture_output=True)
    assert wrong.returncode == 2 and (tmp_path / "queue").read_text() == "requeue 7\n"


# ------------------------------------------------------------------------------ in small


def test_the_death_of_the_launcher_counts_as_a_signal(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getppid", lambda: 77)
    by_hand = StopSignal()
    monkeypatch.setenv(LAUNCHERS[0], "NO")
    launched = StopSignal()
    assert not by_hand.received and not launched.received
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert not by_hand.received  # a shell that has gone, as after nohup
    assert launched.received


def test_several_processes_without_a_launcher(zygote, tmp_path):
    run = zygote.start(ENDLESS, tmp_path, WORLD_SIZE="2")
    assert run.wait(20) == 2 and not (tmp_path / "out").exists()
    fix = "start the program with torchrun, or unset WORLD_SIZE"
    assert run.stderr.strip() == f"error: WORLD_SIZE=2 is set without RANK, MASTER_ADDR, MASTER_PORT: {fix}"
    run = zygote.start(ENDLESS, tmp_path, WORLD_SIZE="x")
    assert run.wait(20) == 2 and "error: WORLD_SIZE=x is set without RANK" in run.stderr


def test_a_run_in_a_process_of_ones_own_leaves_its_signals_alone(train):
    """In a notebook Ctrl-C acts again when the run is over."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    train("run")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
