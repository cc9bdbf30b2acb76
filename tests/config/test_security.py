"""What comes with data, models and repositories may not execute, ask, loop, write elsewhere, or reach a log."""

import json
import os
import pickle
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import wandb_files
from conftest import tiny_classifier, tiny_tokenizer
from runs import ROOT, SMALL, merged, reset_accelerate
from safetensors import SafetensorError
from safetensors.torch import load_file

import train_rm
from rm.config.files import damage, digest

SAYS = {word: [{"role": "user", "content": "w3"}, {"role": "assistant", "content": word}] for word in ("w4", "w5")}
TALK = [{"chosen": SAYS["w4"], "rejected": SAYS["w5"]}] * 4
PAIRS = [{"chosen": "w3 w4", "rejected": f"w{i}"} for i in range(5, 13)]

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a reward model (`reward`) and with a LoRA adapter of it (`adapter`), each with a tokenizer."""
    from peft import LoraConfig, TaskType, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    tiny_classifier("llama").save_pretrained(folder / "reward")
    base = type(tiny_classifier("llama")).from_pretrained(folder / "reward")
    get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=2)).save_pretrained(folder / "adapter")
    for name in ("reward", "adapter"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def model(models, tmp_path):
    """model(name) → a copy of that folder, to be spoiled."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path):
    """A file that code from outside would make; a test fails if it is there at the end."""
    yield (path := tmp_path / "executed")
    assert not path.exists()


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--dataset_name={path}"


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---------------------------------------------------------------- pickles


def zipped(path: Path, evil: Evil) -> None:
    torch.save({"a": evil}, path / "pytorch_model.bin")


