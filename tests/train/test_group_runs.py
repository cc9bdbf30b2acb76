"""Whole runs on prompts with several answers: splits, processes, resume, losses, and the same comparisons as pairs."""

import json

import numpy as np
import pandas as pd
import pytest
from examples import write
from runs import SMALL, assert_same_bits, assert_same_run, in_copy, lines, weights

from rm.config.errors import InputError
from rm.data.toy import toy_dataset

GROUPS = ["dataset_name=toy_groups", "--max_train_samples=40", "--max_eval_samples=12", "--train_batch_size=8"]


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_numbers_do_not_depend_on_layout_micro_batches_or_processes(zygote, tmp_path, loss):
    options = [*SMALL, *GROUPS, f"--loss_type={loss}", "--center_rewards_coefficient=0.01"]
    cuts = {"base": (1, []), "small": (1, ["--micro_batch_tokens=150"]), "padded": (1, ["--layout=concatenated"])}
    cuts |= {"two": (2, ["--micro_batch_tokens=300"])}
    for name, (count, extra) in cuts.items():
        zygote.run(count, [*options, *extra, f"--output_dir={name}"], tmp_path)
        assert_same_run(tmp_path / "base", tmp_path / name)
        table = pd.read_parquet(tmp_path / name / "eval" / "step-4.parquet")
        assert len(table) == 12 * 6 and table["share"].sum() == pytest.approx(12)
    answers = pd.read_parquet(tmp_path / "two" / "eval" / "step-4-answers.parquet")
    assert len(answers) == 12 * 4 and answers["reward"].notna().all() and set(answers["score"]) == {-1, -2, -3, -4}


def test_resumed_groups_have_the_same_bits(train, tmp_path):
    options = [*GROUPS, "--loss_type=plackett_luce", "--eval_steps=2", "--save_steps=2"]
    _, whole = train("whole", *options)
    train("copy", *options, in_copy(whole, "copy", 2))
    assert_same_bits(whole, tmp_path / "copy")


def test_one_prompt_per_step_trains_as_its_comparisons_as_pairs(train, tmp_path):
    """The mean over the comparisons of one prompt is the mean over these comparisons as pairs of one step."""
    (row,) = toy_dataset("train", 1, 0, "plackett_luce")
    group = {name: row[name] for name in ("prompt", "responses", "ranks")}
    pairs = [{"prompt": row["prompt"]} | {side: row["responses"][one[side]] for side in ("chosen", "rejected")}
             for one in row["comparisons"]]  # fmt: skip
    runs = []
    for name, rows, batch in (("groups", [group], 1), ("pairs", pairs, 6)):
        file = write(tmp_path / f"{name}.jsonl", rows)
        options = [f"--dataset_name={file}", f"--eval_dataset_name={file}", f"--train_batch_size={batch}"]
        runs.append(train(name, *options, "--max_steps=3"))
    runs.append(train("grouped", *options, "--max_steps=3", "--train_batch_size=1", "--group_by_prompt"))
    for summary, folder in runs[1:]:
        np.testing.assert_allclose(lines(folder), lines(runs[0][1]), atol=1e-6)
        np.testing.assert_allclose(lines(folder, "optim/grad_norm"), lines(runs[0][1], "optim/grad_norm"), rtol=1e-4)
        for name in ("eval/loss", "eval/accuracy", "eval/margin"):
            assert summary[name] == pytest.approx(runs[0][0][name], abs=1e-5)
        for name, weight in weights(runs[0][1]).items():
            np.testing.assert_allclose(weights(folder)[name], weight, atol=1e-4)
    assert json.loads((runs[2][1] / "data_report.json").read_text())["train"]["prompts"] == 1


def test_groups_and_pairs_in_one_mixture(train, tmp_path):
    rows = toy_dataset("train", 20, 0)
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    groups = [
        {n: row[n] for n in ("prompt", "responses", "ranks")} for row in toy_dataset("test", 20, 0, "plackett_luce")
    ]
    files = [write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "groups.jsonl", groups)]
    evaluated = json.dumps({"pairs": files[0], "groups": files[1]})
    summary, folder = train("out", f"--dataset_name={json.dumps(files)}", f"--eval_dataset_name={evaluated}")
    assert (summary["eval/pairs/comparisons"], summary["eval/groups/comparisons"]) == (20, 120)
    assert "eval/groups/best_of_n_accuracy" in summary and "eval/pairs/best_of_n_accuracy" not in summary
    expected = (20 * summary["eval/pairs/accuracy"] + 20 * summary["eval/groups/accuracy"]) / 40
    assert summary["eval/accuracy"] == pytest.approx(expected)  # prompts count once


@pytest.mark.parametrize(("options", "message"), [
    (["--label_smoothing_factor=0.1"], "label_smoothing_factor=0.1: has no effect with loss_type=plackett_luce"),
    (["--margin_from_scores"], "margin_from_scores=True: has no effect with loss_type=plackett_luce"),
    (["--dataset_config=bradley_terry"], "loss_type=plackett_luce: prompt train-0 needs scores or ranks"),
    (["--dataset_name=toy"], "loss_type=plackett_luce: prompt train-"),  # the labels contradict the true rewards
])  # fmt: skip
def test_what_a_ranking_loss_rejects(train, options, message):
    with pytest.raises(InputError, match=message):
        train(
            "out", *GROUPS[:1] * (options != ["--dataset_name=toy"]), *GROUPS[1:], *options, "--loss_type=plackett_luce"
        )


def test_training_accuracy_counts_prompts_once(train):
    """Every prompt has 6 comparisons: the logged loss is their mean, and speed counts comparisons."""
    summary, folder = train("out", *GROUPS, "--max_steps=5", "--learning_rate=1e-9", "--eval_dataset_name=toy_groups",
                            "--dataset_test_split=train", "--max_eval_samples=40", "--seed=0")  # fmt: skip
    np.testing.assert_allclose(np.mean(lines(folder)), summary["eval/loss"], atol=1e-5)  # one epoch of equal weights
    assert all(np.isfinite(w.numpy()).all() for w in weights(folder).values())
