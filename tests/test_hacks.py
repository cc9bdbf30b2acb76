"""Every patch in tests/hacks/ is applied to a copy of the code, which is then run."""

import json
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from runs import ROOT, SMALL, assert_same_bits, lines, summary, weights
from safetensors.torch import load_file
from transformers import pipeline

from rm.data.toy import toy_dataset

HACKS = ROOT / "tests" / "hacks"
ROWS = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in toy_dataset("train", 30, 0)]
RUN_COPY = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("rm", "train_rm")]: del sys.modules[name]
sys.path.insert(0, {!r})
import rm.train.finish, train_rm
rm.train.finish.write_report = lambda folder: None
sys.exit(train_rm.run())
"""


@pytest.fixture
def hacked(zygote, tmp_path):
    """hacked(patch, *options) → the folder of a run with that patch applied; None: the code as it is."""

    def start(patch: str | None, *options: str):
        code, name = tmp_path / f"code {patch}", f"run {patch}"
        if not code.exists():
            for folder in ("rm", "configs"):
                shutil.copytree(ROOT / folder, code / folder)
            shutil.copy(ROOT / "train_rm.py", code)
            if patch is not None:
                subprocess.run(["git", "apply", str(HACKS / f"{patch}.diff")], cwd=code, check=True)
        processes, argv = 2 if patch == "ema" else 1, [*SMALL, f"--output_dir={name}", *options]
        zygote.run(processes, argv, tmp_path, RUN_COPY.format(str(code)))
        return tmp_path / name

    return start


def file_of(path, rows: list[dict]) -> list[str]:
    """Options that train on at most 30 rows and evaluate on them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--dataset_name={path}", f"--eval_dataset_name={path}"]


def table_of(run, step: int = 4) -> pd.DataFrame:
    return pd.read_parquet(run / "eval" / f"step-{step}.parquet")


def check_resuming(hacked, patch: str, run, options: list[str]) -> None:
    """Resume a copy of the run from its second step; it ends with the same bits."""
    (shutil.copytree(run, run.with_name("copy")) / "results.json").unlink()
    hacked(patch, *options, "--output_dir=copy", "--resume_from_checkpoint=copy/checkpoints/step-2")
    assert_same_bits(run, run.with_name("copy"), also_kept=False)


def test_patches_are_small():
    for patch in HACKS.glob("*.diff"):
        added = [line for line in patch.read_text(encoding="utf-8").splitlines() if line.startswith("+")]
        files = [line for line in added if line.startswith("+++ ")]
        assert len(files) <= 2 and len(added) - len(files) <= 20, patch


def test_new_loss_with_column(hacked, tmp_path):
    """The hinge of the first step, one batch of all rows, is known from the run without the patch."""
    rows = [row | {"strength": 50.0 + i} for i, row in enumerate(ROWS)]
    options = [*file_of(tmp_path / "rows.jsonl", rows), "--train_batch_size=30", "--max_steps=1"]
    run, before = hacked("new_loss_with_column", *options), hacked(None, *options)
    assert table_of(run, 1)["strength"].tolist() == [50 + i for i in range(30)]
    assert lines(run)[0] == pytest.approx(lines(before)[0] + 64.5 - lines(before, "train/margin")[0], rel=1e-5)


def test_length_penalty(hacked, tmp_path):
    """It is the loss with a margin of -0.02 x the difference of lengths, in both layouts."""
    run = hacked("length_penalty", *file_of(tmp_path / "rows.jsonl", ROWS))
    margins = table_of(run).eval("-0.02 * (length_chosen - length_rejected)")
    rows = [row | {"margin": margin} for row, margin in zip(ROWS, margins, strict=True)]
    same = hacked(None, *file_of(tmp_path / "rows.jsonl", rows), "--layout=concatenated")
    assert margins.std() > 0.02 and lines(run) == pytest.approx(lines(same), abs=1e-5)


