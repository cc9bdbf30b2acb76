"""Whole runs of the program on a tiny model: files, exit codes, and numbers that do not depend on how work was cut."""

import json
import sys

import numpy as np
import pytest
import torch
import wandb_files
from runs import SMALL, assert_same_run, lines, merged, reset_accelerate, weights

import train_rm
from rm.config.errors import InputError
from rm.log.token_html import token_rewards_page


def test_a_run_leaves_everything_it_promises(train):
    summary, folder = train("run", "--eval_steps=2", "--save_steps=2")
    assert summary["train/steps"] == 4 and summary["eval/comparisons"] == 30
    assert 0 <= summary["eval/accuracy"] <= summary["eval/accuracy_high"] <= 1
    assert {"eval/accuracy_ceiling", "eval/spearman_true_margin", "train/loss", "speed/pairs_per_second"} <= set(
        summary
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["summary"] == summary
    assert results["config"]["train_batch_size"] == 16 and results["packages"]["torch"] == torch.__version__
    assert len(results["data"]["train"]["fingerprint"]) == 64 and "shared_prefix" in results["layout"]
    assert results["data"] == json.loads((folder / "data_report.json").read_text())
    assert len(lines(folder)) == 4 and len(lines(folder, "eval/accuracy")) == 2
    assert lines(folder, "train/epoch") == [0.2, 0.4, 0.6, 0.8]
    samples = [
        [json.loads(line) for line in (folder / f"samples/step-{s}.jsonl").read_text().splitlines()] for s in (2, 4)
    ]
    assert [row["id"] for row in samples[0]] == [row["id"] for row in samples[1]] and len(samples[0]) == 4
    assert samples[0][0]["reward_chosen"] != samples[1][0]["reward_chosen"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    again = train_rm.parse_config(["--config", str(folder / "config.yaml")])
    assert again.max_steps == 4 and again.output_dir == str(folder)


def test_numbers_do_not_depend_on_layout_or_micro_batches(train):
    _, base = train("base", "--layout=shared_prefix", "--micro_batch_tokens=100000")
    for name, options in {
        "small": ["--layout=shared_prefix", "--micro_batch_tokens=200"],
        "one": ["--layout=concatenated", "--micro_batch_tokens=1"],
        "padded": ["--layout=concatenated", "--micro_batch_tokens=4000"],
        "trl": ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=4", "--train_batch_size=none"],
    }.items():
        assert_same_run(base, train(name, *options)[1])


def test_the_seed_decides(train):
    _, one = train("one")
    _, two = train("two")
    _, other = train("other", "--seed=7")
    assert lines(one) == lines(two) != lines(other)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))


def test_samples_do_not_change_training(train):
    """Evaluating, logging and showing more must leave the weights alone."""
    _, quiet = train("quiet", "--num_print_samples=0", "--logging_steps=100")
    _, busy = train("busy", "--num_print_samples=-1", "--eval_steps=1", "--save_steps=1", "--save_total_limit=2")
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(busy).values(), strict=True))
    assert sorted(p.name for p in (busy / "checkpoints").iterdir()) == ["step-3", "step-4"]
    assert len((busy / "samples/step-4.jsonl").read_text().splitlines()) == 30
    assert not (quiet / "samples").exists()


