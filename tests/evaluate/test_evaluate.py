"""Exact evaluation: rewards independent of layout and batches; the command gives the metrics of the training run."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import PAD, random_pairs, tiny_classifier
from runs import SMALL, mixture, reset_accelerate
from safetensors.torch import load_file, save_file

import train_rm
from rm.config.errors import InputError
from rm.evaluate import __main__ as evaluate
from rm.evaluate.table import read_table
from rm.model.load import load_tokenizer
from rm.model.reward_model import RewardModel


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
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    low, high = printed.pop("intervals")["eval/loss"]
    assert printed == metrics and low < metrics["eval/loss"] < high
    for name, value in metrics.items():
        assert value == pytest.approx(summary[name], abs=1e-5), name


def test_the_table_of_every_evaluation_is_kept(train):
    """All numbers of a run's summary come from its file."""
    summary, folder = train("out", "--eval_steps=2", "--max_steps=3", "--center_rewards_coefficient=0.01")
    assert [path.name for path in sorted((folder / "eval").iterdir())] == ["step-2.parquet", "step-3.parquet"]
    loss = {"center_rewards_coefficient": 0.01, "label_smoothing": 0.0}
    metrics = evaluate.pairs_metrics(read_table(folder / "eval/step-3.parquet"), **loss)
    assert metrics == {name: value for name, value in summary.items() if name.startswith("eval/")}
    results = json.loads((folder / "results.json").read_text())
    low, high = results["intervals"]["eval/loss"]
    assert low < summary["eval/loss"] < high
    assert [row["bin"] for row in results["breakdowns"]["by_subset"]] == ["brief", "detailed", "multi_turn", "system"]
    mistakes = [json.loads(line) for line in (folder / "mistakes.jsonl").read_text().splitlines()]
    margins = [row["margin"] for row in mistakes]
    assert 0 < len(margins) <= 20 and margins == sorted(margins) and max(margins) < 0
    assert mistakes[0]["prompt"] and mistakes[0]["correct"] == "wrong"


def test_the_table_of_the_best_evaluation_is_the_results(train, tmp_path):
    options = ["--eval_steps=1", "--max_steps=3", "--load_best_model_at_end", "--greater_is_better=true"]
    summary, folder = train("out", *options, "--metric_for_best_model=eval/loss")  # the worst, and so not the last
    assert summary["train/best_step"] < 3
    results = json.loads((folder / "results.json").read_text())
    table = read_table(folder / f"eval/step-{summary['train/best_step']}.parquet")
    assert evaluate.pairs_metrics(table)["eval/margin"] == summary["eval/margin"]
    low, high = evaluate.pairs_metrics(table, intervals=True)["eval/margin"]
    assert results["intervals"]["eval/margin"] == [low, high] and low < summary["eval/margin"] < high
    checkpoint = f"--resume_from_checkpoint={folder / 'checkpoints' / 'step-{}'}".format(summary["train/best_step"])
    again, elsewhere = train("elsewhere", *options, "--metric_for_best_model=eval/loss", checkpoint)
    assert again["eval/margin"] == summary["eval/margin"]
    assert json.loads((elsewhere / "results.json").read_text())["intervals"] == results["intervals"]