def old_format(path: Path, evil: Evil) -> None:
    torch.save({"a": evil}, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def bare(path: Path, evil: Evil) -> None:
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": evil}))


def sharded(path: Path, evil: Evil) -> None:
    torch.save({"a": evil}, path / "shard.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(path / "model.safetensors"), "shard.bin")}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def adapter(path: Path, evil: Evil) -> None:
    torch.save({"a": evil}, path / "adapter_model.bin")


WHY = "its weights are a pickle that is more than tensors, and was not run; weights must be safetensors"


@pytest.mark.parametrize("spoil", [zipped, old_format, bare, sharded, adapter])
def test_pickled_weights_are_not_run(fails, model, tmp_path, marker, spoil):
    path = model("adapter" if spoil is adapter else "reward")
    spoil(path, Evil(marker))
    (path / f"{'adapter_' if spoil is adapter else ''}model.safetensors").unlink()
    data, last = write(tmp_path / "pairs.jsonl", PAIRS), f"'{path}' could not be loaded as a reward model: {WHY}"
    assert fails(f"--model={path}", data, module="rm.evaluate") == last
    if spoil is not adapter:
        assert fails(f"--model_name_or_path={path}", data, "--eval_fraction=0.5") == last


@pytest.mark.parametrize("name, spoil", [("reward", zipped), ("adapter", adapter)])
def test_a_pickle_beside_safetensors_is_not_read(model, tmp_path, marker, monkeypatch, capsys, name, spoil):
    path = model(name)
    spoil(path, Evil(marker))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    reset_accelerate()
    from rm.evaluate import __main__ as evaluate

    assert evaluate.main([f"--model={path}", write(tmp_path / "pairs.jsonl", PAIRS)])["eval/comparisons"] == 8


def test_pickled_tokenizer_files_are_not_run(fails, model, tmp_path, marker):
    path = model("reward")
    for file in path.glob("token*"):
        file.unlink()
    for name in ("tokenizer.pkl", "vocab.pkl", "tokenizer.model", "vocab.bin"):
        (path / name).write_bytes(pickle.dumps(Evil(marker)))
    options = write(tmp_path / "pairs.jsonl", PAIRS), "--eval_fraction=0.5"
    assert fails(f"--model_name_or_path={path}", *options).startswith("no tokenizer could be loaded from")


def test_a_pickled_checkpoint_is_not_run(train, marker):
    """Not even with a manifest that says it is complete."""
    options = ["--max_steps=2", "--save_steps=1"]
    _, folder = train("run", *options)
    (folder / "finished.json").unlink()
    checkpoint = folder / "checkpoints" / "step-1"
    for name in ("model.safetensors", "optimizer.safetensors", "optimizer.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(pickle.dumps(Evil(marker)))
        manifest = {path.name: digest(path) for path in checkpoint.iterdir() if path.name != "manifest.json"}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        assert damage(checkpoint) is None
        with pytest.raises((SafetensorError, ValueError)):
            train("run", *options, f"--resume_from_checkpoint={checkpoint}")
        (checkpoint / name).write_bytes(content)


# ---------------------------------------------------------------- repository code


def custom_model(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    classes = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": classes}))
    return f"'{path}' could not be loaded as a reward model: "


def custom_tokenizer(path: Path) -> str:
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return f"no tokenizer could be loaded from '{path}': "


ALLOW = "it needs code of its own, which was not run; read it, then allow it with trust_remote_code=true"


@pytest.mark.parametrize("spoil", [custom_model, custom_tokenizer])
def test_code_of_a_repository_is_not_run(fails, model, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    path, marker = model("reward"), tmp_path / "executed"
    (path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    start, data = spoil(path), write(tmp_path / "pairs.jsonl", PAIRS)
    options = f"--model_name_or_path={path}", data, "--eval_fraction=0.5"
    assert fails(*options) == start + ALLOW
    assert fails(f"--model={path}", data, module="rm.evaluate").endswith(ALLOW)
    if spoil is custom_tokenizer:
        template = f"--chat_template_path={path}"
        problem = f"is neither a Jinja file nor a tokenizer: {ALLOW}"
        assert fails("--dataset_name=toy", template) == f"chat_template_path='{path}' {problem}"
    assert not marker.exists()
    fails(*options, "--trust_remote_code")  # it has no class Evil
    assert marker.exists()  # so this is what would have been run


@pytest.mark.slow
def test_no_question_on_a_terminal(model, tmp_path, marker):
    """As a person starts it: stdin, stdout and stderr are a terminal, on which transformers could ask."""
    path = model("reward")
    custom_model(path)
    (path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    options = [f"--model_name_or_path={path}", write(tmp_path / "pairs.jsonl", PAIRS), "--eval_fraction=0.5"]
    ours, its = pty.openpty()
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "train_rm.py"), *options, "--output_dir=out"]
    running = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=tmp_path, env=env)
    os.close(its)
    shown, deadline = b"", time.monotonic() + 120
    try:
        while b"y/N" not in shown and select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            shown += os.read(ours, 4096)
    except OSError:  # how a terminal ends
        assert running.wait(timeout=60) == 2, shown.decode()
    finally:
        running.kill()
        os.close(ours)
    assert running.wait(timeout=60) == 2, shown.decode()  # and not killed, after a question or in vain
    assert shown.decode().strip().splitlines()[-1].endswith(ALLOW) and b"Traceback" not in shown


# ---------------------------------------------------------------- names that become paths


def made(folder: Path) -> set[str]:
    """What is in `folder`, without what is below the folders out, runs, cache and model."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if name.split("/")[0] not in ("out", "runs", "cache", "model")}


@pytest.fixture
def succeeds(tmp_path, monkeypatch, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*options: str) -> None:
        reset_accelerate()
        some = [*SMALL, "--max_train_samples=none", "--max_eval_samples=none", "--max_steps=1", "--eval_fraction=0.5"]
        monkeypatch.setattr(sys, "argv", ["train_rm.py", *merged([*some, *options])])
        assert train_rm.run() == 0, capsys.readouterr().err

    return run


def test_names_in_the_data_and_of_the_inputs_are_no_paths(succeeds, model, tmp_path):
    path = model("reward")
    rows = [row | {"id": f"../../../id-{i}", "subset": "../../../subset"} for i, row in enumerate(PAIRS)]
    data = write(tmp_path / "..pairs..jsonl", rows)
    before = made(tmp_path)
    succeeds(f"--model_name_or_path={path}/../model", data, "--report_to=tensorboard", "--num_print_samples=-1")
    new = {name for name in made(tmp_path) - before if not name.startswith("a/b/runs")}
    assert not new
    (folder,) = (tmp_path / "a" / "b" / "runs").iterdir()
    assert folder.name.startswith("model-")


@pytest.mark.parametrize("project", ["../../x", "/tmp/../x", "..", "a/b"])
def test_project_is_no_path(fails, project):
    last = fails(f"--project={project}", "--report_to=tensorboard")
    assert last.startswith(f"project='{project}': must be a plain name, not a path")


def test_run_name_is_no_path(fails):
    assert fails("--run_name=../../x").startswith("run_name='../../x': must be a plain name, not a path")


def test_a_chat_templates_name_is_no_path(fails, model, tmp_path):
    path = model("reward")
    config = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": "{{ messages }}"} for name in ("default", "../../x")]
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    last = fails(f"--model_name_or_path={path}", write(tmp_path / "pairs.jsonl", TALK), "--eval_fraction=0.5")
    assert last == f"'{path}': its chat template '../../x' has a path for a name; set chat_template_path"


def test_a_message_cannot_move_the_cursor_or_fill_lines(fails, tmp_path):
    data = write(tmp_path / "pairs.jsonl", [{"\x1b[2Jgone\nerror: other": 1}] * 4)
    last = fails(data, "--eval_fraction=0.5")
    assert r"\x1b[2Jgone\nerror: other" in last and "unknown layout" in last


# ---------------------------------------------------------------- secrets

# put together here, so that no secret stands in this file, of which results.json may hold a diff
SECRETS = {
    "hub token": "hf_" + "aB" * 17,
    "old W&B key": "0123456789abcdef" * 2 + "76543210",
    "new W&B key": "wandb_v1_" + "Ab1" * 20,
    "password": "-".join(["pass", "word", "of", "mine"]),
    "API key": "-".join(["key", "of", "mine"]),
}


def leaks(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret.encode() in content]


@pytest.mark.slow
def test_secrets_reach_no_file_and_no_output(tmp_path):
    """The real program with W&B (offline) and TensorBoard: config.yaml, results.json, trackers, stdout, stderr."""
    kwargs = {
        "api_key": SECRETS["API key"],
        "url": f"https://me:{SECRETS['password']}@host/x",
        "note": f"{SECRETS['old W&B key']} {SECRETS['new W&B key']}",
    }
    options = [f"--model_revision={SECRETS['hub token']}", f"--chat_template_kwargs={json.dumps(kwargs)}"]
    options += ["--report_to=wandb,tensorboard", "--output_dir=out", "--max_steps=1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "train_rm.py"), *merged([*SMALL, *options])]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "results.json", "data_report.json", "hparams.yml"} <= names
    assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)
    found = {str(path.relative_to(tmp_path)): leaks(path.read_bytes()) for path in files}
    found |= {"stdout": leaks(done.stdout), "stderr": leaks(done.stderr)}

    assert not {name: secrets for name, secrets in found.items() if secrets}
    records = wandb_files.records(wandb_files.run_dir(tmp_path / "out"))
    arguments = [argument for record in records for argument in record.environment.args]
    assert "--model_revision=[redacted]" in arguments  # online it is wandb-metadata.json
    command = json.loads((tmp_path / "out" / "results.json").read_text())["command"]
    assert "--model_revision=[redacted]" in command and "--max_steps=1" in command


@pytest.mark.parametrize(
    "option",
    [
        f"--hub_token={SECRETS['hub token']}",
        SECRETS["hub token"],
        f"--seed={SECRETS['hub token']}",
        f"--dataset_name=https://me:{SECRETS['password']}@host/data.jsonl",
        f"--eval_dataset_name=https://me:{SECRETS['password']}@host/data.jsonl",
        f"--model_name_or_path=https://me:{SECRETS['password']}@host/model",
        f"--model_name_or_path=someone/{SECRETS['new W&B key']}",
    ],
    ids=lambda option: option.split("=")[0][:15],
)
def test_secrets_in_a_wrong_option_are_not_repeated(fails, tmp_path, option):
    last = fails(option)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert not leaks(last.encode())
    assert not {path: leaks(path.read_bytes()) for path in files if leaks(path.read_bytes())}
    assert not [path for path in tmp_path.rglob("*") if leaks(path.name.encode())]


def test_secrets_in_a_wrong_option_of_the_evaluation(fails):
    last = fails(f"--model=https://me:{SECRETS['password']}@host/x", "--dataset_name=toy", module="rm.evaluate")
    assert last.startswith("'https://[redacted]@host/x': there is no such folder")
    assert "[redacted]" in fails(f"--model=x/{SECRETS['hub token']}", "--dataset_name=toy", module="rm.evaluate")


def test_a_hidden_value_is_not_taken_for_a_value(fails, tmp_path):
    """config.yaml of a run is read again by `python -m rm.evaluate` and by --config."""
    (tmp_path / "config.yaml").write_text("chat_template_kwargs: {api_key: '[redacted]'}\n")
    last = fails("--config=config.yaml")
    assert last.startswith("chat_template_kwargs") and "was hidden" in last
