"""A run that is killed at any moment and started again ends as if nothing had happened; and what is refused."""

import json
import os
import random
import re
import shutil
import time

import pytest
import torch
from runs import ROOT, SMALL, assert_same_bits, assert_same_run, lines, mixture, record, reset_accelerate, summary
from safetensors.torch import load_file, save_file

import train_rm

# epochs of 5 steps; a step is several micro-batches; nothing that is periodic falls together
LONG = ["dataset_name=toy", *SMALL, "--max_steps=23", "--save_steps=3", "--logging_steps=4", "--eval_steps=5"]
LONG += ["--micro_batch_tokens=200", "--save_total_limit=2", "--metric_for_best_model=eval/accuracy"]
LATEST = "--resume_from_checkpoint=latest"
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0.2"]


def kill_until_it_ends(zygote, count: int, options: list[str], cwd, longest: float, seed: int) -> int:
    """Start a run again and again, kill it at random moments, until it ends by itself; returns the number of kills."""
    chance, kills = random.Random(seed), 0
    while True:
        runs = zygote.start_many(count, [*options, LATEST], cwd)
        end = time.monotonic() + chance.uniform(0.3, longest + 0.05 * kills)  # the luck grows
        while time.monotonic() < end and any(run.poll() is None for run in runs):
            time.sleep(0.005)
        if all(run.poll() is not None for run in runs):
            assert [run.returncode for run in runs] == [0] * count, runs[0].stderr[-3000:]
            return kills
        for run in chance.sample(runs, count):  # as torchrun does, but without mercy
            if run.poll() is None:
                os.kill(run.pid, 9)
        assert all(run.wait() in (-9, 0, 1) for run in runs)
        kills += 1


@pytest.mark.slow
@pytest.mark.parametrize("count, lora", [(1, False), (1, True), (2, False), (3, False)], ids=["1", "lora", "2", "3"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(zygote, tmp_path, pretrained, count, lora):
    options = [*LONG, *(LORA if lora else []), f"--model_name_or_path={pretrained}"]
    start = time.monotonic()
    zygote.run(count, [*options, "--output_dir=whole"], tmp_path)
    longest = time.monotonic() - start
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")  # pytest shows it when the test fails
    kills = kill_until_it_ends(zygote, count, [*options, "--output_dir=parts"], tmp_path, 0.7 * longest, seed)
    print(f"{kills} kills")
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob("*.partial")) and not list((tmp_path / "parts").rglob(".*.part"))


@pytest.mark.slow
def test_fsdp2_killed_at_random_moments(fsdp_zygote, tmp_path, pretrained):
    options = [*LONG, *LORA, f"--model_name_or_path={pretrained}"]
    start = time.monotonic()
    fsdp_zygote.run(2, [*options, "--output_dir=whole"], tmp_path)
    longest = time.monotonic() - start
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    kill_until_it_ends(fsdp_zygote, 2, [*options, "--output_dir=parts"], tmp_path, 0.7 * longest, seed)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_mixture_killed_at_random_moments(zygote, tmp_path, pretrained):
    options = [*LONG, *mixture(tmp_path), "--metric_for_best_model=eval/talk/accuracy", "--max_steps=13"]
    options += [f"--model_name_or_path={pretrained}", "--train_batch_size=13"]
    start = time.monotonic()
    zygote.run(1, [*options, "--output_dir=whole"], tmp_path)
    longest = time.monotonic() - start
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    kill_until_it_ends(zygote, 1, [*options, "--output_dir=parts"], tmp_path, 0.7 * longest, seed)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def finished(zygote, tmp_path_factory):
    """A finished run of 7 steps with its checkpoints after steps 3, 6 and 7."""
    cwd = tmp_path_factory.mktemp("finished")
    zygote.run(1, [*RUN, "--output_dir=run"], cwd)
    return cwd / "run"


RUN = ["dataset_name=toy", *SMALL, "--max_steps=7", "--save_steps=3", "--logging_steps=2", "--eval_steps=2"]


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of it as it was before its end."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-7")
    return tmp_path / "run"