@pytest.mark.parametrize("merge", ["false", "true"])
def test_lora_on_a_pretrained_model_with_pad_equal_to_eos(train, tiny_model_folder, tmp_path, merge):
    folder = tiny_model_folder("llama", "<eos>")
    words = [f"w{i}" for i in range(3, 60)]
    rng = np.random.default_rng(0)
    rows = [{"chosen": " ".join(rng.choice(words, 12)), "rejected": " ".join(rng.choice(words, 9))} for _ in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [f"--model_name_or_path={folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}", "--eval_fraction=0.25"]
    options += [
        "--use_peft",
        "--lora_target_modules=all-linear",
        f"--merge_adapter={merge}",
        "--max_train_samples=none",
    ]
    summary, out = train("lora", *options, "--max_eval_samples=none")
    assert summary["eval/comparisons"] == 10
    assert (out / "adapter_config.json").exists() == (merge == "false")
    assert (out / "model.safetensors").exists() == (merge == "true")


def test_bf16_autocast_and_gradient_checkpointing(train, caplog):
    _, plain = train("plain")
    _, half = train("half", "--mixed_precision=bf16", "--gradient_checkpointing")
    np.testing.assert_allclose(lines(half), lines(plain), atol=0.05)
    assert lines(half) != lines(plain)
    layout = json.loads((half / "results.json").read_text())["layout"]
    assert layout == "shared_prefix (verified on 4 prompts)"
    exports = [r.getMessage() for r in caplog.records if "export checked" in r.getMessage()]
    assert float(exports[-1].split()[-1]) < 1e-5  # without autocast, whose rounding is larger
    _, weights = train("weights", "--dtype=bfloat16")
    for folder, factor, least in ((half, 1e-3, 0.1), (weights, 0.1, 0.5)):  # relative to the spread of the rewards
        check = json.loads((folder / "export_check.json").read_text())
        assert check["tolerance"] == pytest.approx(factor * max(np.std(check["rewards"]), least))


@pytest.mark.slow
def test_compiled_layers_train_as_the_others(train):
    _, plain = train("plain", "--max_steps=2")
    torch._dynamo.reset()
    _, compiled = train("compiled", "--max_steps=2", "--torch_compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same_run(plain, compiled, loss=1e-5, weight=1e-4)


def test_learning_rate_by_hand(train):
    _, out = train("linear", "--warmup_steps=2", "--learning_rate=1e-3")
    assert lines(out, "optim/learning_rate") == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    floor = '--lr_scheduler_kwargs={"min_lr_rate": 0.5}'
    _, out = train("floor", "--lr_scheduler_type=cosine_with_min_lr", floor, "--learning_rate=1e-3", "--max_steps=2")
    assert lines(out, "optim/learning_rate") == pytest.approx([1e-3, 7.5e-4])
    with pytest.raises(InputError, match="lr_scheduler_kwargs"):
        train("wrong", "--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"nope": 1}')


def test_centering_and_margin_act(train):
    _, plain = train("plain")
    _, centred = train("centred", "--center_rewards_coefficient=1")
    _, margin = train("margin", "--margin_from_scores=true")
    assert lines(centred)[0] > lines(plain)[0] != lines(margin)[0]


def test_exit_codes_and_messages(tmp_path, monkeypatch, capsys):
    def code(*options: str) -> tuple[int, str]:
        reset_accelerate()
        monkeypatch.setattr(sys, "argv", ["train_rm.py", *merged([*SMALL, *options])])
        return train_rm.run(), capsys.readouterr().err.strip().splitlines()[-1]

    monkeypatch.chdir(tmp_path)
    assert code("--learning_rat=1") == (
        2,
        "error: command line: unknown key 'learning_rat'; did you mean learning_rate?",
    )
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rejected": null}\n')
    number, message = code("--dataset_name=bad.jsonl", "--eval_fraction=0.5", "--max_train_samples=none")
    assert number == 2 and "bad.jsonl" in message and "row 2" in message and "rejected" in message
    assert code("--report_to=nowhere")[0] == 2
    number, message = code("--model_name_or_path=no/such")
    assert number == 2 and "no/such" in message
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    number, message = code("--output_dir=old")
    assert number == 2 and "'metrics.jsonl' is in the way" in message
    number, message = code("--learning_rate=1e30", "--max_grad_norm=0", "--output_dir=nan")
    assert number == 3 and "not finite; its prompts: " in message
    assert not (tmp_path / "nan" / "model.safetensors").exists()
    number, message = code("--attn_implementation=flex_attention", "--output_dir=flex")
    assert number == 2 and "flex_attention is not supported" in message


def test_the_program_prints_one_json_line_last(zygote, tmp_path):
    options = ["dataset_name=toy", *SMALL, f"--output_dir={tmp_path / 'out'}", "--report_to=wandb"]
    done = zygote.run(1, options, tmp_path)
    assert json.loads(done.stdout.strip().splitlines()[-1])["output_dir"] == str(tmp_path / "out")
    assert "Traceback" not in done.stderr
    ((at, columns, rows),) = wandb_files.tables(wandb_files.run_dir(tmp_path / "out"), "eval/samples")
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "step-4.jsonl").read_text().splitlines()]
    shown = [
        {name: value for name, value in sample.items() if not name.startswith("token_rewards")} for sample in samples
    ]
    assert at["train/step"] == 4 and [dict(zip(columns, row, strict=True)) for row in rows] == shown
    ((at, page),) = wandb_files.pages(wandb_files.run_dir(tmp_path / "out"), "eval/token_rewards")
    assert at["train/step"] == 4 and page == token_rewards_page(samples)
