"""The run directory: whose files are in it, who may write it, and when a run is finished."""

import json
import os
import re
import shutil
import time

import pytest
from runs import SMALL, assert_same_bits, record, wait_until, weights

import train_rm
from rm.config import files

RUN = [*SMALL, "--max_steps=3", "--save_steps=3", "--num_print_samples=2"]
LATEST = "--resume_from_checkpoint=latest"
OVERWRITE = "--overwrite_output_dir"


@pytest.fixture(scope="module")
def finished(zygote, tmp_path_factory):
    """A finished run with a checkpoint after its last step."""
    cwd = tmp_path_factory.mktemp("finished")
    zygote.run(1, [*RUN, "--output_dir=run"], cwd)
    return cwd / "run"


@pytest.fixture
def again(ends):
    """again(*options): `ends` with RUN."""
    return lambda *options: ends(*RUN, *options)


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".run_lock"}


# ---------------------------------------------------------------------------------------------- files of others

IN_THE_WAY = """README.md eval eval/step-3.parquet samples/step-4.jsonl config.json model-00001-of-00002.safetensors
report.html/index.html checkpoints/step-9/notes adapter/notes metrics.jsonl .README.md.part .model.partial/x
checkpoints/.step-9.partial/x""".split()


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_files_of_others_are_neither_removed_nor_replaced(tmp_path, again, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    named = re.sub(r"(report.html|step-9|partial)/.*", r"\1", name)
    for options in ([], [OVERWRITE], [LATEST]):
        code, error, _ = again(*options)
        assert code == 2 and error.startswith(f"error: output_dir=run: '{named}' is in the way: no run of this program")
    assert contents(tmp_path / "run") == {path: b"mine"}


def test_a_run_is_replaced_with_permission_and_the_rest_stays(finished, tmp_path, again):
    shutil.copytree(finished, tmp_path / "run")
    others = [
        tmp_path / "run" / name for name in ("notes.txt", "my.safetensors", "eval/mine.csv", "checkpoints/mine/x")
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = contents(tmp_path / "run")
    code, error, _ = again()
    assert code == 2 and "already holds a run; choose another, or give overwrite_output_dir=true" in error
    assert contents(tmp_path / "run") == before
    assert again(OVERWRITE, "--save_steps=0", "--seed=1", "--num_print_samples=0")[0] == 0
    assert all(path.read_text() == "mine" for path in others)
    assert not (tmp_path / "run/checkpoints/step-3").exists() and not list((tmp_path / "run/samples").iterdir())
    assert record(tmp_path / "run") != record(finished)
    (tmp_path / "run/report.html").unlink()  # a file of the run that is a folder now
    (tmp_path / "run/report.html").mkdir()
    code, error, _ = again(OVERWRITE)
    assert code == 2 and "'report.html' is in the way" in error


def test_a_run_of_version_1_is_known_by_its_files(finished, tmp_path, again):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/.run_files").unlink()
    (tmp_path / "run/results.json").rename(tmp_path / "results.json")
    assert "is in the way" in again(OVERWRITE)[1]
    (tmp_path / "results.json").rename(tmp_path / "run/results.json")
    (tmp_path / "run/samples/mine").touch()
    assert "already holds a run" in again()[1]
    assert again(OVERWRITE)[0] == 0 and (tmp_path / "run/samples/mine").exists()
    assert_same_bits(tmp_path / "run", finished)


def test_names_mean_exactly_what_they_say(tmp_path, again, monkeypatch):
    for name in ("run1", "run[1]", "run*?"):
        assert again(f"--output_dir={name}", f"--seed={len(name)}")[0] == 0
    code, _, log = again("--output_dir=run[1]", "--seed=6", LATEST)
    assert code == 0 and "the run in run[1] is finished" in log
    (tmp_path / "file").touch()
    for options in (["a\0b"], ["x" * 300], ["file/run"], ["none", f"--run_name={'é' * 200}"]):
        code, error, _ = again(f"--output_dir={options[0]}", *options[1:])
        assert code == 2 and error.startswith("error: output_dir=") and "cannot be written" in error
    (tmp_path / "locked/.run_lock").mkdir(parents=True)
    code, error, _ = again("--output_dir=locked")
    assert code == 2 and error.endswith("cannot be written: [Errno 21] Is a directory: 'locked/.run_lock'")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert again("--output_dir=~/run", "--max_steps=1")[0] == 0 and (tmp_path / "home/run/finished.json").exists()
    code, error, _ = again("--output_dir=none", "--run_name=a\0b")
    assert code == 2 and error.startswith("error: run_name=") and "must be a plain name" in error


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, again, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    for _ in range(2):
        assert again("--output_dir=none", "--max_steps=1")[0] == 0
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"tiny_llama-toy-now", f"tiny_llama-toy-now-{os.getpid()}"}


# ---------------------------------------------------------------------------------------------- two processes

SLOW = """
import time, train_rm
load = train_rm.load_tokenizer
train_rm.load_tokenizer = lambda config: (open("loading", "w").close(), time.sleep(60))
"""


def test_a_second_process_waits_and_is_rejected(zygote, tmp_path, again, monkeypatch):
    first = zygote.start([*RUN, "--output_dir=run"], tmp_path, fault=SLOW)
    wait_until((tmp_path / "loading").exists)
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    code, error, log = again(LATEST)
    assert code == 2 and f"error: output_dir=run is used by process {first.pid} on " in error and "waiting up to" in log
    second = zygote.start([*RUN, "--output_dir=run", LATEST], tmp_path)  # a requeued job
    time.sleep(0.5)
    os.kill(first.pid, 9)
    assert second.wait() == 0 and "waiting up to 60 s" in second.stderr


# ---------------------------------------------------------------------------------------------- the end of a run

KILL = """
import os, rm.train.finish as module
module.{name} = lambda *args, **kwargs: os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("name", ["provenance", "model_card", "write_report", "verify_export"])
def test_killed_at_the_end_the_rest_is_written_without_training(zygote, finished, tmp_path, name):
    run = zygote.start([*RUN, "--output_dir=run"], tmp_path, fault=KILL.format(name=name))
    assert run.wait() == -9 and not (tmp_path / "run/finished.json").exists()
    done = zygote.run(1, [*RUN, "--output_dir=run", LATEST], tmp_path)
    is_trained = name != "provenance"  # after the weights, before results.json
    assert ("resumed from" in done.stderr) != is_trained and "export checked: 16 sequences" in done.stderr
    assert_same_bits(tmp_path / "run", finished)
    assert json.loads(done.stdout.splitlines()[-1])["train/steps"] == 3
    files = json.loads((tmp_path / "run/finished.json").read_text())["files"]
    assert {"model.safetensors", "results.json", "README.md", "report.html", "config.yaml"} <= files.keys()


def test_a_finished_run_says_so(finished, tmp_path, again):
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    code, _, log = again(LATEST)
    assert code == 0 and "the run in run is finished: nothing to do" in log and contents(tmp_path / "run") == before
    for option, change in [("--max_steps=9", "max_steps: 3 -> 9"), ("--model_name_or_path=no", "model_name_or_path: ")]:
        code, error, _ = again(LATEST, option)
        assert code == 2 and f"run is of another run ({change}" in error


def test_what_is_missing_of_a_finished_run_is_written_again(finished, tmp_path, again):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("report.html", "README.md", "finished.json"):
        (tmp_path / "run" / name).unlink()
        code, _, log = again(LATEST)
        assert code == 0 and "export checked" in log and "resumed" not in log and (tmp_path / "run" / name).is_file()
    (tmp_path / "run/finished.json").write_text('{"files": [1], "export_check": "x"}')
    code, _, log = again(LATEST)
    assert code == 0 and "export checked" in log and "resumed" not in log
    damages = [("model.safetensors", "w"), ("config.json", None), ("results.json", "["), ("results.json", "[" * 10**5)]
    damages += [("results.json", '{"config": 3}')]
    for name, text in damages:  # not finished: it is trained from its last checkpoint
        path = tmp_path / "run" / name
        path.unlink() if text is None else path.write_text(text)
        code, _, log = again(LATEST)
        assert code == 0 and "resumed from run/checkpoints/step-3: 3 steps are done" in log
        assert_same_bits(tmp_path / "run", finished)


def test_a_failed_export_check_loses_nothing(tmp_path, again, monkeypatch):
    def spoil(model, parts, *args):
        (weights,) = parts
        return save(model, [weights | {"classifier.score.weight": weights["classifier.score.weight"] + 1}], *args)

    save = train_rm.finish_run.__globals__["save_model"]
    monkeypatch.setattr("rm.train.finish.save_model", spoil)
    code, error, _ = again()
    assert code == 1 and "differs from the evaluated model by" in error and "all results are in run" in error
    check = json.loads((tmp_path / "run/finished.json").read_text())["export_check"]
    assert not check["passed"] and "differs" in check["problem"] and weights(tmp_path / "run")
    assert all((tmp_path / "run" / name).is_file() for name in ("results.json", "README.md", "report.html"))
    code, _, log = again(LATEST)
    assert code == 1 and "resumed" not in log  # it is checked again


def test_an_export_check_that_crashes_loses_nothing(tmp_path, again, monkeypatch):
    monkeypatch.setattr("rm.train.finish.load_saved_classifier", lambda *args: 1 / 0)
    code, error, log = again()
    assert code == 1 and "the export check crashed (ZeroDivisionError); the model and all results are in run" in error
    assert "Traceback" in log and weights(tmp_path / "run")
    assert not json.loads((tmp_path / "run/finished.json").read_text())["export_check"]["passed"]


# ---------------------------------------------------------------------------------------------- standard output

NO_STDOUT = {
    "a closed pipe": "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)",
    "a full device": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "nothing": "os.close(1); import sys; sys.stdout = None",
}


@pytest.mark.parametrize("how", NO_STDOUT)
def test_losing_standard_output_changes_nothing(zygote, finished, tmp_path, how):
    done = zygote.run(1, [*RUN, "--output_dir=run"], tmp_path, fault=f"import os; {NO_STDOUT[how]}")
    assert_same_bits(tmp_path / "run", finished)
    assert "Traceback" not in done.stderr and (tmp_path / "run/finished.json").is_file()