@pytest.fixture
def resume(tmp_path, monkeypatch, capsys, caplog):
    """resume(*options) → (exit code, last line on stderr, log) of a run in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str, str]:
        reset_accelerate()
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["train_rm.py", *RUN, "--output_dir=run", LATEST, *options])
        monkeypatch.setattr("rm.train.processes.StopSignal.listen", lambda self: None)
        return train_rm.run(), capsys.readouterr().err.strip().splitlines()[-1], caplog.text

    return run


def steps_in(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("start", ["step-3", "step-6"])
def test_from_any_checkpoint_the_rest_is_the_same(interrupted, finished, resume, start):
    code, *_ = resume(f"--resume_from_checkpoint=run/checkpoints/{start}")
    assert code == 0
    assert_same_bits(interrupted, finished)
    # a later one belongs to what was done over; it is kept, but nothing takes it for part of this run
    aside = ["step-6.replaced"] if start == "step-3" else []
    assert steps_in(interrupted) == ["step-3", "step-6", *aside, "step-7"]


def test_on_another_number_of_processes(interrupted, finished, zygote, tmp_path):
    zygote.run(2, [*RUN, "--output_dir=run", LATEST], tmp_path)
    assert_same_run(finished, interrupted)
    zygote.run(3, [*RUN, "--output_dir=run", "--resume_from_checkpoint=run/checkpoints/step-3"], tmp_path)
    assert_same_run(finished, interrupted)


def test_under_another_engine_and_back(interrupted, finished, zygote, fsdp_zygote, tmp_path):
    shutil.rmtree(interrupted / "checkpoints" / "step-6")
    fsdp_zygote.run(2, [*RUN, "--output_dir=run", LATEST], tmp_path)
    assert_same_run(finished, interrupted)
    zygote.run(1, [*RUN, "--output_dir=run", "--resume_from_checkpoint=run/checkpoints/step-6"], tmp_path)
    assert_same_run(finished, interrupted)


def test_hardware_and_logging_may_change(interrupted, finished, resume):
    options = ["--micro_batch_tokens=100", "--layout=concatenated", "--eval_steps=1", "--save_total_limit=1"]
    assert resume(*options, "--run_name=other", "--project=other")[0] == 0
    for name, weight in load_file(finished / "model.safetensors").items():
        torch.testing.assert_close(load_file(interrupted / "model.safetensors")[name], weight, atol=1e-5, rtol=0)
    assert len(lines(interrupted, "eval/loss")) == 4  # steps 2, 4, 6, and 7


def test_from_an_older_one_and_killed_before_the_next(interrupted, finished, resume, zygote, tmp_path):
    """Then `latest` must not be one that metrics.jsonl knows nothing of any more."""
    (finished_step,) = [6]
    fault = "import os, train_rm\ntrain_rm.Meter.read = lambda *_: os.kill(os.getpid(), 9)"
    older = f"--resume_from_checkpoint=run/checkpoints/step-{finished_step // 2}"
    run = zygote.start([*RUN, "--output_dir=run", older], tmp_path, fault=fault)
    assert run.wait() == -9
    code, _, log = resume()
    assert code == 0 and "resumed from run/checkpoints/step-3" in log
    assert record(interrupted) == record(finished)


def test_a_checkpoint_of_another_run(interrupted, finished, zygote, tmp_path, resume):
    """It may be gone on with in a new folder, with its metrics; not in one that holds a run."""
    path = f"--resume_from_checkpoint={finished}/checkpoints/step-3"
    code, error, _ = resume(path)
    assert code == 2 and "step-3 is not of the run in output_dir=run; give a new output_dir" in error
    assert steps_in(interrupted) == ["step-3", "step-6"]
    assert resume(path, "--output_dir=new")[0] == 0
    assert record(tmp_path / "new") == record(finished)
    (interrupted / "metrics.jsonl").write_text("")
    code, _, log = resume("--resume_from_checkpoint=run/checkpoints/step-6")
    assert code == 0 and "0 of the 6 lines before the checkpoint are there" in log


def test_after_running_out_of_memory(zygote, tmp_path):
    """Halved micro-batches round otherwise: the resumed run must not start with whole ones."""
    halve = "import train_rm\ninit = train_rm.StepPlan.__init__\n"
    halve += "def smaller(self, *a, **k):\n    init(self, *a, **k)\n    self.micro_batch_tokens //= 2\n"
    options = [*RUN, "--micro_batch_tokens=2000"]
    zygote.run(1, [*options, "--output_dir=whole"], tmp_path, fault=halve + "train_rm.StepPlan.__init__ = smaller")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "results.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-7")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-6")
    zygote.run(1, [*options, "--output_dir=parts", LATEST], tmp_path)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    state = json.loads((tmp_path / "parts/checkpoints/step-7/state.json").read_text())
    assert state["micro_batch_tokens"] == 1000


def test_what_is_written_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Every file is flushed before the folder gets its name; no power failure can be had here."""
    from rm import checkpoint, files

    events = []
    monkeypatch.setattr(files, "fsync", lambda path: events.append(("fsync", path.name)))
    monkeypatch.setattr(checkpoint, "fsync", lambda path: events.append(("fsync", path.name)))
    rename = type(tmp_path).rename
    monkeypatch.setattr(type(tmp_path), "rename", lambda a, b: (events.append(("rename", b.name)), rename(a, b)))
    checkpoint.write_folder(tmp_path / "checkpoints" / "step-1", lambda folder: (folder / "a").write_text("x"))
    at = events.index(("rename", "step-1"))
    flushed = {name for kind, name in events[:at]}
    assert flushed == {"a", "manifest.json", ".step-1.partial"}
    assert events[at + 1 :] == [("fsync", "checkpoints"), ("fsync", tmp_path.name)]
    replace = type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: (events.append(("replace", b.name)), replace(a, b)))
    events.clear()
    files.write_text(tmp_path / "results.json", "{}")
    assert events == [("fsync", ".results.json.part"), ("replace", "results.json"), ("fsync", tmp_path.name)]


