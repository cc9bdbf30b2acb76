"""Tests of rm/log/trackers.py: what is logged arrives, no tracker can stop or delay the run, and no secret gets out."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import accelerate.accelerator
import numpy as np
import pytest
import wandb_files
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from runs import SMALL, wait_until
from wandb_stub import Stub

from rm.config.cli import parse_config
from rm.log import trackers as tracking
from rm.log.trackers import RunLog, open_metrics, prepare_trackers, redact, tracker_options

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef" * 2 + "01234567"
HUB_TOKEN = "hf_" + "a" * 34

# threads of W&B that a test leaves waiting for a server end with an error
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def clean_wandb(monkeypatch, tmp_path, tmp_path_factory):
    """No W&B variable and no key of the developer's, and no run left over from another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("data")))  # RunLog sets it where it is not set
    monkeypatch.chdir(tmp_path)
    end_wandb()
    yield
    end_wandb()


def end_wandb():
    """Have W&B's service write all it has and forget its settings, as at the end of a program."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def run_log(output_dir, *report_to, **options) -> RunLog:
    options = {"project": "p", "run_name": "n", "config": {"learning_rate": 1e-3}} | options
    return RunLog(Accelerator(cpu=True), output_dir, report_to=list(report_to), **options)


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ names, imports, secrets


@pytest.mark.parametrize(
    "given, names",
    [
        ([], []),
        (None, []),
        ("none", []),
        (["none"], []),
        (["wandb"], ["wandb"]),
        ([" WandB", "tensorboard", "wandb"], ["wandb", "tensorboard"]),
        (["all"], ["tensorboard", "wandb"]),
    ],
)
def test_names(given, names, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert prepare_trackers(given) == names


@pytest.mark.parametrize("given, message", [("wandbb", "not a tracker"), ("aim", "is not installed; installed: wandb")])
def test_wrong_name(given, message, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(ValueError, match=message):
        prepare_trackers([given])
    with pytest.raises(ValueError, match="none cannot be combined"):
        prepare_trackers(["none", "wandb"])


def test_redact():
    config = {
        "hub_token": HUB_TOKEN,
        "apiKey": "abc",
        "wandb_api_key": KEY,
        "smtp_password": "hunter2",
        "secrets": "kept: not a whole word",
        "use_auth_token": True,
        "token": None,
        "micro_batch_tokens": 8192,
        "eos_token": "</s>",
        "tokenizer_name_or_path": "gpt2",
        "model_revision": KEY,
        "learning_rate": 1e-5,
        "dataset_name": "https://me:hunter2@example.com/data.jsonl",
        "note": f"made with {HUB_TOKEN} and {KEY}",
        "lora_target_modules": ["q_proj", "v_proj", HUB_TOKEN],
        "nested": {"password": "hunter2", "depth": [{"api_key": ["hunter2"], "n": 1}]},
    }
    hidden = "[redacted]"
    assert redact(config) == config | {
        "hub_token": hidden,
        "apiKey": hidden,
        "wandb_api_key": hidden,
        "smtp_password": hidden,
        "dataset_name": f"https://{hidden}@example.com/data.jsonl",
        "note": f"made with {hidden} and {hidden}",
        "lora_target_modules": ["q_proj", "v_proj", hidden],
        "nested": {"password": hidden, "depth": [{"api_key": hidden, "n": 1}]},
    }
    assert config["hub_token"] == HUB_TOKEN  # a copy


# ------------------------------------------------------------------------------ metrics.jsonl


def test_metrics_file(tmp_path):
    log = run_log(tmp_path / "run")
    before = time.time()
    log.log({"train/loss": np.float32(0.5), "train/pairs": np.int64(64), "eval/accuracy": float("nan")}, 10)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith("}\n")  # there before `close`
    log.log({"train/loss": float("inf"), "train/pairs": 64, "optim/low": float("-inf")}, 20)
    log.close()
    first, second = lines(tmp_path / "run")
    assert before - 1 < first.pop("time") <= second.pop("time") <= time.time() + 1
    assert first == {"step": 10, "train/loss": 0.5, "train/pairs": 64, "eval/accuracy": "NaN"}
    assert second == {"step": 20, "train/loss": "Infinity", "train/pairs": 64, "optim/low": "-Infinity"}
    assert isinstance(first["train/pairs"], int) and np.isnan(float(first["eval/accuracy"]))


def test_resumed_metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    torn = '{"step": 4, "to'  # by a crash
    old = "".join(json.dumps({"step": step, "x": 0}) + "\n" for step in (1, 2, 3)) + torn
    path.write_text(old)
    log = run_log(tmp_path, resume_lines=2)
    log.log({"x": 1}, 3)
    log.close()
    assert [(line["step"], line["x"]) for line in lines(tmp_path)] == [(1, 0), (2, 0), (3, 1)]
    assert (tmp_path / "metrics.jsonl.bak").read_text() == old
    open_metrics(path, None).close()  # a fresh run
    assert path.read_text() == ""


def test_other_processes_do_nothing(tmp_path):
    other = SimpleNamespace(is_main_process=False)
    log = RunLog(other, tmp_path / "run", project="p", run_name="n", config={}, report_to=["wandb"])
    log.log({"a": 1}, 1)
    log.table("t", ["a"], [[1]], 1)
    log.summary({"a": 1})
    log.close()
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ trackers that fail


def fake_tracker(monkeypatch, **methods) -> list[dict]:
    """Put a tracker that remembers its calls, or fails as told, in TensorBoard's place."""
    calls = []

    class Fake(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False
        tracker = None

        def __init__(self, project, **options):
            super().__init__()

        def log(self, values, step=None, **_):
            calls.append(values | {"step": step})

    for name, method in methods.items():
        setattr(Fake, name, method)
    monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    return calls


def test_tracker_that_fails_once(tmp_path, monkeypatch, caplog):
    failures = [OSError("server is away\nsecond line")]
    seen = []

    def log(self, values, step=None):
        if failures:
            raise failures.pop()
        seen.append(step)

    fake_tracker(monkeypatch, log=log)
    run = run_log(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        run.log({"a": step}, step)
    run.close()
    assert [line["a"] for line in lines(tmp_path)] == [1, 2, 3]
    assert seen == [2, 3]  # it comes back
    (warning,) = caplog.records
    assert warning.message == "tensorboard: log failed (OSError: server is away); training goes on"


def test_tracker_that_always_fails_is_warned_about_once(tmp_path, monkeypatch, caplog):
    def fail(self, *args, **kwargs):
        raise SystemExit("no")

    fake_tracker(monkeypatch, log=fail)
    run = run_log(tmp_path, "tensorboard")
    for step in range(50):
        run.log({"a": 1}, step)
    run.close()
    assert len(caplog.records) == 1 and len(lines(tmp_path)) == 50


def test_tracker_that_does_not_start(tmp_path, monkeypatch, caplog):
    def fail(self, *args, **kwargs):
        raise OSError("read-only file system")

    fake_tracker(monkeypatch, store_init_configuration=fail)
    run = run_log(tmp_path, "tensorboard")
    assert run.accelerator.trackers == []
    run.log({"a": 1}, 1)
    run.close()
    assert "tensorboard: does not start and is left out" in caplog.text and len(lines(tmp_path)) == 1


def test_tracker_that_hangs_costs_no_time(tmp_path, monkeypatch, caplog):
    forever = threading.Event()
    fake_tracker(monkeypatch, log=lambda self, values, step=None: forever.wait())
    run = run_log(tmp_path, "tensorboard", finish_timeout=0.5)
    start = time.monotonic()
    for step in range(1000):
        run.log({"a": 1}, step)
    assert time.monotonic() - start < 2
    start = time.monotonic()
    run.close()
    assert time.monotonic() - start < 4
    assert len(lines(tmp_path)) == 1000 and "not finished properly" in caplog.text
    forever.set()


def test_trackers_start_and_finish_once_and_keep_order(tmp_path, monkeypatch):
    seen = []
    calls = fake_tracker(
        monkeypatch, start=lambda self: seen.append("start"), finish=lambda self: seen.append("finish")
    )
    run = run_log(tmp_path, "tensorboard", "wandb")
    for step in (3, 1, 2):
        run.log({"a": step}, step)
    run.close()
    run.accelerator.end_training()  # finishes the trackers that it knows
    end_wandb()
    assert seen == ["start", "finish"] and len(list((tmp_path / "wandb").glob("*run-*"))) == 1
    assert calls == [{"a": step, "step": step} for step in (3, 1, 2)]


# ------------------------------------------------------------------------------ W&B


def test_wandb_without_key(tmp_path, monkeypatch, caplog):
    """Offline, with no question asked even on a terminal; everything is in the run's files, and nothing elsewhere."""
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked a question"))
    config = {"learning_rate": 1e-3, "nothing": None, "names": ["a", "b"], "hub_token": HUB_TOKEN}
    output_dir = tmp_path / "runs" / "one"
    run = run_log(output_dir, "wandb", config=config, group="seeds")
    folder = wandb_files.run_dir(output_dir)
    assert f"wandb: offline (no API key); to upload it later: wandb sync {folder}" in caplog.text
    run.log({"train/loss": 0.5, "train/pairs": 64, "bad": float("nan")}, 10)
    run.log({"eval/accuracy": np.float64(0.75)}, 10)
    run.log({"train/loss": 0.25}, 5)  # a step that goes back is kept
    run.summary({"eval/accuracy": 0.875})
    run.table("t", ["a"], [["x"]], 10)
    run.close()
    end_wandb()

    history = wandb_files.history(folder)
    for line in history:
        for name in ("_step", "_timestamp", "_runtime"):
            line.pop(name)
    assert np.isnan(history[0].pop("bad"))
    table = history.pop()
    assert table["t.nrows"] == 1 and table["train/step"] == 10
    assert history == [
        {"train/loss": 0.5, "train/pairs": 64, "train/step": 10},
        {"eval/accuracy": 0.75, "train/step": 10},
        {"train/loss": 0.25, "train/step": 5},
    ]
    logged = wandb_files.config(folder)
    assert {name: logged[name] for name in config} == config | {"hub_token": "[redacted]"}
    assert wandb_files.summary(folder)["eval/accuracy"] == 0.875
    (header,) = [r.run for r in wandb_files.records(folder) if r.HasField("run") and r.run.display_name]
    assert (header.project, header.display_name, header.run_group) == ("p", "n", "seeds")
    metrics = [r.metric for r in wandb_files.records(folder) if r.HasField("metric")]
    assert ("*", "train/step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    (artifact,) = [r.artifact for r in wandb_files.records(folder) if r.HasField("artifact")]
    assert Path(artifact.manifest.contents[0].local_path).is_relative_to(output_dir)  # `wandb sync` will look there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "runs"]
    assert all(".cache" in p.parts for p in (tmp_path / "home").rglob("*") if p.is_file())  # logs of W&B's own service


@pytest.mark.parametrize("trouble", ["refused", "unreachable", "hangs"])
def test_wandb_server_trouble(trouble, tmp_path, monkeypatch, caplog):
    """With a key but without a server that answers, the run is offline after a bounded time."""
    stub = Stub(status=401 if trouble == "refused" else 200)
    if trouble == "hangs":
        stub.hang.set()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if trouble == "unreachable" else stub.url)
    start = time.monotonic()
    run = run_log(tmp_path, "wandb")
    run.log({"a": 1}, 1)
    run.close()
    end_wandb()
    assert time.monotonic() - start < 10
    assert "wandb: offline (AuthenticationError: " in caplog.text and KEY not in caplog.text
    assert wandb_files.history(wandb_files.run_dir(tmp_path))[0]["a"] == 1
    stub.close()


def test_wandb_server_fails_after_login(tmp_path, monkeypatch, caplog):
    """The server takes the key but not the run: offline all the same."""
    stub = Stub()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", stub.url)
    monkeypatch.setattr("wandb.login", lambda **_: setattr(stub, "status", 404) or True)
    run = run_log(tmp_path, "wandb", init_timeout=2)
    run.close()
    assert "wandb: offline (CommError" in caplog.text
    wandb_files.run_dir(tmp_path)
    stub.close()


OUTAGE = """
import sys, time, urllib.request
from accelerate import Accelerator
from rm.log.trackers import RunLog

print({"wandb", "tensorboard"} & set(sys.modules))
options = dict(project="p", run_name="n", config={}, report_to=["wandb"], finish_timeout=1)
log = RunLog(Accelerator(cpu=True), sys.argv[1], **options)
urllib.request.urlopen(sys.argv[2] + "/start-hanging")
start = time.monotonic()
for step in range(100):
    log.log({"a": step}, step)
    log.table("t", ["a"], [[step]], step)
logged = time.monotonic()
log.close()
print(logged - start, time.monotonic() - logged, flush=True)
"""


def test_wandb_online_then_outage(tmp_path, monkeypatch):
    """Online it logs to the server; when that stops answering, training does not wait, and `close` not long."""
    stub = Stub()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", stub.url)
    monkeypatch.setenv("WANDB_PROJECT", "of-the-user")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", OUTAGE, str(tmp_path), stub.url]  # its threads would disturb other tests
    said = tmp_path / "said"
    with open(said, "w") as file:
        process = subprocess.Popen(command, stdout=file)
    try:
        wait_until(lambda: process.poll() is not None or said.read_text().count("\n") == 2)
    finally:
        process.kill()  # W&B's service would go on trying for some twenty seconds
        process.wait(timeout=10)
    imported, seconds = said.read_text().splitlines()
    ((run_id, info),) = stub.runs.items()
    assert (info["project"], info["displayName"]) == ("of-the-user", "n")
    logging, closing = map(float, seconds.split())
    assert logging < 2 and closing < 6
    assert imported == "set()"  # importing rm.tracking imports no tracker
    assert len(lines(tmp_path)) == 100
    stub.close()


def test_wandb_choices_of_the_user_stand(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    monkeypatch.setattr("wandb.login", lambda **_: pytest.fail("login in offline mode"))
    run = run_log(tmp_path, "wandb", group="g")
    run.close()
    end_wandb()
    folder = wandb_files.run_dir(tmp_path)
    (header,) = [r.run for r in wandb_files.records(folder) if r.HasField("run") and r.run.display_name]
    assert (header.display_name, header.run_group) == ("mine", "ours")
    assert "wandb: offline (as you chose)" in caplog.text


def test_wandb_disabled_by_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = run_log(tmp_path, "wandb")
    run.log({"a": 1}, 1)
    run.close()
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["metrics.jsonl"]


def test_wandb_settings(tmp_path, monkeypatch):
    """W&B's "stop run" reaches the handler that writes a checkpoint, and its waiting is bounded."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    got = []
    old = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        run = run_log(tmp_path, "wandb", init_timeout=7, finish_timeout=8)
        settings = run._tracker("wandb").run.settings
        assert (settings.init_timeout, settings.finish_timeout) == (7, 8)
        stopper = threading.Thread(target=settings.stop_fn)  # W&B calls it on a thread
        stopper.start()
        stopper.join(timeout=10)
        time.sleep(0.01)
        assert got == [signal.SIGTERM]
        run.close()
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")  # there the agent sends the signal, and a second one may be fatal
        run = run_log(tmp_path, "wandb")
        run._tracker("wandb").run.settings.stop_fn()
        time.sleep(0.01)
        assert got == [signal.SIGTERM]
        run.close()
    finally:
        signal.signal(signal.SIGTERM, old)


# ------------------------------------------------------------------------------ TensorBoard


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"learning_rate": 1e-3, "nothing": None, "names": ["a", "b"], "options": {"x": 1}, "on": True}
    run = run_log(tmp_path, "tensorboard", config=config)
    run.log({"train/loss": 0.5, "train/pairs": 64}, 10)
    run.log({"train/loss": 0.25}, 20)
    run.table("eval/samples", ["id", "text"], [["1", "a|b\nc\udc80"]], 20)
    run.close()
    events = EventAccumulator(str(tmp_path / "p")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 0.5), (20, 0.25)]
    (text,) = events.Tensors("eval/samples/text_summary")
    markdown = "| id | text |\n|---|---|\n| 1 | a\\|b<br>c? |"
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (20, markdown)
    (saved,) = (tmp_path / "p").glob("*/hparams.yml")
    plain = {"learning_rate": 1e-3, "nothing": "null", "names": '["a", "b"]', "options": '{"x": 1}', "on": True}
    assert yaml.safe_load(saved.read_text()) == plain


# ------------------------------------------------------------------------------ sweeps

TRIAL = {"learning_rate": 0.001, "center_rewards_coefficient": None, "train_batch_size": 64}
SWEEP = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())


@pytest.mark.parametrize("macro", ["args", "args_no_hyphens"])
def test_sweep_arguments_are_understood(macro, monkeypatch):
    """What an agent appends for a trial parses to the trial's values, in both forms that configs/sweep.yaml names."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    monkeypatch.chdir(ROOT)
    assert set(TRIAL) == set(SWEEP["parameters"])
    at = SWEEP["command"].index("--config")
    command = [word for word in SWEEP["command"][at:] if word != "${args}"]
    appended = create_sweep_command_args({"args": {name: {"value": value} for name, value in TRIAL.items()}})[macro]
    config = parse_config(command + appended)
    assert {name: getattr(config, name) for name in TRIAL} == TRIAL
    assert config.report_to == ["wandb"] and config.eval_steps > 0


@pytest.mark.slow
def test_sweep_agent(tmp_path):
    """W&B's own agent runs a trial of train_rm.py by configs/sweep.yaml's command: it is a run of the sweep, in the
    sweep's project and named by W&B, and the swept metric has one value an evaluation."""
    for name in ("train_rm.py", "rm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = {"max_train_samples": 80, "max_eval_samples": 30, "max_steps": 4, "eval_steps": 2, "logging_steps": 1}
    trial = TRIAL | small | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "output_dir": str(tmp_path / "out")}
    sweep = (ROOT / "configs" / "sweep.yaml").read_text()
    stub = Stub(trials=[trial], sweep=sweep)
    env = os.environ | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": stub.url, "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    # `wandb agent`, but polling faster than every five seconds
    code = "import wandb, wandb.wandb_agent as w; w.Agent.POLL_INTERVAL = 0.5; wandb.agent('me/swept/s')"
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 150}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, **options)
    assert list(stub.runs) == ["trial0"], done.stderr
    run = stub.runs["trial0"]
    assert (run["project"], run["sweep"]) == ("swept", "s") and "displayName" not in run and "groupName" not in run
    recorded = lines(tmp_path / "out")
    assert [line["step"] for line in recorded] == [1, 2, 2, 3, 4, 4]
    history = stub.history["trial0"]
    for name in ("eval/accuracy", "train/loss", "optim/learning_rate"):
        sent = [(line["train/step"], line[name]) for line in history if name in line]
        assert sent == [(line["step"], line[name]) for line in recorded if name in line], name
    assert [line["optim/learning_rate"] for line in recorded if "train/loss" in line] == [0.001] * 4
    tables = [(line["train/step"], line["eval/samples"]["nrows"]) for line in history if "eval/samples" in line]
    assert tables == [(2, 4), (4, 4)]
    stub.close()


# ------------------------------------------------------------------------------ other trackers


def test_every_tracker_of_accelerate_is_known_by_name(monkeypatch):
    """Installed or not: each of Accelerate's names is one of ours, and can be given with the others at once."""
    names = [str(name) for name in LoggerType if name != LoggerType.ALL]
    assert set(names) == set(LOGGER_TYPE_TO_CLASS)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: names)
    assert prepare_trackers(names) == names


