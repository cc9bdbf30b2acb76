"""Every diff in the README's "How to hack it" is applied to a copy of the code, which is then run."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from runs import ROOT, SMALL, lines, summary, weights
from safetensors.torch import load_file

SECTION = re.search(r"^## How to hack it\n(.*?)(?=^## )", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
DIFFS = dict(re.findall(r"\*\*(.+?)\*\*[^\n]*\n(?:[^\n]+\n)*\n```diff\n(.*?)```", SECTION, re.S))
NAMES = ["A new loss", "A metric", "A head with two outputs", "A collator", "An optimizer", "An action"]
ANEW = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("rm", "train_rm")]:
    del sys.modules[name]
sys.path.insert(0, {folder!r})
import train_rm
assert train_rm.__file__.startswith({folder!r})
sys.exit(train_rm.run())
"""
RUN = ["dataset_name=toy", *SMALL]


@pytest.fixture
def hacked(zygote, tmp_path):
    """hacked(name) → start(*options, code=0): run the program with that diff applied; None: as it is."""

    def make(name: str | None):
        copy = tmp_path / f"copy of {name}"
        shutil.copytree(ROOT / "rm", copy / "rm", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "configs", copy / "configs")
        shutil.copy(ROOT / "train_rm.py", copy)
        if name is not None:
            patch = {"input": DIFFS[name], "text": True, "cwd": copy, "timeout": 30, "capture_output": True}
            done = subprocess.run(["git", "apply", "-"], **patch)
            assert done.returncode == 0, done.stderr

        def start(*options: str, code: int = 0, **env: str):
            run = zygote.start([*RUN, *options], tmp_path, fault=ANEW.format(folder=str(copy)), **env)
            assert run.wait() == code, run.stderr[-3000:]
            return run.stderr

        return start

    return make


def test_there_is_one_of_each_kind():
    assert list(DIFFS) == NAMES
    assert SECTION.count("```diff") == len(NAMES)


def test_new_loss(hacked, tmp_path):
    hacked("A new loss")("--output_dir=run")
    hacked(None)("--output_dir=before")
    assert lines(tmp_path / "before")[0] == pytest.approx(0.69, abs=0.1)
    assert lines(tmp_path / "run")[0] > 0.9  # 1 where the rewards are equal


def test_metric(hacked, tmp_path):
    """It is in the record and in the summary, and can choose the best model."""
    start = hacked("A metric")
    start("--output_dir=run", "--eval_steps=1", "--metric_for_best_model=eval/clear_wins", "--num_print_samples=-1")
    shares = lines(tmp_path / "run", "eval/clear_wins")
    rows = [json.loads(line) for line in (tmp_path / "run/samples/step-4.jsonl").read_text().splitlines()]
    wins = [row["reward_chosen"] - row["reward_rejected"] > 1 for row in rows]
    assert shares[-1] == pytest.approx(sum(wins) / 30) and len(wins) == 30
    end = summary(tmp_path / "run")
    assert shares[end["train/best_step"] - 1] == max(shares) and len(shares) == 4
    assert "eval/clear_wins" in json.loads((tmp_path / "run/results.json").read_text())["intervals"]


def test_head_with_two_outputs(hacked, tmp_path):
    start = hacked("A head with two outputs")
    log = start("--output_dir=run", "--save_steps=1")
    assert "export checked: 16 sequences" in log
    first = load_file(tmp_path / "run/checkpoints/step-1/model.safetensors")["classifier.score.weight"]
    last = weights(tmp_path / "run")["score.weight"]
    assert last.shape[0] == 2 and not torch.equal(first[1], last[1])  # the variance is learned too
    start("--output_dir=again", "--layout=concatenated", "--micro_batch_tokens=200")
    torch.testing.assert_close(lines(tmp_path / "again"), lines(tmp_path / "run"), atol=1e-6, rtol=0)


def test_collator(hacked, tmp_path):
    """Pairs of margin 1 count twice: twice the gradient."""
    rows = [{"chosen": f"be brief {i}", "rejected": f"tell me how {i}", "margin": 1.0} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--dataset_name=pairs.jsonl", "--eval_fraction=0.25", "--max_train_samples=none"]
    options += ["--max_eval_samples=none", "--max_steps=1"]
    hacked(None)(*options, "--output_dir=before")
    hacked("A collator")(*options, "--output_dir=run")
    before, after = (lines(tmp_path / name, "optim/grad_norm")[0] for name in ("before", "run"))
    assert after == pytest.approx(2 * before, rel=1e-4)
    assert lines(tmp_path / "run") == pytest.approx(lines(tmp_path / "before"), abs=1e-6)


def test_optimizer(hacked, tmp_path):
    hacked("An optimizer")(
        "--optim=nadam", "--output_dir=run", "--weight_decay=0.1", "--optim_args=momentum_decay=0.01"
    )
    assert lines(tmp_path / "run")[-1] < 0.8
    assert "optim='nadam' does not fit" in hacked(None)("--optim=nadam", "--output_dir=other", code=2)


def test_action(hacked, tmp_path):
    """It stops in time, with a checkpoint, and the same command goes on to the same weights."""
    start = hacked("An action")
    options = ["--output_dir=run", "--resume_from_checkpoint=latest"]
    assert "stopped after step 1; go on with" in start(*options, code=-15, MAX_SECONDS="0")
    start(*options, MAX_SECONDS="9999")
    hacked(None)("--output_dir=before")
    before = weights(tmp_path / "before")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())