def test_a_batch_may_be_said_in_another_way(interrupted, resume):
    trl = ["--train_batch_size=none", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=4"]
    assert resume(*trl)[0] == 0


@pytest.mark.parametrize(
    "option, message",
    [
        ("--learning_rate=3e-4", "learning_rate: 0.0001 -> 0.0003"),
        ("--seed=1", "seed: 42 -> 1"),
        ("--max_steps=8", "max_steps: 7 -> 8"),
        ("--train_batch_size=17", "train_batch_size: 16 -> 17"),
        ("--mixed_precision=bf16", "mixed_precision: 'no' -> 'bf16'"),
        ("--use_peft", "use_peft: False -> True"),
        ("--max_train_samples=81", "max_train_samples: 80 -> 81"),
    ],
)
def test_other_options_are_refused(interrupted, resume, option, message):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    code, error, _ = resume(option)
    assert code == 2
    fix = "resume with the options and data it began with, or give another output_dir"
    assert error == f"error: run/checkpoints/step-6 is of another run ({message}); {fix}"
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_other_content_is_refused_and_other_places_are_not(zygote, tmp_path, pretrained, resume):
    rows = [{"chosen": f"be brief {i}", "rejected": f"tell me how {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = [f"--model_name_or_path={pretrained}", "--dataset_name=a.jsonl", "--eval_fraction=0.25", "--max_steps=7"]
    base += ["--max_train_samples=none", "--max_eval_samples=none"]
    zygote.run(1, [*RUN, *base, "--output_dir=run"], tmp_path)
    (tmp_path / "run" / "results.json").unlink()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    shutil.copytree(pretrained, tmp_path / "moved")
    moved = [*base, "--dataset_name=b.jsonl", "--model_name_or_path=moved"]
    assert resume(*moved)[0] == 0
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [*rows[:-1], rows[-1] | {"chosen": "be"}])))
    code, error, _ = resume(*moved)
    assert code == 2 and re.search(r"is of another run \(the content of (eval_)?dataset_name has changed\)", error)
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    code, error, _ = resume(*base, "--model_name_or_path=moved")
    assert code == 2 and "(the content of model_name_or_path has changed)" in error


def test_a_finished_run_says_so(finished, tmp_path, resume):
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, log = resume()
    assert code == 0 and "the run in run is finished: nothing to do" in log
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    for option, change in [("--max_steps=9", "max_steps: 7 -> 9"), ("--model_name_or_path=no", "model_name_or_path: ")]:
        code, error, _ = resume(option)
        assert code == 2 and f"run is of another run ({change}" in error
    (tmp_path / "run" / "results.json").write_text("{}")
    code, error, _ = resume()
    assert code == 2 and "run/results.json is not what this program writes" in error