def test_second_head(hacked):
    """The first output is the reward, for the evaluation and for the pipeline; the second one is near the score."""
    run = hacked("second_head", "--max_steps=60", "--learning_rate=0.003", "--max_train_samples=600")
    rows, classify = toy_dataset("test", 30, 42), pipeline("text-classification", str(run), function_to_apply="none")
    texts = [classify.tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    outputs = classify(texts, add_special_tokens=False, batch_size=30, top_k=None)
    found = pd.DataFrame([{out["label"]: out["score"] for out in row} for row in outputs])
    assert found["LABEL_0"].tolist() == pytest.approx(table_of(run, 60)["reward_chosen"].tolist(), abs=1e-4)
    assert ((found["LABEL_1"] - rows["score_chosen"][:]) ** 2).mean() < 3  # the variance of the scores is 5.8


def test_text_metric(hacked):
    """It is in the record, has an interval, and chooses the best model."""
    run = hacked("text_metric", "--num_print_samples=-1", "--eval_steps=1", "--metric_for_best_model=eval/refusal_bias")
    found, samples = lines(run, "eval/refusal_bias"), (run / "samples" / "step-4.jsonl").read_text().splitlines()
    answers = [(r[side], r[f"reward_{side}"]) for r in map(json.loads, samples) for side in ("chosen", "rejected")]
    refusals, others = ([r for text, r in answers if ("sorry" in text) == refuses] for refuses in (True, False))
    assert found[-1] == pytest.approx(sum(refusals) / len(refusals) - sum(others) / len(others), abs=1e-5)
    assert found[summary(run)["train/best_step"] - 1] == min(found) and len(found) == 4
    assert "eval/refusal_bias" in json.loads((run / "results.json").read_text())["intervals"]


def test_ema(hacked):
    """On two processes. The averages are evaluated and saved, here of step 2, the best; resuming gives equal bits."""
    options = ["--save_steps=1", "--eval_steps=2", "--metric_for_best_model=eval/loss", "--greater_is_better=true"]
    options += ["--load_best_model_at_end", "--learning_rate=0.01"]
    run = hacked("ema", *options)
    first, second = (load_file(run / "checkpoints" / f"step-{n}" / "model.safetensors") for n in (1, 2))
    averages = {name.removeprefix("classifier."): w.lerp(second[name], 0.01) for name, w in first.items()}
    torch.testing.assert_close(weights(run), averages, rtol=0, atol=1e-6)
    of_saved, of_evaluated = json.loads((run / "export_check.json").read_text())["rewards"], table_of(run, 2)
    assert of_saved[::2] == pytest.approx(of_evaluated["reward_chosen"][:8].tolist(), abs=1e-6)
    check_resuming(hacked, "ema", run, options)


def test_optimizer(hacked):
    """It gets its arguments, and a resumed run has the same bits."""
    options = ["--optim=nadam", "--optim_args=momentum_decay=0.5", "--weight_decay=0.1", "--save_steps=1"]
    run = hacked("optimizer", *options)
    state = load_file(run / "checkpoints" / "step-1" / "optimizer.safetensors")
    assert state["classifier.score.weight/mu_product"].item() == pytest.approx(0.9 * (1 - 0.5 * 0.96**0.5))
    check_resuming(hacked, "optimizer", run, options)


def test_data_layout(hacked, tmp_path):
    """Rows of the layout give the run of the same rows as prompt, chosen and rejected."""
    rows = [dict(zip(("question", "better", "worse"), row.values(), strict=True)) for row in ROWS]
    run = hacked("data_layout", *file_of(tmp_path / "rows.jsonl", rows))
    before = hacked(None, *file_of(tmp_path / "pairs.jsonl", ROWS))
    report = json.loads((run / "data_report.json").read_text())["train"]
    assert report["format"] == "conversation_better_worse" and report["kept"] == 30
    assert_same_bits(run, before)
