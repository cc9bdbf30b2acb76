"""Tests of rm/log/trackers.py: what is logged arrives, no tracker can end or delay the run, and no secret gets out."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import wandb_files
import yaml
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from runs import SMALL, wait_until
from wandb_stub import Stub

from rm.config.cli import parse_config
from rm.config.errors import InputError
from rm.log import trackers
from rm.log.trackers import RunLog, prepare_trackers, start_tracker

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
    PartialState(cpu=True)
    end_wandb()
    yield
    end_wandb()


def end_wandb():
    """Have W&B's service write all it has and forget its settings, as at the end of a program."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def run_log(config, tmp_path):
    return lambda *report_to, record=None: RunLog(config(*report_to), tmp_path, "n", record or {}, None, True)


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "given, names",
    [
        ([], []),
        (["wandb"], ["wandb"]),
        (["WandB", "tensorboard", "wandb"], ["wandb", "tensorboard"]),
        (["all"], ["tensorboard", "wandb"]),
    ],
)
def test_names(given, names, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert prepare_trackers(given) == names


@pytest.mark.parametrize(
    "given, message",
    [
        (["wandbb"], "unknown or not installed: wandbb"),
        (["aim"], "unknown or not installed: aim; installed: wandb"),
    ],
)
def test_wrong_names(given, message, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(InputError, match=message):
        prepare_trackers(given)


# ------------------------------------------------------------------------------ trackers that fail


@pytest.fixture
def fake(monkeypatch):
    """fake(method=function, ...): a tracker that remembers its calls, or does as told, in TensorBoard's place."""

    def make(**methods) -> list:
        calls = []

        class Fake(GeneralTracker):
            name, requires_logging_directory, tracker = "tensorboard", False, None

            def __init__(self, project):
                super().__init__()

            def log(self, values, step=None):
                calls.append((step, values))

            def finish(self):
                calls.append("finish")

        for name, method in methods.items():
            setattr(Fake, name, method)
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
        return calls

    return make


def test_calls_are_made_once_and_in_order(run_log, fake):
    calls = fake()
    log = run_log("tensorboard")
    for step in (3, 1, 2):
        log.log({"a": step}, step)
    log.log_wandb("t", lambda wandb: pytest.fail("there is no W&B"), 3)
    log.close()
    assert calls == [(3, {"a": 3}), (1, {"a": 1}), (2, {"a": 2}), "finish"]


def test_other_processes_do_nothing(tmp_path, config):
    log = RunLog(config("wandb"), tmp_path / "run", "n", {}, None, is_main=False)
    log.log({"a": 1}, 1)
    log.sync()
    log.close()
    assert log.num_lines == 0 and not (tmp_path / "run").exists()


def test_failures(run_log, fake, tmp_path, caplog):
    """A kind of failure is logged once, on one line and redacted; later calls are tried again."""
    failures, seen = [SystemExit("no"), OSError(f"server is away {HUB_TOKEN}\nsecond line")], []

    def log(self, values, step=None):
        if failures:
            raise failures.pop()
        seen.append(step)

    fake(log=log)
    run = run_log("tensorboard")
    for step in range(4):
        run.log({"a": step}, step)
    run.close()
    assert [line["a"] for line in lines(tmp_path)] == [0, 1, 2, 3] and seen == [2, 3]
    (warning,) = caplog.records
    assert (
        warning.message
        == "tensorboard: log failed (OSError('server is away [redacted]\\nsecond line')); the run continues"
    )


def test_tracker_that_does_not_start(run_log, fake, tmp_path, caplog):
    def fail(self, *args, **kwargs):
        raise OSError("read-only file system")

    fake(store_init_configuration=fail)
    run = run_log("tensorboard")
    run.log({"a": 1}, 1)
    run.close()
    assert run.trackers == {} and "tensorboard: did not start" in caplog.text and len(lines(tmp_path)) == 1


def test_tracker_that_hangs_costs_no_time(run_log, fake, tmp_path, monkeypatch, caplog):
    """And when it ends at last, nobody is told: that would come after the last line of the run."""
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.5)
    forever, others = threading.Event(), set(threading.enumerate())

    def hang(self, values, step=None):
        forever.wait()
        raise OSError("late")

    fake(log=hang)
    run = run_log("tensorboard")
    start = time.monotonic()
    for step in range(1000):
        run.log({"a": 1}, step)
    run.close()
    assert time.monotonic() - start < 3
    forever.set()
    wait_until(lambda: others.issuperset(threading.enumerate()), timeout=10)
    assert len(lines(tmp_path)) == 1000
    assert [r.message for r in caplog.records] == ["tensorboard: not finished in time; metrics.jsonl has everything"]


# ------------------------------------------------------------------------------ W&B


def test_wandb_without_key(config, tmp_path, monkeypatch, caplog):
    """Offline, with no question asked even on a terminal; everything is in the run's files, and nothing elsewhere."""
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked a question"))
    record = {"learning_rate": 1e-3, "nothing": None, "names": ["a", "b"], "hub_token": HUB_TOKEN}
    output_dir = tmp_path / "runs" / "one"
    run = RunLog(config("wandb"), output_dir, "n", record, None, True)
    folder = wandb_files.run_dir(output_dir)
    assert f"wandb: offline (no API key); to upload later: wandb sync {folder}" in caplog.text
    settings = run.trackers["wandb"].run.settings
    assert (settings.init_timeout, settings.finish_timeout) == (trackers.INIT_SECONDS, trackers.FINISH_SECONDS - 2)
    run.log({"train/loss": 0.5, "train/pairs": 64, "bad": float("nan")}, 10)
    run.log({"eval/accuracy": np.float64(0.75)}, 10)
    run.log({"train/loss": 0.25}, 5)  # a step that goes back is kept
    run.log_wandb("table", lambda wandb: {"t": wandb.Table(columns=["a"], data=[["x"]])}, 10)
    run.close({"eval/accuracy": 0.875})
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
    assert {name: logged[name] for name in record} == record | {"hub_token": "[redacted]"}
    assert wandb_files.summary(folder)["eval/accuracy"] == 0.875
    (header,) = [r.run for r in wandb_files.records(folder) if r.HasField("run") and r.run.display_name]
    assert (header.project, header.display_name, header.run_group) == ("p", "n", "one")
    metrics = [r.metric for r in wandb_files.records(folder) if r.HasField("metric")]
    assert ("*", "train/step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    (artifact,) = [r.artifact for r in wandb_files.records(folder) if r.HasField("artifact")]
    assert Path(artifact.manifest.contents[0].local_path).is_relative_to(output_dir)  # `wandb sync` will look there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "runs"]
    assert all(".cache" in p.parts for p in (tmp_path / "home").rglob("*") if p.is_file())  # logs of W&B's own service


@pytest.mark.parametrize("trouble", ["refused", "unreachable", "hangs", "fails after login"])
def test_wandb_server_trouble(trouble, run_log, tmp_path, monkeypatch, caplog):
    """With a key but without a server that answers, the run is offline after a bounded time."""
    stub = Stub(status=401 if trouble == "refused" else 200)
    if trouble == "hangs":
        stub.hang.set()
    monkeypatch.setattr(trackers, "INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if trouble == "unreachable" else stub.url)
    if trouble == "fails after login":
        monkeypatch.setattr("wandb.login", lambda **_: setattr(stub, "status", 404) or True)
    start = time.monotonic()
    run = run_log("wandb")
    run.log({"a": 1}, 1)
    run.close()
    end_wandb()
    assert time.monotonic() - start < 10
    error = "CommError" if trouble == "fails after login" else "AuthenticationError"
    assert f"wandb: offline ({error}(" in caplog.text and KEY not in caplog.text
    assert wandb_files.history(wandb_files.run_dir(tmp_path))[0]["a"] == 1
    stub.close()


OUTAGE = """
import sys, time, types, urllib.request
from pathlib import Path
from accelerate.state import PartialState
from rm.log import trackers

print({"wandb", "tensorboard"} & set(sys.modules))
PartialState(cpu=True)
trackers.FINISH_SECONDS, trackers.EXIT_SECONDS = 4.0, 2.0
config = types.SimpleNamespace(project="p", report_to=["wandb"])

def run():
    log = trackers.RunLog(config, Path(sys.argv[1]), "n", {}, None, True)
    urllib.request.urlopen(sys.argv[2] + "/start-hanging")
    start = time.monotonic()
    for step in range(100):
        log.log({"a": step}, step)
    if sys.argv[3] != "close":
        log.log_wandb("table", lambda wandb: {"t": wandb.Table(columns=["a"], data=[[1]])}, 1)  # W&B tries for 19 s
    print(time.monotonic() - start)
    print(time.time(), flush=True)
    if sys.argv[3] == "error":
        1 / 0
    log.close()
    return 7

trackers.run_and_exit(run)
"""


@pytest.mark.slow
def test_wandb_outage(tmp_path, monkeypatch):
    """When the server stops answering, training does not wait, and the end waits as long as it says."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_PROJECT", "of-the-user")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stubs, processes = {}, {}
    for end in ("close", "blocked", "error"):
        stubs[end] = stub = Stub()
        env = os.environ | {"WANDB_BASE_URL": stub.url, "CODE": OUTAGE}
        command = f'{sys.executable} -c "$CODE" {tmp_path / end} {stub.url} {end}; code=$?; date +%s.%N; exit $code'
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes[end] = subprocess.Popen(["bash", "-c", command], env=env, **options)
    for end, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == (1 if end == "error" else 7)
        assert err.count("Traceback") == (end == "error") and KEY not in err, err
        assert ("wandb: not finished in time" in err) == (end == "blocked")
        imported, logging, closing, ended = out.splitlines()
        assert imported == "set()"  # importing rm.log imports no tracker
        assert float(logging) < 1 and float(ended) - float(closing) < 4 + 2 + 1
        ((_, info),) = stubs[end].runs.items()
        assert (info["project"], info["displayName"]) == ("of-the-user", "n")
        assert len(lines(tmp_path / end)) == 100
        stubs[end].close()
    (folder,) = (tmp_path / "close" / "wandb").glob("run-*")  # all is on the disk for `wandb sync`
    assert [line["a"] for line in wandb_files.history(folder)] == list(range(100))


def test_wandb_choices_of_the_user_stand(run_log, tmp_path, monkeypatch, caplog):
    """Mode, name and group."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    monkeypatch.setattr("wandb.login", lambda **_: pytest.fail("login in offline mode"))
    run = run_log("wandb")
    assert run.trackers["wandb"].run.settings.stop_fn is None  # "stop run" in the browser: SIGINT, as on a terminal
    run.close()
    end_wandb()
    folder = wandb_files.run_dir(tmp_path)
    (header,) = [r.run for r in wandb_files.records(folder) if r.HasField("run") and r.run.display_name]
    assert (header.display_name, header.run_group) == ("mine", "ours")
    assert "wandb: offline (WANDB_MODE)" in caplog.text


def test_wandb_disabled_by_the_user(run_log, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = run_log("wandb")
    run.log({"a": 1}, 1)
    run.close()
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["metrics.jsonl"]


# ------------------------------------------------------------------------------ sweeps

TRIAL = {"learning_rate": 0.001, "center_rewards_coefficient": None, "train_batch_size": 64, "eval_steps": 50}
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
@pytest.mark.parametrize("launcher", ["python", "torchrun --standalone --nproc_per_node=2"], ids=["python", "torchrun"])
def test_sweep_agent(tmp_path, launcher):
    """W&B's own agent runs a trial of train_rm.py by configs/sweep.yaml's command: it is a run of the sweep, in the
    sweep's project and named by W&B, and the swept metric has one value an evaluation."""
    for name in ("train_rm.py", "rm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = {"max_train_samples": 80, "max_eval_samples": 30, "max_steps": 4, "eval_steps": 2, "logging_steps": 1}
    trial = TRIAL | small | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "output_dir": str(tmp_path / "out")}
    sweep = (ROOT / "configs" / "sweep.yaml").read_text()
    sweep = sweep.replace("  - python\n", "".join(f"  - {word}\n" for word in launcher.split()))
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


def test_a_sweep_stops_its_own_runs(run_log, monkeypatch):
    """Its agent sends the signal, and a second one might end the run at once."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal"))
    run = run_log("wandb")
    run.trackers["wandb"].run.settings.stop_fn()
    run.close()


# ------------------------------------------------------------------------------ other trackers


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard(run_log, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = {"learning_rate": 1e-3, "nothing": None, "names": ["a", "b"], "options": {"x": 1}, "on": True}
    run = run_log("tensorboard", record=record)
    run.log({"train/loss": 0.5, "train/pairs": 64}, 10)
    run.log({"train/loss": 0.25}, 20)
    run.close()
    events = EventAccumulator(str(tmp_path / "p")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 0.5), (20, 0.25)]
    (saved,) = (tmp_path / "p").glob("*/hparams.yml")
    plain = {"learning_rate": 1e-3, "nothing": "null", "names": '["a", "b"]', "options": '{"x": 1}', "on": True}
    assert yaml.safe_load(saved.read_text()) == plain


def test_every_tracker_of_accelerate(tmp_path, monkeypatch):
    """Each can be chosen, takes the arguments that it gets, has the run's name, and keeps its files in the folder."""
    names = [name for name in LOGGER_TYPE_TO_CLASS if name != "wandb"]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: names)
    assert prepare_trackers(names) == names
    monkeypatch.setattr(os, "environ", dict(os.environ))
    got = {}
    for name in names:
        real = LOGGER_TYPE_TO_CLASS[name]

        class Fake(real):
            def __init__(self, *args, real=real, **options):
                got[self.name] = signature(real.__init__).bind(self, *args, **options).arguments | options
                self.store_init_configuration = self.start = lambda *_: None

        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Fake)
        start_tracker(name, "project", "my run", tmp_path, {}, resumed=True)
    for name, key in (("mlflow", "run_name"), ("trackio", "name"), ("swanlab", "name"), ("clearml", "task_name")):
        assert got[name][key] == "my run"
    places = [
        got["tensorboard"]["logging_dir"],
        got["aim"]["logging_dir"],
        got["dvclive"]["dir"],
        got["swanlab"]["log_dir"],
    ]
    places += [os.environ["COMET_OFFLINE_DIRECTORY"], os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")]
    assert all(Path(place).is_relative_to(tmp_path) for place in places)
    assert got["trackio"]["resume"] == "allow" and got["dvclive"]["resume"] is True
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"


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
    options = ["dataset_name=toy", *SMALL, "--eval_steps=2", "--output_dir=out"]
    options += ["--report_to=trackio,tensorboard,wandb", '--chat_template_kwargs={"a": [1, null]}']
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


def test_mlflow(run_log, tmp_path, monkeypatch):
    """Where it is installed: what is in metrics.jsonl is in its database, in the output folder."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    log = run_log("mlflow", record={"lst": [1, None], "none": None, "name": "x"})
    for step in (1, 2):
        log.log({"train/loss": 0.5 / step, "eval/a b/accuracy": 1.0}, step)
    log.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    assert run.data.params == {"lst": "[1, null]", "none": "null", "name": "x"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    assert {path.name for path in tmp_path.iterdir()} <= {"home", "mlflow.db", "metrics.jsonl"}