def test_killed_after_its_last_evaluation(finished, tmp_path, resume):
    """The last checkpoint is older than the last evaluation's line, which must not stand there twice."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert resume()[0] == 0
    assert_same_bits(finished, tmp_path / "run")


def test_without_a_checkpoint_it_starts_at_the_beginning(finished, tmp_path, resume):
    code, _, log = resume()
    assert code == 0 and "run has no checkpoint yet; from the first step on" in log
    assert_same_bits(finished, tmp_path / "run")


def test_a_new_run_takes_over_a_folder_only_with_leave(interrupted, finished, resume):
    (interrupted / "metrics.jsonl").unlink()  # checkpoints are a run too
    code, error, _ = resume("--resume_from_checkpoint=none")
    assert code == 2 and "already holds a run; choose another, or give overwrite_output_dir=true" in error
    assert steps_in(interrupted) == ["step-3", "step-6"]
    assert resume("--resume_from_checkpoint=none", "--overwrite_output_dir", "--save_steps=0")[0] == 0
    assert steps_in(interrupted) == [] and record(interrupted) == record(finished)


def test_a_mixture_must_stay_what_it_was(tmp_path, resume):
    first, rest = mixture(tmp_path), ["--max_steps=4", "--eval_steps=0"]
    assert resume(*first, *rest)[0] == 0  # from the beginning
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    (tmp_path / "moved").mkdir()
    moved = mixture(tmp_path / "moved")
    assert "fingerprint" in (tmp_path / "run/data_report.json").read_text()
    for options, message in [
        ([*first, "--dataset_weights=[1.5, 1]"], "dataset_weights: [1.5, 0.5] -> [1.5, 1.0]"),
        ([first[0].replace("talk", "talk-test"), *first[1:]], "the content of dataset_name has changed"),
        ([*first[:2], first[2].replace("'plain'", "'other'")], "the content of eval_dataset_name has changed"),
    ]:
        code, error, _ = resume(*options, *rest)
        assert code == 2 and message in error, error
    code, _, log = resume(*moved, *rest)  # the same content elsewhere
    assert code == 0 and "resumed from run/checkpoints/step-3" in log


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights": (lambda p: flip_bit(p / "model.safetensors"), "content of model.safetensors has changed"),
    "a bit of the moments": (lambda p: flip_bit(p / "optimizer.safetensors"), "content of optimizer.safetensors has"),
    "a bit of the state": (lambda p: flip_bit(p / "state.json"), "the content of state.json has changed (sha256)"),
    "half a file": (lambda p: os.truncate(p / "model.safetensors", 99), "model.safetensors has 99 bytes instead of"),
    "a missing file": (lambda p: (p / "optimizer.json").unlink(), "optimizer.json is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read (No such file"),
    "garbage": (lambda p: (p / "manifest.json").write_text("[1, 2"), "manifest.json is damaged"),
    "an empty manifest": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json does not name model"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_left_out(interrupted, finished, resume, name):
    damage, message = DAMAGE[name]
    damage(interrupted / "checkpoints" / "step-6")
    code, _, log = resume()
    assert code == 0 and "step-6 is damaged and left out: " in log and message in log
    assert "resumed from run/checkpoints/step-3: 3 steps are done" in log
    assert_same_bits(interrupted, finished)
    assert steps_in(interrupted) == ["step-3", "step-6", "step-6.replaced", "step-7"]


def test_never_a_silent_restart(interrupted, resume):
    for step in ("step-3", "step-6"):
        flip_bit(interrupted / "checkpoints" / step / "model.safetensors")
    before = record(interrupted)
    code, error, _ = resume()
    assert code == 2 and "resume_from_checkpoint=latest: all 2 in run/checkpoints are damaged; bring one back" in error
    code, error, _ = resume("--resume_from_checkpoint=run/checkpoints/step-3")
    assert code == 2 and "step-3: the content of model.safetensors has changed" in error and "`latest` takes" in error
    code, error, _ = resume("--resume_from_checkpoint=run/checkpoints/step-4")
    assert code == 2 and "step-4: there is no such folder" in error
    assert record(interrupted) == before and steps_in(interrupted) == ["step-3", "step-6"]


def test_the_best_and_the_newest_are_kept(zygote, tmp_path):
    options = [*RUN, "--max_steps=12", "--save_total_limit=1", "--metric_for_best_model=eval/loss"]
    zygote.run(1, [*options, "--greater_is_better=true", "--output_dir=run"], tmp_path)  # so that it is an early one
    losses = lines(tmp_path / "run", "eval/loss")[:-1]
    best = 2 * losses.index(max(losses)) + 2
    assert best < 10 and steps_in(tmp_path / "run") == sorted(["step-12", f"step-{best}"])
    state = json.loads((tmp_path / "run/checkpoints/step-12/state.json").read_text())
    assert state["best"]["step"] == best and state["best"]["metrics"]["eval/loss"] == max(losses)
    done = zygote.start([*RUN, "--metric_for_best_model=eval/nope", "--output_dir=other"], tmp_path)
    assert done.wait() == 2 and "metric_for_best_model=eval/nope: no such metric; the nearest of " in done.stderr


def test_no_pickle_and_no_secret(finished):
    folder = finished / "checkpoints" / "step-3"
    names = ["manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in ("manifest.json", "optimizer.json", "state.json"):
        json.loads((folder / name).read_text())
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 3 and state["metrics_lines"] == 2  # steps 2 and 2: training and evaluation
    assert {"dataset_name", "model_name_or_path"} <= set(state["content"]) and state["config"]["seed"] == 42
    assert summary(finished)["train/steps"] == 7 and (ROOT / "train_rm.py").exists()
