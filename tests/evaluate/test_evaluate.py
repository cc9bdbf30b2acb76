"""`python -m rm.evaluate`: the numbers of the run, other data, comparison, RewardBench, output, wrong input."""

import json
import logging
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from runs import SMALL, mixture, reset_accelerate
from safetensors.torch import load_file, save_file
from tables import CONFIG
from transformers import AutoTokenizer, pipeline

import train_rm
from rm.config.errors import InputError
from rm.config.options import LossOptions
from rm.evaluate import __main__ as program
from rm.evaluate.rewardbench import PUBLISHED_PAIRS
from rm.evaluate.table import evaluation_intervals, evaluation_metrics
from rm.model.load import recorded_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(summary, folder) of a run on conversations."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    reset_accelerate()
    return train_rm.main(["dataset_name=toy", *SMALL, f"--output_dir={folder}"]), folder


@pytest.fixture
def evaluate(capsys):
    """evaluate(folder, *options) → (metrics, standard output) of the program."""

    def run(folder, *options: str):
        reset_accelerate()
        capsys.readouterr()
        metrics = program.main([f"--model={folder}", *options])
        return metrics, capsys.readouterr().out

    return run


def of_evaluation(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name.startswith("eval/")}


def write(file, rows: list[dict]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


# ---------------------------------------------------------------- data of the run, and others


def test_the_numbers_of_the_run(trained, evaluate):
    summary, folder = trained
    metrics, printed = evaluate(folder)
    last = json.loads(printed.strip().splitlines()[-1])
    low, high = last.pop("intervals")["eval/loss"]
    assert last == metrics and low < metrics["eval/loss"] < high
    assert metrics == pytest.approx(of_evaluation(summary), abs=1e-5)


def test_other_data(trained, evaluate, tmp_path):
    texts = [("hello! rinse it.", "what a silly question."), ("again, rinse it.", "add milk."), ("rest.", "boil it.")]
    file = write(tmp_path / "pairs.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts])
    for options in ([f"--dataset-name={file}"], ["--dataset_name", file], [f"--eval_dataset_name={file}"]):
        assert evaluate(trained[1], *options, "max_eval_samples=none")[0]["eval/comparisons"] == 3
    (tmp_path / "other.yaml").write_text(f"dataset_name: {file}\neval_fraction: 0.5\n")
    assert evaluate(trained[1], f"--config={tmp_path}/other.yaml")[0]["eval/comparisons"] == 2


def test_several_sets(train, evaluate, tmp_path):
    summary, folder = train("out", *mixture(tmp_path), "--max_steps=3", "--num_print_samples=2")
    trained = of_evaluation(summary)
    assert (trained["eval/comparisons"], trained["eval/plain/comparisons"], trained["eval/talk/comparisons"]) == (
        30,
        12,
        18,
    )
    for name in ("loss", "accuracy", "margin", "reward_chosen", "ties"):
        mean = np.average([trained[f"eval/{part}/{name}"] for part in ("plain", "talk")], weights=(12, 18))
        assert trained[f"eval/{name}"] == pytest.approx(mean), name
    shown = [json.loads(line) for line in (folder / "samples/step-3.jsonl").read_text().splitlines()]
    assert [(row["set"], row["id"]) for row in shown] == [
        ("plain", "plain/0"), ("plain", "plain/1"), ("talk", "talk/test-12"), ("talk", "talk/test-13"),
    ]  # fmt: skip
    places = {name: str(tmp_path / f"{name}-test.jsonl") for name in ("plain", "talk")}
    for options in ([], [f"--eval_dataset_name={places}"], [f"--dataset_name={list(places.values())}"]):
        metrics = {name.replace("-test/", "/"): value for name, value in evaluate(folder, *options)[0].items()}
        assert metrics == pytest.approx(trained, abs=1e-5), options  # the names are those of the files


def test_the_held_out_part_of_several(train, evaluate, tmp_path):
    options = [*mixture(tmp_path)[:2], "--eval_fraction=0.25", "--max_train_samples=none", "--max_eval_samples=none"]
    summary, folder = train("out", *options, "--max_steps=1")
    metrics, _ = evaluate(folder)
    assert metrics == pytest.approx(of_evaluation(summary), abs=1e-5) and metrics["eval/talk/comparisons"] == 10


def test_the_precision_of_the_launcher_is_recorded(train, evaluate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    summary, folder = train("out", "--max_steps=2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert evaluate(folder)[0] == pytest.approx(of_evaluation(summary), abs=1e-9)


def test_comparison_mistakes_and_output(trained, evaluate, tmp_path):
    summary, folder = trained
    reset_accelerate()
    other = train_rm.main(
        ["dataset_name=toy", *SMALL, f"--output_dir={tmp_path}/other", "--max_steps=1", "--add_eos=false"]
    )
    options = ["--compare", str(tmp_path / "other"), "--mistakes=3", f"--output={tmp_path}/kept"]
    metrics, printed = evaluate(folder, *options)
    for words in ("95% interval", "compare/accuracy_difference", "worst mistakes"):
        assert words in printed
    kept = json.loads((tmp_path / "kept/metrics.json").read_text())
    assert kept["metrics"] == metrics and metrics["compare/comparisons"] == metrics["eval/comparisons"] == 30
    assert metrics["compare/accuracy"] == metrics["eval/accuracy"] == summary["eval/accuracy"]
    assert metrics["compare/other_loss"] == pytest.approx(other["eval/loss"], abs=1e-5)
    low, high = kept["intervals"]["compare/loss_difference"]
    assert low < metrics["compare/loss_difference"] < high
    assert [row["bin"] for row in kept["slices"]["by_subset"]] == ["brief", "detailed", "multi_turn", "system"]
    table = pd.read_parquet(tmp_path / "kept/table.parquet")
    margin = (table["reward_chosen"] - table["reward_rejected"]).sort_values()
    rows = [json.loads(line) for line in (tmp_path / "kept/mistakes.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == table["id"][margin.index[:3]].tolist()


# ---------------------------------------------------------------- the tables of a run


def test_the_table_of_each_evaluation_is_kept(train):
    summary, folder = train("out", "--eval_steps=2", "--max_steps=3", "--center_rewards_coefficient=0.01")
    assert [path.name for path in sorted((folder / "eval").iterdir())] == ["step-2.parquet", "step-3.parquet"]
    config = LossOptions(center_rewards_coefficient=0.01)
    assert evaluation_metrics(pd.read_parquet(folder / "eval/step-3.parquet"), config) == of_evaluation(summary)
    mistakes = [json.loads(line) for line in (folder / "mistakes.jsonl").read_text().splitlines()]
    margins = [row["margin"] for row in mistakes]
    assert 0 < len(margins) <= 20 and margins == sorted(margins) and max(margins) < 0
    assert mistakes[0]["prompt"] and mistakes[0]["correct"] == "wrong"


def test_the_table_of_the_best_evaluation_is_the_results(train):
    options = ["--eval_steps=1", "--max_steps=3", "--load_best_model_at_end", "--greater_is_better=true"]
    options += ["--metric_for_best_model=eval/loss"]  # the worst, and so not the last
    summary, folder = train("out", *options)
    assert (step := summary["train/best_step"]) < 3
    table, results = (
        pd.read_parquet(folder / f"eval/step-{step}.parquet"),
        json.loads((folder / "results.json").read_text()),
    )
    assert evaluation_metrics(table, CONFIG)["eval/margin"] == summary["eval/margin"]
    assert results["intervals"]["eval/margin"] == list(evaluation_intervals(table, CONFIG)["eval/margin"])


# ---------------------------------------------------------------- RewardBench


SAID = ("gladly, boil water.", "no.", "what a silly question.", "boil water.")


def asked(i: int) -> str:
    return f"be brief. tell me how to make tea {'please ' * (i % 3)}."


def conversation(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def rewardbench_rows() -> list[dict]:
    """Two pairs of each subset, in RewardBench's columns; ids are integers, the same in several subsets."""
    said = [{"chosen": SAID[i % 2], "rejected": SAID[2 + i % 2]} for i in range(46)]
    return [{"prompt": asked(i), **said[i], "subset": s, "id": i % 7} for i, s in enumerate([*PUBLISHED_PAIRS] * 2)]


def rewardbench_2_rows() -> list[dict]:
    rows = []
    for i, subset in enumerate(["Factuality", "Precise IF", "Math", "Safety", "Focus"] * 2):
        said = [SAID[(i + k) % 4] for k in range(4)]
        rows.append({"id": str(i), "prompt": asked(i), "chosen": said[:1], "rejected": said[1:], "subset": subset})
    for i in range(2):
        for kind, n in (("ref", 1), ("tied", 2)):
            row = {"id": f"{kind}:{i}", "prompt": asked(i), "chosen": list(SAID[:n]), "rejected": list(SAID[2:])}
            rows.append(row | {"subset": "Ties"})
    return rows


def rewards_by_transformers(folder, texts) -> list[float]:
    """The package's way: the chat template over a message of the user and one of the assistant; or plain text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    score = pipeline("text-classification", model=str(folder), function_to_apply="none")
    rendered = [t if isinstance(t, str) else tokenizer.apply_chat_template(t, tokenize=False) for t in texts]
    return [found["score"] for found in score(rendered)]


def test_rewardbench(trained, evaluate, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows, folder = rewardbench_rows(), trained[1]
    file = write(tmp_path / "rb.jsonl", rows)
    metrics, _ = evaluate(folder, f"--dataset_name={file}")
    for side in ("chosen", "rejected"):
        rewards = rewards_by_transformers(folder, [conversation(row["prompt"], row[side]) for row in rows])
        assert metrics[f"eval/reward_{side}"] == pytest.approx(np.mean(rewards), abs=1e-5)
    assert metrics["eval/rewardbench/pairs"] == 46 and 0 <= metrics["eval/rewardbench/score"] <= 1
    assert "scored as conversations: the model was trained on conversations" in caplog.text
    as_text, _ = evaluate(folder, f"--dataset_name={file}", "--text_as_conversation=false")
    assert as_text["eval/reward_chosen"] != pytest.approx(metrics["eval/reward_chosen"], abs=1e-3)
    elsewhere = tmp_path / "elsewhere"  # a model of another program
    shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("results.json", "config.yaml", "checkpoints"))
    assert evaluate(elsewhere, f"--dataset_name={file}")[0] == pytest.approx(metrics)
    assert "scored as conversations: the tokenizer has a chat template" in caplog.text
    no_prompt = write(tmp_path / "hh.jsonl", [{"chosen": "tell me. no.", "rejected": "tell me. gladly."}] * 3)
    assert evaluate(folder, f"--dataset_name={no_prompt}")[0]["eval/comparisons"] == 3  # remains text


def test_rewardbench_beside_another_set_in_training(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sets = {"rb": write(tmp_path / "rb.jsonl", rewardbench_rows()), "toy": "toy"}
    summary, folder = train("out", f"--eval_dataset_name={sets}", "--max_eval_samples=none")
    assert "eval/rb/rewardbench/score" in summary and summary["eval/rb/rewardbench/pairs"] == 46
    assert not any("rewardbench" in name for name in summary if "/rb/" not in name)
    shown = [json.loads(line) for line in (folder / "samples" / "step-4.jsonl").read_text().splitlines()]
    assert shown[0]["prompt"].endswith(asked(0)) and shown[0]["chosen"] == SAID[0]


def test_a_model_trained_on_text_reads_text(train, evaluate, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write(tmp_path / "rb.jsonl", rewardbench_rows())
    _, folder = train("out", f"--dataset_name={file}", "--eval_fraction=0.25", "--max_train_samples=none")
    assert evaluate(folder, f"--dataset_name={file}")[0]["eval/comparisons"] == 46
    assert "scored as text: the model was trained on text" in caplog.text


@pytest.mark.parametrize("options", [[], ["--text_as_conversation=false"]], ids=["conversations", "text"])
def test_rewardbench_2(trained, evaluate, tmp_path, options):
    """The rewards of all comparisons are those of single answers by transformers."""
    rows, folder = rewardbench_2_rows(), trained[1]
    file = write(tmp_path / "rb2.jsonl", rows)
    metrics, printed = evaluate(folder, f"--dataset_name={file}", f"--output={tmp_path}/kept", *options)
    assert metrics["eval/rewardbench2/prompts"] == 14 and metrics["eval/comparisons"] == 10 * 3 + 2 * 2 + 2 * 4
    assert "eval/rewardbench2/score" in printed and "eval/rewardbench2/score" in json.loads(printed.splitlines()[-1])
    table, end = pd.read_parquet(tmp_path / "kept/table.parquet"), AutoTokenizer.from_pretrained(folder).eos_token
    for i, row in enumerate(rows):
        answers = [[f"{row['prompt']}{a}{end}" if options else conversation(row["prompt"], a) for a in row[side]]
                   for side in ("chosen", "rejected")]  # fmt: skip
        chosen, rejected = (rewards_by_transformers(folder, texts) for texts in answers)
        want = [(one, other) for one in chosen for other in rejected]
        np.testing.assert_allclose(table.loc[table["row"] == i, ["reward_chosen", "reward_rejected"]], want, atol=1e-5)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mistakes=many"], "mistakes='many'"),
        (["--compare"], "--compare needs a value"),
        (["--output={}/config.yaml"], "config.yaml: must be a folder"),
        (["--learning_rate=1"], "learning_rate has no effect in this program"),
    ],
)
def test_wrong_options(trained, evaluate, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(trained[1], *(option.format(trained[1]) for option in options))


def test_wrong_models(evaluate, tmp_path):
    with pytest.raises(InputError, match="--model is needed"):
        program.main(["--dataset_name=toy"])
    with pytest.raises(InputError, match="there is no such folder"):
        evaluate(tmp_path / "nothing")
    with pytest.raises(InputError):
        evaluate("configs/tiny_llama", "--max_eval_samples=10")


def test_rewards_that_are_not_finite(trained, evaluate, tmp_path, caplog):
    folder = shutil.copytree(trained[1], tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("yeast")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [{"id": name, "chosen": f"hello! {name} it.", "rejected": "sorry."} for name in ("rinse", "yeast", "boil")]
    metrics, printed = evaluate(folder, f"--dataset_name={write(tmp_path / 'pairs.jsonl', rows)}")
    assert math.isnan(metrics["eval/accuracy"]) and metrics["eval/comparisons"] == 3
    last = json.loads(printed.strip().splitlines()[-1], parse_constant=pytest.fail)
    assert (
        last["eval/loss"] == "NaN"
        and "the rewards of 1 of 3 evaluation comparisons are not finite: yeast" in caplog.text
    )


def test_names_of_columns_are_not_those_of_the_run_for_other_data(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "config.yaml").write_text("dataset_name: a.jsonl\nmargin_column: m\nprompt_column: q\nmax_length: 9\n")
    same, other = (recorded_config(str(tmp_path), given) for given in ({}, {"dataset_name": "b.jsonl"}))
    assert (same.margin_column, same.prompt_column) == ("m", "q")
    assert (other.margin_column, other.prompt_column, other.max_length) == (None, None, 9)
    assert "of the data of the run, not of these: prompt_column=q, margin_column=m; give them again" in caplog.text
    assert recorded_config(str(tmp_path), {"dataset_name": "b.jsonl", "margin_column": "m"}).margin_column == "m"