def test_what_other_trackers_are_started_with(tmp_path, monkeypatch):
    """Each takes the options it gets, has the run's name, and writes inside of the output folder."""
    fake = SimpleNamespace(ExperimentConfig=dict)
    monkeypatch.setitem(sys.modules, "comet_ml", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for name in ("mlflow", "trackio", "swanlab", "clearml", "comet_ml"):
        options = tracker_options(name, "my run", tmp_path)
        assert "my run" in json.dumps(options)
        signature(LOGGER_TYPE_TO_CLASS[name].__init__).bind(None, "project", **options)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracker_options("mlflow", "n", tmp_path)["logging_dir"] == str(tmp_path / "mlflow")
    assert tracker_options("comet_ml", "n", tmp_path)["experiment_config"]["offline_directory"].startswith(
        str(tmp_path)
    )
    for name, key in (("dvclive", "dir"), ("swanlab", "log_dir")):
        assert tracker_options(name, "n", tmp_path)[key] == str(tmp_path / name)
    assert tracker_options("dvclive", "n", tmp_path, resumed=True)["resume"] is True
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")  # the user's stands, and so does its place for files
    assert tracker_options("mlflow", "n", tmp_path) == {"run_name": "n", "logging_dir": None}


FAKE_TRACKIO = """
import json, pathlib
class Run:
    def __init__(self, **options):
        self.file = open("trackio.jsonl", "a")
        self.write("init", options)
    def write(self, what, value):
        self.file.write(json.dumps([what, value]) + "\\n")
        self.file.flush()
    def log(self, values, step=None):
        self.write("log", {"step": step, **values})
    def finish(self):
        self.write("finish", None)
class Config:
    def update(self, values, allow_val_change):
        assert all(isinstance(value, (int, float, str)) for value in values.values()), values
        run.write("config", values)
config = Config()
def init(**options):
    global run
    run = Run(**options)
    return run
"""


def test_a_whole_run_with_three_trackers(zygote, tmp_path):
    """With a stand-in for one of the packages: everything in metrics.jsonl reaches it, once and in order."""
    (tmp_path / "trackio.py").write_text(FAKE_TRACKIO)
    fault = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    fault += "import accelerate.tracking as t; t._available_trackers.append(t.LoggerType.TRACKIO)"
    options = [
        "dataset_name=toy",
        *SMALL,
        "--eval_steps=2",
        "--output_dir=out",
        "--report_to=trackio,tensorboard,wandb",
    ]
    options += ['--chat_template_kwargs={"a": [1, null]}']
    run = zygote.run(1, options, tmp_path, fault=fault)
    got = [json.loads(line) for line in (tmp_path / "trackio.jsonl").read_text().splitlines()]
    assert got[0] == ["init", {"project": "reward-model", "name": "out", "resume": "never"}]
    assert got[1][0] == "config" and got[1][1]["chat_template_kwargs"] == '{"a": [1, null]}'
    assert got[-1] == ["finish", None]
    assert [values for what, values in got if what == "log"] == [
        {name: value for name, value in line.items() if name != "time"} for line in lines(tmp_path / "out")
    ]
    assert "failed" not in run.stderr
    assert list((tmp_path / "out").rglob("*tfevents*")) and list((tmp_path / "out").rglob("*.wandb"))


def test_mlflow(tmp_path, monkeypatch):
    """Where it is installed: what is in metrics.jsonl is in its database, in the output folder."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    log = run_log(tmp_path / "out", "mlflow", config={"lst": [1, None], "none": None, "name": "x"})
    for step in (1, 2):
        log.log({"train/loss": 0.5 / step, "eval/a b/accuracy": 1.0}, step)
    log.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    assert run.data.params == {"lst": "[1, null]", "none": "null", "name": "x"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    assert not list(tmp_path.glob("ml*"))


def test_what_was_given_up_says_nothing_later(caplog):
    """Its failure would come after the last line of the run, which tells what to do."""
    started, go_on = threading.Event(), threading.Event()

    def fail():
        started.set()
        go_on.wait(10)
        raise RuntimeError("late")

    thread = tracking.TrackerThread("some")
    done = thread.call("log", fail)
    assert started.wait(10)
    thread.given_up = True
    go_on.set()
    assert isinstance(done.exception(timeout=10), RuntimeError)
    assert not caplog.records