def test_comparison_mistakes_and_output(trained, tmp_path, capsys):
    summary, folder = trained
    reset_accelerate()
    other = tmp_path / "other"
    train_rm.main(["dataset_name=toy", *SMALL, f"--output_dir={other}", "--max_steps=1", "--add_eos=false"])
    capsys.readouterr()
    reset_accelerate()
    command = f"--model {folder} --compare {other} --mistakes 3 --output={tmp_path / 'kept'}"
    metrics = evaluate.main(command.split())
    printed = capsys.readouterr().out
    last = json.loads(printed.strip().splitlines()[-1])
    assert last == metrics | {"intervals": last["intervals"]}
    for words in ("95% interval", "Accuracy by subset", "this - other", "worst mistakes"):
        assert words in printed
    kept = json.loads((tmp_path / "kept/metrics.json").read_text())
    assert kept["metrics"] == metrics and metrics["compare/pairs"] == metrics["eval/pairs"] == 30
    assert metrics["compare/accuracy"] == metrics["eval/accuracy"] == summary["eval/accuracy"]
    results = json.loads((other / "results.json").read_text())["summary"]
    assert metrics["compare/other_accuracy"] == results["eval/accuracy"]
    assert metrics["compare/other_loss"] == pytest.approx(results["eval/loss"], abs=1e-5)
    low, high = kept["intervals"]["compare/loss_difference"]
    assert low < metrics["compare/loss_difference"] < high
    table = read_table(tmp_path / "kept/table.parquet")
    margin = (table["reward_chosen"] - table["reward_rejected"]).sort_values()
    rows = [json.loads(line) for line in (tmp_path / "kept/mistakes.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == table["id"][margin.index[:3]].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mistakes=many"], "mistakes=many: must be a number of pairs"),
        (["--compare"], "--compare needs a value"),
        (["--output", "--mistakes", "3"], "--output needs a value"),
        (["--output={}/config.yaml"], "is a file; give a folder"),
    ],
)
def test_wrong_options(trained, options, message):
    with pytest.raises(InputError, match=message):
        evaluate.main([f"--model={trained[1]}", *(option.format(trained[1]) for option in options)])


def test_another_data_set_and_wrong_models(trained, tmp_path, capsys):
    _, folder = trained
    rows = [{"chosen": "hello! rinse the rice.", "rejected": "what a silly question."}] * 3
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reset_accelerate()
    metrics = evaluate.main(
        [f"--model={folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}", "max_eval_samples=none"]
    )
    assert metrics["eval/pairs"] == 3
    with pytest.raises(InputError, match="--model FOLDER is needed"):
        evaluate.main(["--dataset_name=toy"])
    reset_accelerate()
    with pytest.raises(InputError):
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
    with pytest.raises(InputError, match="there is no such folder"):
        evaluate.main([f"--model={tmp_path / 'nothing'}"])


def test_the_launchers_precision_is_in_the_record(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    summary, folder = train("out", "--max_steps=2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    reset_accelerate()
    metrics = evaluate.main([f"--model={folder}"])
    assert metrics == pytest.approx({name: summary[name] for name in metrics}, abs=1e-9)


def test_rewards_that_are_not_finite_are_named_and_are_no_numbers(trained, tmp_path, capsys, caplog):
    folder = shutil.copytree(trained[1], tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(str(folder))
    weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids("yeast")] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [{"id": name, "chosen": f"hello! {name} it.", "rejected": "sorry."} for name in ("rinse", "yeast", "boil")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reset_accelerate()
    metrics = evaluate.main([f"--model={folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}"])
    assert math.isnan(metrics["eval/accuracy"]) and metrics["eval/pairs"] == 3
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["eval/loss"] == "NaN"
    assert "the rewards of 1 of 3 evaluation pairs are not finite: yeast" in caplog.text


def test_a_run_whose_evaluation_is_not_finite_is_saved(train, pretrained, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(str(folder))
    weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids("yeast")] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    row = {"chosen": "hello! rinse it.", "rejected": "sorry."}
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row | {"id": str(i)}) for i in range(20)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [row, row | {"chosen": "yeast."}])))
    data = [f"--dataset_name={tmp_path / 'train.jsonl'}", f"--eval_dataset_name={tmp_path / 'test.jsonl'}"]
    summary, out = train("out", *data, f"--model_name_or_path={folder}", "--max_steps=1")
    assert summary["eval/accuracy"] == "NaN" and (out / "model.safetensors").exists()
    json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)


def test_help(capsys):
    assert evaluate.main(["--help"]) == {} and "--compare OTHER_OUT" in capsys.readouterr().out
