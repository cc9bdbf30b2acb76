"""Parity with TRL's `RewardTrainer`: the same model and pairs in the same order give the same losses and weights.

    python tests/bench/parity.py --trl_python TRL_ENV/bin/python --output parity.json

Each case trains a copy of the tiny Llama with both programs: toy pairs, AdamW, linear schedule, clipping, no dropout.
It compares the loss and the gradient norm of every step and the final weights. LoRA starts from one saved adapter. The
last case evaluates the same model on two processes with a last batch that is not full, and compares with the accuracy
over all pairs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

CASES = {  # options of both programs; `adapter`: train a saved adapter; `margins`: the data have a margin
    "plain": {},
    "margin and centering": {"margins": True, "center_rewards_coefficient": 0.01},
    "LoRA": {"adapter": True},
    "bf16": {"bf16": True},
}
LIMITS = {"loss": 1e-4, "grad_norm": 1e-3}  # float32: largest difference of a loss; relative difference of a norm
BATCH, PER_DEVICE = 16, 8  # pairs per step; TRL accumulates two batches


# ---------------------------------------------------------------------------------------------- TRL, in its environment


def run_trl(given: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    lines = []

    class Noting(TrainerCallback):
        def on_log(self, arguments, state, control, logs=None, **_):
            lines.append({key: float(value) for key, value in logs.items() if isinstance(value, int | float)})

    model = AutoModelForSequenceClassification.from_pretrained(given["base"], num_labels=1, dtype=torch.float32)
    if given["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, given["adapter"], is_trainable=True)
    rows = Dataset.from_list(json.loads(Path(given["rows"]).read_text()))
    config = RewardConfig(
        output_dir=given["output_dir"],
        per_device_train_batch_size=PER_DEVICE,
        per_device_eval_batch_size=PER_DEVICE,
        gradient_accumulation_steps=BATCH // PER_DEVICE,
        max_steps=given["steps"],
        learning_rate=given["learning_rate"],
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        bf16=given.get("bf16", False),
        center_rewards_coefficient=given.get("center_rewards_coefficient"),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(given["base"])
    data = {"args": config, "train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    trainer = RewardTrainer(model=model, callbacks=[Noting()], **data)
    if given.get("only_evaluate"):
        metrics = trainer.evaluate()
        lines.append({"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]})
    else:
        trainer.train()
        trainer.save_model(given["output_dir"])
        lines = [line for line in lines if "grad_norm" in line]
    if trainer.accelerator.is_main_process:
        Path(given["output_dir"], "lines.json").write_text(json.dumps(lines))


def trl(python: str, folder: Path, launcher: tuple = (), **given) -> list[dict]:
    folder.mkdir()
    command = [python, *launcher, __file__, "--worker", json.dumps(given | {"output_dir": str(folder)})]
    call(command, folder / "trl.log")
    return json.loads((folder / "lines.json").read_text())


def call(command: list[str], log: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT).returncode
    assert code == 0, log.read_text()[-3000:]


# ---------------------------------------------------------------------------------------------- both


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """In `folder`: base/ (weights and head), adapter/ over it, data with and without margins."""
    from safetensors.torch import load_file, save_file

    from rm.config.options import RewardConfig
    from rm.data.tokenizer import load_tokenizer
    from rm.data.toy import toy_dataset
    from rm.model.load import load_reward_model
    from rm.train.processes import seed_everything

    config = RewardConfig(model_name_or_path=args.model, seed=0)
    tokenizer = load_tokenizer(config)
    seed_everything(0, 0, 0)
    load_reward_model(tokenizer, config).classifier.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = dict(use_peft=True, lora_dropout=0.0, lora_target_modules="all-linear")
    config = RewardConfig(model_name_or_path=str(folder / "base"), seed=0, **lora)
    load_reward_model(tokenizer, config).classifier.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    (weights,) = (folder / "adapter").glob("*.safetensors")
    saved = load_file(weights)
    rng = np.random.default_rng(0)
    for name, value in saved.items():  # matrices B are 0 at the start: other values compare more
        if "lora_B" in name:
            value += value.new_tensor(0.02 * rng.normal(size=value.shape))
    save_file(saved, weights, {"format": "pt"})
    rows = [dict(row) for row in toy_dataset("train", args.steps * BATCH, 0)]
    for name, kept in {"pairs": {}, "margins": {"margin": rng.uniform(0, 1, len(rows)).tolist()}}.items():
        columns = {key: [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")} | kept
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_in_order(config, path: Path) -> None:
    """Write the token ids of the pairs in the order in which our steps take them."""
    from common import pair_ids

    from rm.data.mixture import load_data
    from rm.data.plan import Layout, StepPlan
    from rm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config)
    data, _ = load_data(tokenizer, config)
    plan = StepPlan(data, Layout("shared_prefix", tokenizer.pad_token_id, by_tree=True), config, BATCH, 0, 1)
    rows, margins = pair_ids(data), data.comparisons["margin"].tolist()
    rows = [row | ({"margin": margin} if any(margins) else {}) for row, margin in zip(rows, margins, strict=True)]
    order = [int(i) for step in range(len(rows) // BATCH) for i in plan.prompts(step)]
    assert len(data.comparisons) == len(data) and len(set(order)) == len(order)
    path.write_text(json.dumps([rows[i] for i in order]))


def compare(name: str, options: dict, folder: Path, args: argparse.Namespace) -> tuple[dict, np.ndarray]:
    """Train with both programs; the largest differences, and the losses [2, steps], ours first."""
    from rm.config.options import RewardConfig

    options = dict(options)
    data = folder / ("margins.jsonl" if options.pop("margins", False) else "pairs.jsonl")
    adapter = str(folder / "adapter") if options.pop("adapter", False) else None
    ours = dict(model_name_or_path=adapter or str(folder / "base"), dataset_name=str(data), eval_dataset_name="toy")
    ours |= dict(max_eval_samples=50, train_batch_size=BATCH, max_steps=args.steps, learning_rate=args.learning_rate)
    ours |= dict(logging_steps=1, num_print_samples=0, seed=0, use_peft=bool(adapter))
    ours |= {"center_rewards_coefficient": options.get("center_rewards_coefficient")}
    ours |= {"mixed_precision": "bf16" if options.get("bf16") else "no"}
    rows_in_order(RewardConfig(**ours), folder / "rows.json")
    ours = {key: value for key, value in ours.items() if value is not None} | {"output_dir": folder / f"ours {name}"}
    call([sys.executable, "train_rm.py", *(f"{key}={value}" for key, value in ours.items())], folder / "ours.log")
    given = dict(base=str(folder / "base"), adapter=adapter, rows=str(folder / "rows.json"))
    given |= dict(steps=args.steps, learning_rate=args.learning_rate)
    theirs = trl(args.trl_python, folder / f"trl {name}", **given, **options)
    lines = [json.loads(line) for line in (ours["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    loss, norm = (np.array([line[key] for line in lines]) for key in ("train/loss", "optim/grad_norm"))
    loss_trl, norm_trl = (np.array([line[key] for line in theirs]) for key in ("loss", "grad_norm"))
    assert len(loss) == len(loss_trl) == args.steps
    found = {
        "first_loss": [float(loss[0]), float(loss_trl[0])],
        "last_loss": [float(loss[-1]), float(loss_trl[-1])],
        "steps_clipped": int((norm > 1).sum()),
        "loss_difference": float(np.abs(loss - loss_trl).max()),
        "grad_norm_relative_difference": float((np.abs(norm - norm_trl) / norm_trl).max()),
    } | weight_differences(folder, bool(adapter), ours["output_dir"], folder / f"trl {name}")
    if not options.get("bf16"):
        found["within_limits"] = (
            found["loss_difference"] < LIMITS["loss"] and found["grad_norm_relative_difference"] < LIMITS["grad_norm"]
        )
    return found, np.stack([loss, loss_trl])


def weight_differences(folder: Path, is_adapter: bool, ours: Path, theirs: Path) -> dict[str, float]:
    """The largest difference of a final weight, next to the largest change of a weight in training."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    start, one, other = (load_file(p / name) for p in (folder / ("adapter" if is_adapter else "base"), ours, theirs))
    assert set(one) == set(other) == set(start), set(one) ^ set(other)
    return {
        "weight_difference": max(float((one[key] - other[key]).abs().max()) for key in one),
        "weight_change": max(float((one[key] - start[key]).abs().max()) for key in one),
    }


