"""Exact evaluation: rewards independent of layout and batches; the command gives the metrics of the training run."""

import importlib.util
import json

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import PAD, random_pairs, tiny_classifier
from runs import SMALL, mixture, reset_accelerate

import train_rm
from rm import evaluate
from rm.config import ConfigError
from rm.model import ModelError, RewardModel


def test_rewards_do_not_depend_on_layout_or_batches():
    reset_accelerate()
    model, pairs = RewardModel(tiny_classifier("llama")), random_pairs(23)
    tables = [
        evaluate.evaluate_rewards(
            model, Accelerator(cpu=True), pairs, layout=layout, micro_batch_tokens=budget, pad_token_id=PAD
        )
        for layout in ("concatenated", "shared_prefix")
        for budget in (1, 100, 10**6)
    ]
    assert tables[0].shape == (23, 2) and tables[0].dtype == np.float64
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    reset_accelerate()
    return train_rm.main(["dataset_name=toy", *SMALL, f"--output_dir={folder}"]), folder


@pytest.mark.parametrize("form", ["--model={}", "--model {}"])
def test_the_command_gives_the_runs_own_metrics(trained, capsys, form):
    summary, folder = trained
    reset_accelerate()
    metrics = evaluate.main(form.format(folder).split())
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == metrics
    for name, value in metrics.items():
        assert value == pytest.approx(summary[name], abs=1e-5), name


def test_another_data_set_and_wrong_models(trained, tmp_path, capsys):
    _, folder = trained
    rows = [{"chosen": "hello! rinse the rice.", "rejected": "what a silly question."}] * 3
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reset_accelerate()
    metrics = evaluate.main(
        [f"--model={folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}", "max_eval_samples=none"]
    )
    assert metrics["eval/pairs"] == 3
    with pytest.raises(ConfigError, match="--model FOLDER is needed"):
        evaluate.main(["--dataset_name=toy"])
    reset_accelerate()
    with pytest.raises(ModelError):
        evaluate.main(["--model=configs/tiny_llama", "--max_eval_samples=10"])


def test_several_sets_have_the_same_numbers_as_in_training(train, tmp_path):
    summary, folder = train("out", *mixture(tmp_path), "--max_steps=3", "--num_print_samples=2")
    trained = {name: value for name, value in summary.items() if name.startswith("eval/")}
    assert (trained["eval/pairs"], trained["eval/plain/pairs"], trained["eval/talk/pairs"]) == (30, 12, 18)
    assert "eval/talk/accuracy_ceiling" in trained and "eval/accuracy_ceiling" not in trained
    sizes = trained["eval/plain/pairs"], trained["eval/talk/pairs"]
    for name in ("loss", "accuracy", "margin", "reward_chosen", "ties"):
        mean = np.average([trained[f"eval/plain/{name}"], trained[f"eval/talk/{name}"]], weights=sizes)
        assert trained[f"eval/{name}"] == pytest.approx(mean), name
    shown = [json.loads(line) for line in (folder / "samples/step-3.jsonl").read_text().splitlines()]
    assert [(row["set"], row["id"]) for row in shown] == [
        ("plain", "plain/0"), ("plain", "plain/1"), ("talk", "talk/test-12"), ("talk", "talk/test-13"),
    ]  # fmt: skip
    places = {name: str(tmp_path / f"{name}-test.jsonl") for name in ("plain", "talk")}
    for options in ([], [f"--eval_dataset_name={places}"], [f"--dataset_name={list(places.values())}"]):
        reset_accelerate()
        metrics = evaluate.main([f"--model={folder}", *options])
        metrics = {name.replace("-test/", "/"): value for name, value in metrics.items()}  # named after the files
        assert metrics == pytest.approx(trained, abs=1e-5), options


def test_the_held_out_part_of_several(train, tmp_path):
    options = [*mixture(tmp_path)[:2], "--eval_fraction=0.25", "--max_train_samples=none", "--max_eval_samples=none"]
    summary, folder = train("out", *options, "--max_steps=1")
    reset_accelerate()
    metrics = evaluate.main([f"--model={folder}"])
    assert metrics == pytest.approx({name: v for name, v in summary.items() if name.startswith("eval/")}, abs=1e-5)
    assert metrics["eval/plain/pairs"] == metrics["eval/talk/pairs"] == 10


def test_the_users_data_however_they_are_named(train, tmp_path):
    options = mixture(tmp_path)
    _, folder = train("out", "--max_steps=1", options[-1])
    (tmp_path / "other.yaml").write_text(f"dataset_name: {tmp_path / 'talk.jsonl'}\neval_fraction: 0.5\n")
    for form, pairs in (("--dataset-name={}", 40), ("--dataset_name {}", 40), ("--config=other.yaml", 20)):
        reset_accelerate()
        metrics = evaluate.main([f"--model={folder}", *form.format(tmp_path / "talk.jsonl").split()])
        assert metrics["eval/pairs"] == pairs and "eval/plain/pairs" not in metrics, form


def test_what_the_training_machine_had_and_this_one_has_not(trained, monkeypatch):
    """A run with tf32, and one whose 4-bit base was merged, on a CPU without bitsandbytes."""
    summary, folder = trained
    record = folder / "config.yaml"
    before = record.read_text()
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=importlib.util.find_spec: find(name) if name != "bitsandbytes" else None,
    )
    changed = before.replace("tf32: null", "tf32: true").replace("use_peft: false", "use_peft: true")
    record.write_text(changed.replace("load_in_4bit: false", "load_in_4bit: true"))
    reset_accelerate()
    assert evaluate.main([f"--model={folder}"])["eval/loss"] == pytest.approx(summary["eval/loss"], abs=1e-5)
    record.write_text(before)


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        evaluate.main([f"--model={tmp_path / 'nothing'}"])


def test_the_launchers_precision_is_in_the_record(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    summary, folder = train("out", "--max_steps=2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    reset_accelerate()
    metrics = evaluate.main([f"--model={folder}"])
    assert metrics == pytest.approx({name: summary[name] for name in metrics}, abs=1e-9)
