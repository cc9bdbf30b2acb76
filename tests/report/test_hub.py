"""Tests of uploads: whole runs of the program against a stand-in for the hub, which may also be in trouble."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stub import TOKEN, HubStub
from runs import SMALL
from safetensors.torch import load_file
from zygote import Zygote

from rm.config.cli import parse_config
from rm.config.errors import InputError
from rm.report.hub import run_files
from rm.train.checkpoint import damage

RUN = ["dataset_name=toy", *SMALL, "--output_dir=out", "--push_to_hub"]
FAST = """
import time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
"""
IMPATIENT = FAST + "import rm.report.hub as hub; hub.SILENCE = 0.5"


@pytest.fixture(scope="module")
def server():
    stub = HubStub()
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def programs(server):
    """Processes of train_rm.py for which `server` is the hub: huggingface_hub reads the environment when imported."""
    before = dict(os.environ)
    os.environ.update(server.env())
    try:
        programs = Zygote()
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield programs
    programs.close()


@pytest.fixture
def stub(server):
    for state in (server.files, server.repos, server.requests, server.commits, server.trouble):
        state.clear()
    return server


def summary_of(run) -> dict:
    return json.loads(run.stdout.strip().splitlines()[-1])


def assert_pushed(stub, folder: Path, repo: str = "me/out", revision: str = "main") -> dict[str, bytes]:
    """The hub has every file of the finished run, byte by byte; of results.json all but the outcome of the push."""
    files = stub.files[repo, revision]
    for name in {"model.safetensors", "tokenizer.json", "README.md", "config.yaml", "metrics.jsonl", "results.json"}:
        assert name in files
    for name, content in files.items():
        if not name.startswith(("last-checkpoint/", "checkpoints/", "results.json")):
            assert content == (folder / name).read_bytes(), name
    here, there = json.loads((folder / "results.json").read_bytes()), json.loads(files["results.json"])
    assert here["summary"].pop("hub")["pushed"] is True
    assert here == there
    return files


# ---------------------------------------------------------------------------------------------- what arrives


def test_a_run_is_uploaded(stub, programs, tmp_path):
    options = ["--hub_model_id=team/rm", "--hub_private_repo=true", "--hub_revision=v1", "--license=mit"]
    run = programs.run(1, [*RUN, *options, "--report_to=tensorboard"], tmp_path)
    assert stub.repos == {"team/rm": {"name": "rm", "organization": "team", "visibility": "private"}}
    assert "POST /api/models/team/rm/branch/v1" in stub.requests
    files = assert_pushed(stub, tmp_path / "out", "team/rm", "v1")
    assert {name for name in files if "/" in name} == set()  # no samples, no tracker's files
    assert b"folder = 'team/rm'" in files["README.md"] and b"license: mit" in files["README.md"]
    outcome = {"repo": "team/rm", "revision": "v1", "pushed": True}
    assert outcome.items() <= summary_of(run)["hub"].items()
    assert "HTTP" not in run.stderr and "out at the end" not in run.stderr


def test_only_what_belongs_to_a_run_is_uploaded(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "samples").mkdir()
    ours = [
        "README.md",
        "model-00001-of-00002.safetensors",
        "adapter_config.json",
        "chat_template.jinja",
        "results.json",
    ]
    others = ["diary.txt", "id_rsa", ".env", "pairs.jsonl", "report.html", "train.py", "metrics.jsonl.bak", "keys.json"]
    inside = ["adapter/adapter_model.safetensors", "adapter/README.md", "samples/step-4.jsonl"]
    for name in [*ours, *others, *inside]:
        (tmp_path / name).write_text("x")
    assert set(run_files(tmp_path)) == {*ours, "adapter/adapter_model.safetensors"}


def test_adapter_and_two_processes(stub, programs, pretrained, tmp_path):
    options = ["--use_peft", "--merge_adapter", "--hub_model_id=rm", f"--model_name_or_path={pretrained}"]
    programs.run(2, [*RUN, *options], tmp_path)
    files = assert_pushed(stub, tmp_path / "out", "me/rm")
    assert "adapter/adapter_model.safetensors" in files and "adapter/README.md" not in files
    assert stub.requests.count("POST /api/repos/create") == 1 and len(stub.commits) == 1  # the main process alone


def test_checkpoints(stub, programs, tmp_path):
    options = ["--save_steps=2", "--hub_strategy=all_checkpoints", "--run_name=my run+1"]
    programs.run(1, [*RUN, *options], tmp_path)
    files = assert_pushed(stub, tmp_path / "out", "me/my-run-1")  # a name that the hub takes
    for step in ("step-2", "step-4"):
        local = tmp_path / "out" / "checkpoints" / step
        there = {name: content for name, content in files.items() if name.startswith(f"checkpoints/{step}/")}
        assert there == {f"checkpoints/{step}/{path.name}": path.read_bytes() for path in local.iterdir()}

    stub.files.clear()
    options = ["--save_steps=2", "--hub_strategy=checkpoint", "--overwrite_output_dir"]
    programs.run(1, [*RUN, *options], tmp_path)
    files = assert_pushed(stub, tmp_path / "out")
    (tmp_path / "got").mkdir()
    for name in [name for name in files if "/" in name]:
        assert name.startswith("last-checkpoint/")
        (tmp_path / "got" / name.removeprefix("last-checkpoint/")).write_bytes(files[name])
    assert damage(tmp_path / "got", "state.json") is None
    newest = load_file(tmp_path / "out" / "checkpoints" / "step-4" / "model.safetensors")
    assert newest.keys() == load_file(tmp_path / "got" / "model.safetensors").keys()
    assert json.loads((tmp_path / "got" / "state.json").read_text())["step"] == 4


# ---------------------------------------------------------------------------------------------- trouble at the start


@pytest.mark.parametrize(
    "trouble, options, why",
    [
        ({}, ["--hub_token=wrong-token"], "401"),
        ({"create": 403}, [], "403: of the stub"),
        ({"auth-check": 403}, [], "403: of the stub"),
        ({"create": "hang"}, [], "ReadTimeout"),
        ({"create": "drop"}, [], "RemoteProtocolError"),
        ("refuse", [], "ConnectError"),
    ],
    ids=["wrong token", "no right to create", "no right to write", "hang", "drop", "refuse"],
)
def test_a_hub_that_refuses_is_an_error_before_training(stub, programs, tmp_path, trouble, options, why):
    fault = IMPATIENT if "hang" in str(trouble) else FAST
    if trouble == "refuse":
        fault += "import huggingface_hub.constants as c; c.ENDPOINT = 'http://127.0.0.1:9'"
    else:
        stub.trouble |= trouble
    run = programs.start([*RUN, *options], tmp_path, fault=fault)
    assert run.wait() == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: push_to_hub: http://127.0.0.1") and why in last and "Traceback" not in run.stderr
    assert last.endswith("fix this, or train without push_to_hub and upload later")
    assert "wrong-token" not in run.stderr and TOKEN not in run.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_offline_is_an_error(fails):
    assert "HF_HUB_OFFLINE" in fails("--push_to_hub", "--hub_token=any")


# ---------------------------------------------------------------------------------------------- trouble at the end


@pytest.mark.parametrize(
    "trouble, why",
    [
        ({"commit/main": 403}, "403: of the stub"),
        ({"preupload": 500}, "500: of the stub"),
        ({"PUT": "drop"}, "RemoteProtocolError|WriteError|ReadError"),
        ({"PUT": "hang"}, "TimeoutError|ReadTimeout"),
    ],
    ids=["403", "500", "dies in the middle", "hang"],
)
def test_a_failed_upload_loses_nothing(stub, programs, tmp_path, trouble, why):
    stub.trouble |= trouble
    run = programs.run(1, RUN, tmp_path, fault=IMPATIENT if "hang" in trouble.values() else FAST)  # exit code 0
    outcome = summary_of(run)["hub"]
    assert outcome["pushed"] is False and re.search(why, outcome["error"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["summary"] == summary_of(run)
    assert "the run in out is not uploaded" in run.stderr and not stub.files
    command = run.stderr.strip().splitlines()[-1]
    assert command.startswith("hf upload me/out out . --revision main --include README.md --include")


def test_an_upload_that_failed_can_be_done_later(stub, programs, tmp_path):
    stub.trouble["commit/main"] = 403
    run = programs.run(1, RUN, tmp_path, fault=FAST)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    stub.trouble.clear()

    command = shlex.split(run.stderr.strip().splitlines()[-1])
    command[0] = str(Path(sys.executable).with_name("hf"))
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | stub.env(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    by_command = dict(stub.files["me/out", "main"])

    stub.files.clear()  # or by the same program again, which trains nothing
    again = [*RUN, "--resume_from_checkpoint=latest"]
    run = programs.run(1, again, tmp_path)
    assert summary_of(run)["hub"]["pushed"] is True and "is finished: nothing to train" in run.stderr
    files = stub.files["me/out", "main"]
    assert set(files) == set(by_command) == set(run_files(tmp_path / "out"))
    assert all(files[name] == by_command[name] for name in files)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == weights

    stub.files.clear()  # and once it is there, not again
    assert summary_of(programs.run(1, again, tmp_path))["hub"]["pushed"] is True and not stub.files


@pytest.mark.parametrize("trouble", [403, "hang"])
def test_checkpoints_that_cannot_be_uploaded_cost_a_warning(stub, programs, tmp_path, trouble):
    stub.trouble["preupload"] = trouble
    options = ["--save_steps=1", "--hub_strategy=all_checkpoints", "--save_total_limit=1"]
    run = programs.run(1, [*RUN, *options], tmp_path, fault=IMPATIENT if trouble == "hang" else FAST)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 5
    assert summary_of(run)["hub"]["pushed"] is False
    assert trouble == "hang" or run.stderr.count("hub: upload of a checkpoint failed") == 4


# ---------------------------------------------------------------------------------------------- resuming, secrets


def test_a_resumed_run_goes_on_with_its_repository_and_no_token_is_written(stub, programs, tmp_path):
    options = [f"--hub_token={TOKEN}", "--hub_model_id=rm", "--save_steps=2", "--hub_strategy=checkpoint"]
    kill = "import rm.report.hub, os; rm.report.hub.run_files = lambda folder: os.kill(os.getpid(), 9)"
    run = programs.start([*RUN, *options, "--report_to=tensorboard"], tmp_path, fault=kill, HF_TOKEN="")
    assert run.wait() == -9  # with everything written, and before the final upload
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN.encode() in content for content in stub.files["me/rm", "main"].values())
    (tmp_path / "out" / "results.json").unlink()

    again = ["--config", "out/config.yaml", "--resume_from_checkpoint=latest"]
    run = programs.start(again, tmp_path, fault=FAST, HF_TOKEN="", HF_HOME=str(tmp_path))
    assert run.wait() == 2 and "oken" in run.stderr.strip().splitlines()[-1]  # it was not written down
    run = programs.run(1, again, tmp_path)  # HF_TOKEN
    assert "resumed from out/checkpoints/step-4" in run.stderr
    assert_pushed(stub, tmp_path / "out", "me/rm")
    assert list(stub.repos) == ["me/rm"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--hub_model_id=me/rm"], "hub_model_id='me/rm': has no effect without push_to_hub"),
        (["--hub_token=secret"], r"hub_token='\[redacted\]': has no effect without push_to_hub"),
        (["--push_to_hub", "--hub_token="], "hub_token='': is empty"),
        (["--push_to_hub", "--hub_strategy=every_save"], "must be end, checkpoint or all_checkpoints"),
        (["--push_to_hub", "--hub_strategy=checkpoint"], "has no effect without save_steps"),
        (["--push_to_hub", "--hub_model_id=a/b/c"], "hub_model_id='a/b/c': must be user/name or name"),
        (["--push_to_hub", "--hub_revision="], "hub_revision='': is empty"),
        (["--license=Apache 2"], "license='Apache 2': must be a name used by the hub"),
    ],
)
def test_options_that_cannot_act(options, message):
    with pytest.raises(InputError, match=message):
        parse_config(["dataset_name=toy", *SMALL, *options])