def uneven_evaluation(folder: Path, args: argparse.Namespace) -> dict:
    """Accuracy of the trained model on pairs that do not fill the last batch: one and two processes, both programs."""
    from rm.config.options import RewardConfig

    model = folder / "ours plain"
    lines, found = (folder / "pairs.jsonl").read_text().splitlines(), {"pairs": args.uneven}
    (folder / "uneven.jsonl").write_text("\n".join(lines[: args.uneven]))
    config = RewardConfig(model_name_or_path=str(model), dataset_name=str(folder / "uneven.jsonl"))
    from common import pair_ids, tokenize

    from rm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config)
    (folder / "uneven.json").write_text(json.dumps(pair_ids(tokenize(config.dataset_name, tokenizer, config))))
    two = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511")
    for count, launcher in ((1, ()), (2, two)):
        output = folder / f"evaluated by {count}"
        arguments = ["rm.evaluate", f"--model={model}", f"--dataset_name={config.dataset_name}", f"--output={output}"]
        call([sys.executable, *launcher, "-m", *arguments], folder / "evaluate.log")
        metrics = json.loads((output / "metrics.json").read_text())["metrics"]
        found[f"ours, {count} processes"] = {key: metrics[f"eval/{key}"] for key in ("accuracy", "loss")}
        given = dict(base=str(model), adapter=None, rows=str(folder / "uneven.json"), steps=1, learning_rate=1e-3)
        said = trl(args.trl_python, folder / f"trl evaluates {count}", launcher, only_evaluate=True, **given)
        found[f"TRL, {count} processes"] = said[-1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", default=sys.executable, help="python of an environment with trl==1.16.0")
    parser.add_argument("--model", default="configs/tiny_llama")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--uneven", type=int, default=37, help="pairs of the last case")
    parser.add_argument("--output", help="JSON file for all numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return run_trl(json.loads(args.worker))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args)
        found, losses = {}, {}
        for name, options in CASES.items():
            found[name], losses[name] = compare(name, options, folder, args)
            if options.get("bf16"):  # the error of the type itself
                own = np.abs(losses[name] - losses["plain"]).max(1)
                found[name]["loss_difference_from_float32"] = {"ours": float(own[0]), "TRL": float(own[1])}
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        found["evaluation"] = uneven_evaluation(folder, args)
        print(f"evaluation: {json.dumps(found['evaluation'])}", flush=True)
    versions = subprocess.run(
        [args.trl_python, "-c", "for m in 'trl', 'transformers', 'torch': print(__import__(m).__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    settings = {"steps": args.steps, "pairs_per_step": BATCH, "learning_rate": args.learning_rate, "model": args.model}
    record = {"settings": settings, "versions": dict(zip(("trl", "transformers", "torch"), versions, strict=True))}
    if args.output:
        Path(args.output).write_text(json.dumps(record | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
