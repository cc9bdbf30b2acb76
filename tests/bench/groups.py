"""Groups in one step against the same comparisons as shuffled pairs: accuracy, loss, seconds and tokens.

    python tests/bench/groups.py --seeds 5 --epochs 1,4 --prompts 1000 --output groups.json

Both sides train the tiny model of the quickstart on the same comparisons of `toy_groups` (each prompt has the same
number of them, so that the mean over pairs is the mean over prompts), with as many comparisons per step, the same seeds
and the same held-out prompts. They differ only in which comparisons are in a step, and in what is computed twice.
Differences are paired by seed, with t intervals.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_rm  # noqa: E402
from rm.data.toy import toy_dataset  # noqa: E402

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SHOWN = ("eval/accuracy", "eval/loss", "train/loss", "speed/train_seconds", "tokens")


def as_pairs(labels: str, num_prompts: int, seed: int, path: Path) -> int:
    """Write every comparison of the training prompts as a pair; returns the comparisons of a prompt."""
    rows = toy_dataset("train", num_prompts, seed, labels)
    counts = {len(row["comparisons"]) for row in rows}
    assert len(counts) == 1, "every prompt must have the same number of comparisons"
    with open(path, "w") as file:
        for row in rows:
            for compared in row["comparisons"]:
                sides = {side: row["responses"][compared[side]] for side in ("chosen", "rejected")}
                file.write(json.dumps({"prompt": row["prompt"], **sides}) + "\n")
    return counts.pop()


def run(folder: Path, **options) -> dict[str, float]:
    """One training; its summary, and the tokens of all its steps."""
    tokens, collate = [], train_rm.collate

    def counting_collate(*arguments):
        batch = collate(*arguments)
        tokens.append(batch.input_ids_RL.numel())
        return batch

    train_rm.collate = counting_collate
    try:
        with contextlib.redirect_stdout(sys.stderr):
            summary = train_rm.main([f"{key}={value}" for key, value in (options | {"output_dir": folder}).items()])
    finally:
        train_rm.collate = collate
    return summary | {"tokens": sum(tokens)}


def interval(values: list[float]) -> str:
    """Mean and 95% interval (Student's t) over seeds."""
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", default="1,4")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--eval_prompts", type=int, default=1000)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--labels", default="plackett_luce", help="or bradley_terry")
    parser.add_argument("--output", help="JSON file for all numbers")
    args = parser.parse_args()

    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            pairs = Path(temporary, f"pairs-{seed}.jsonl")
            per_prompt = as_pairs(args.labels, args.prompts, seed, pairs)
            sides = {
                "groups": {
                    "dataset_name": "toy_groups",
                    "dataset_config": args.labels,
                    "max_train_samples": args.prompts,
                    "train_batch_size": args.prompts_per_step,
                },
                "pairs": {"dataset_name": pairs, "train_batch_size": args.prompts_per_step * per_prompt},
            }
            for epochs in args.epochs.split(","):
                for side, options in sides.items():
                    common = dict(model_name_or_path="configs/tiny_llama", learning_rate=1e-3, num_print_samples=0)
                    common |= dict(eval_dataset_name="toy_groups", eval_dataset_config=args.labels, report_to="none")
                    common |= dict(max_eval_samples=args.eval_prompts, num_train_epochs=epochs, seed=seed)
                    summary = run(Path(temporary, f"{side}-{epochs}-{seed}"), **common, **options)
                    found.setdefault(f"{side}, {epochs} epochs", []).append({name: summary[name] for name in SHOWN})
                    print(f"seed {seed}: {side}, {epochs} epochs: {found[f'{side}, {epochs} epochs'][-1]}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), "runs": found}, indent=1))
    for epochs in args.epochs.split(","):
        groups, pairs = (found[f"{side}, {epochs} epochs"] for side in ("groups", "pairs"))
        for name in SHOWN:
            ours, theirs = ([run[name] for run in side] for side in (groups, pairs))
            difference = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            print(f"{epochs:>4} epochs {name:20} groups {interval(ours)}, pairs {interval(theirs)}, {difference}")


if __name__ == "__main__":
    main()
