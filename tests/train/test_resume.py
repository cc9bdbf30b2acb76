"""A run that is killed at any moment and started again ends as if nothing had happened; and what is rejected."""

import json
import os
import random
import re
import shutil
import time

import pytest
import torch
from runs import SMALL, assert_same_bits, assert_same_run, lines, mixture, record, summary
from safetensors.torch import load_file, save_file

from rm.config import files

# epochs of 5 steps; a step is several micro-batches; nothing that is periodic falls together
LONG = [*SMALL, "--max_steps=23", "--save_steps=3", "--logging_steps=4", "--eval_steps=5"]
LONG += ["--micro_batch_tokens=200", "--save_total_limit=2", "--metric_for_best_model=eval/accuracy"]
LATEST = "--resume_from_checkpoint=latest"
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0.2"]


def kill_until_it_ends(zygote, count: int, options: list[str], cwd) -> None:
    """Run it; run it again in another folder, killed at random moments, until it ends by itself; compare the two."""
    start = time.monotonic()
    zygote.run(count, [*options, "--output_dir=whole"], cwd)
    longest, kills = 0.7 * (time.monotonic() - start), 0
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")  # pytest shows it when the test fails
    chance, runs = random.Random(seed), []
    while not runs or any(run.returncode for run in runs):
        runs = zygote.start_many(count, [*options, "--output_dir=parts", LATEST], cwd)
        end = time.monotonic() + chance.uniform(0.3, longest + 0.05 * kills)  # more and more time
        while time.monotonic() < end and any(run.poll() is None for run in runs):
            time.sleep(0.005)
        is_over = all(run.poll() is not None for run in runs)
        for run in chance.sample(runs, count):  # as torchrun does, but by SIGKILL
            if run.poll() is None:
                os.kill(run.pid, 9)
        codes = [run.wait() for run in runs]
        assert codes == [0] * count if is_over else set(codes) <= {-9, 0, 1}, runs[0].stderr[-3000:]
        kills += 1
    assert_same_bits(cwd / "whole", cwd / "parts")
    assert not list((cwd / "parts").rglob("*.partial")) and not list((cwd / "parts").rglob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("count, lora", [(1, True), (2, False), (3, False)], ids=["lora", "2", "3"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(zygote, tmp_path, pretrained, count, lora):
    kill_until_it_ends(zygote, count, [*LONG, *(LORA if lora else []), f"--model_name_or_path={pretrained}"], tmp_path)


@pytest.mark.slow
def test_fsdp2_killed_at_random_moments(fsdp_zygote, tmp_path, pretrained):
    kill_until_it_ends(fsdp_zygote, 2, [*LONG, *LORA, f"--model_name_or_path={pretrained}"], tmp_path)


@pytest.mark.slow
def test_a_mixture_killed_at_random_moments(zygote, tmp_path, pretrained):
    options = [*LONG, *mixture(tmp_path), "--metric_for_best_model=eval/talk/accuracy", "--max_steps=13"]
    kill_until_it_ends(zygote, 1, [*options, f"--model_name_or_path={pretrained}", "--train_batch_size=13"], tmp_path)


# ---------------------------------------------------------------------------------------------- from a checkpoint

RUN = [*SMALL, "--max_steps=7", "--save_steps=3", "--logging_steps=2", "--eval_steps=2"]


@pytest.fixture(scope="module")
def finished(zygote, tmp_path_factory):
    """A finished run of 7 steps with its checkpoints after steps 3, 6 and 7."""
    cwd = tmp_path_factory.mktemp("finished")
    zygote.run(1, [*RUN, "--output_dir=run"], cwd)
    return cwd / "run"


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of it as it was before its end."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-7")
    return tmp_path / "run"


@pytest.fixture
def resume(ends):
    """resume(*options): `ends` with RUN and LATEST."""
    return lambda *options: ends(*RUN, LATEST, *options)


def steps_in(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("start", ["step-3", "step-6"])
def test_from_any_checkpoint_the_rest_is_the_same(interrupted, finished, resume, start):
    assert resume(f"--resume_from_checkpoint=run/checkpoints/{start}")[0] == 0
    assert_same_bits(interrupted, finished)
    # a later one is superseded; it is kept, but nothing takes it for part of this run
    aside = ["step-6.replaced"] if start == "step-3" else []
    assert steps_in(interrupted) == ["step-3", "step-6", *aside, "step-7"]


def test_on_other_numbers_of_processes_and_engines(interrupted, finished, zygote, fsdp_zygote, tmp_path):
    shutil.rmtree(interrupted / "checkpoints" / "step-6")
    for count, engine, start in [(2, fsdp_zygote, "latest"), (3, zygote, "step-6"), (1, zygote, "step-6")]:
        start = start if start == "latest" else f"run/checkpoints/{start}"
        engine.run(count, [*RUN, "--output_dir=run", f"--resume_from_checkpoint={start}"], tmp_path)
        assert_same_run(finished, interrupted)


def test_hardware_logging_and_the_way_to_state_a_batch_may_change(interrupted, finished, resume):
    options = ["--micro_batch_tokens=100", "--layout=concatenated", "--eval_steps=1", "--save_total_limit=1"]
    options += ["--train_batch_size=none", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=4"]
    assert resume(*options, "--run_name=other", "--project=other")[0] == 0
    for name, weight in load_file(finished / "model.safetensors").items():
        torch.testing.assert_close(load_file(interrupted / "model.safetensors")[name], weight, atol=1e-5, rtol=0)
    assert len(lines(interrupted, "eval/loss")) == 4  # steps 2, 4, 6, and 7


def test_from_an_older_one_and_killed_before_the_next(interrupted, finished, resume, zygote, tmp_path):
    """Then `latest` must not be one that metrics.jsonl knows nothing of any more."""
    fault = "import os\nfrom rm.train.state import Meter\nMeter.read = lambda *_: os.kill(os.getpid(), 9)"
    older = "--resume_from_checkpoint=run/checkpoints/step-3"
    assert zygote.start([*RUN, "--output_dir=run", older], tmp_path, fault=fault).wait() == -9
    code, _, log = resume()
    assert code == 0 and "resumed from run/checkpoints/step-3" in log
    assert record(interrupted) == record(finished)


def test_without_metrics_or_a_checkpoint(interrupted, finished, tmp_path, resume):
    code, error, _ = resume("--output_dir=new", f"--resume_from_checkpoint={finished}/checkpoints/step-3")
    assert code == 2 and "step-3 is not of the run in output_dir=new; copy the run directory" in error
    (interrupted / "metrics.jsonl").write_text("")
    code, _, log = resume()
    assert code == 0 and "has 0 of the 6 lines before the checkpoint" in log
    code, _, log = resume("--output_dir=other")
    assert code == 0 and "other has no checkpoint; it starts at step 0" in log
    assert_same_bits(finished, tmp_path / "other")


def test_after_running_out_of_memory(zygote, tmp_path):
    """Halved micro-batches round otherwise: the resumed run must not start with whole ones."""
    halve = "import rm.data.plan as plan\ninit = plan.StepPlan.__init__\n"
    halve += "def smaller(self, *a, **k):\n    init(self, *a, **k)\n    self.micro_batch_tokens //= 2\n"
    options = [*RUN, "--micro_batch_tokens=2000", "--save_steps=5"]
    zygote.run(1, [*options, "--output_dir=whole"], tmp_path, fault=halve + "plan.StepPlan.__init__ = smaller")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "results.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-7")
    zygote.run(1, [*options, "--output_dir=parts", LATEST], tmp_path)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    state = json.loads((tmp_path / "parts/checkpoints/step-7/state.json").read_text())
    assert state["micro_batch_tokens"] == [2000, 1000]


def test_what_is_written_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Every file is flushed before the folder gets its name; no power failure can be had here."""
    events, kind = [], type(tmp_path)
    monkeypatch.setattr(files, "fsync", lambda path: events.append(("fsync", path.name)))
    rename, replace = kind.rename, kind.replace
    monkeypatch.setattr(kind, "rename", lambda a, b: (events.append(("rename", b.name)), rename(a, b)))
    monkeypatch.setattr(kind, "replace", lambda a, b: (events.append(("replace", b.name)), replace(a, b)))
    hidden = files.new_folder(tmp_path / "checkpoints" / "step-1")
    (hidden / "a").write_text("x")
    files.publish_folder(hidden, tmp_path / "checkpoints" / "step-1")
    at = events.index(("rename", "step-1"))
    assert {name for _, name in events[:at]} == {"a", "manifest.json", ".step-1.partial"}
    assert events[at + 1 :] == [("fsync", "checkpoints"), ("fsync", tmp_path.name)]
    events.clear()
    files.write_file(tmp_path / "results.json", "{}")
    assert events == [("fsync", ".results.json.part"), ("replace", "results.json"), ("fsync", tmp_path.name)]


# ---------------------------------------------------------------------------------------------- what is rejected

CHANGES = {
    "--learning_rate=3e-4": "learning_rate: 0.0001 -> 0.0003",
    "--max_steps=8": "max_steps: 7 -> 8",
    "--train_batch_size=17": "train_batch_size: 16 -> 17",
    "--mixed_precision=bf16": "mixed_precision: 'no' -> 'bf16'",
    "--use_peft": "use_peft: False -> True",
    "--max_train_samples=81": "max_train_samples: 80 -> 81",
}


def test_other_options_are_rejected(interrupted, resume):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file() and path.name != ".run_lock"}
    fix = "resume with the options and data it began with, or give another output_dir"
    for option, change in CHANGES.items():
        code, error, _ = resume(option)
        assert code == 2 and error == f"error: run/checkpoints/step-6 is of another run ({change}); {fix}"
    assert all(path.read_bytes() == content for path, content in before.items())


def test_other_content_is_rejected_and_other_places_are_not(zygote, tmp_path, pretrained, resume):
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


def test_a_mixture_must_stay_what_it_was(tmp_path, resume):
    first, rest = mixture(tmp_path), ["--max_steps=4", "--eval_steps=0"]
    assert resume(*first, *rest)[0] == 0  # from the beginning
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    (tmp_path / "moved").mkdir()
    moved = mixture(tmp_path / "moved")
    for options, message in [
        ([*first, "--dataset_weights=[1.5, 1]"], "dataset_weights: [1.5, 0.5] -> [1.5, 1.0]"),
        ([first[0].replace("talk", "talk-test"), *first[1:]], "the content of dataset_name has changed"),
        ([*first[:2], first[2].replace("'plain'", "'other'")], "the content of eval_dataset_name has changed"),
    ]:
        code, error, _ = resume(*options, *rest)
        assert code == 2 and message in error, error
    code, _, log = resume(*moved, *rest)  # the same content elsewhere
    assert code == 0 and "resumed from run/checkpoints/step-3" in log


# ---------------------------------------------------------------------------------------------- damage


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights": (lambda p: flip_bit(p / "model.safetensors"), "content of model.safetensors has changed"),
    "a bit of the moments": (lambda p: flip_bit(p / "optimizer.safetensors"), "content of optimizer.safetensors has"),
    "a bit of the state": (
        lambda p: flip_bit(p / "state.json"),
        "content of state.json has changed (size or",
    ),
    "half a file": (lambda p: os.truncate(p / "model.safetensors", 99), "content of model.safetensors has changed"),
    "a missing file": (lambda p: (p / "optimizer.json").unlink(), "optimizer.json cannot be read (No such file"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    "garbage": (lambda p: (p / "manifest.json").write_text("[1, 2"), "manifest.json is missing or damaged"),
    "a deep manifest": (lambda p: (p / "manifest.json").write_text("[" * 10**5), "manifest.json is missing or damaged"),
    "an empty manifest": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json is missing or damaged"),
    "a number": (lambda p: (p / "manifest.json").write_text('{"state.json": 1}'), "content of state.json has changed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(finished, tmp_path, name):
    harm, message = DAMAGE[name]
    shutil.copytree(finished / "checkpoints" / "step-6", tmp_path / "step-6")
    assert files.damage(tmp_path / "step-6", "state.json") is None
    harm(tmp_path / "step-6")
    assert message in files.damage(tmp_path / "step-6", "state.json")


def test_a_damaged_checkpoint_is_ignored_but_never_silently(interrupted, finished, resume):
    flip_bit(interrupted / "checkpoints" / "step-6" / "optimizer.safetensors")
    code, _, log = resume()
    assert code == 0 and "step-6 is damaged and ignored: the content of optimizer.safetensors has" in log
    assert "resumed from run/checkpoints/step-3: 3 steps are done" in log
    assert_same_bits(interrupted, finished)
    assert steps_in(interrupted) == ["step-3", "step-6", "step-6.replaced", "step-7"]
    (interrupted / "results.json").unlink()
    for step in ("step-3", "step-6", "step-7"):
        flip_bit(interrupted / "checkpoints" / step / "model.safetensors")
    before = record(interrupted)
    code, error, _ = resume()
    assert code == 2 and "resume_from_checkpoint=latest: no undamaged checkpoint (the content of" in error
    code, error, _ = resume("--resume_from_checkpoint=run/checkpoints/step-3")
    assert code == 2 and "step-3: no undamaged checkpoint (the content of model.safetensors has changed" in error
    code, error, _ = resume("--resume_from_checkpoint=run/checkpoints/step-4")
    assert code == 2 and "step-4/manifest.json is missing or damaged" in error
    assert record(interrupted) == before
    state = interrupted / "checkpoints/step-7/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 1}))
    flip_bit(state.parent / "model.safetensors")
    manifest = json.loads((state.parent / "manifest.json").read_text()) | {"state.json": files.digest(state)}
    (state.parent / "manifest.json").write_text(json.dumps(manifest))
    code, error, _ = resume()
    assert code == 2 and "step-7 was written by another version of this program; start a new run" in error


def test_no_pickle_and_no_secret(finished):
    folder = finished / "checkpoints" / "step-3"
    names = ["manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 3 and state["metrics_lines"] == 2  # of step 2: training and evaluation
    assert {"dataset_name", "model_name_or_path"} <= set(state["content"]) and state["config"]["seed"] == 42
    assert summary(finished)["train/steps"] == 7
