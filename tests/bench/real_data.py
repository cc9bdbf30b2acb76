"""Real preference data and a small pretrained model: full training and LoRA, several seeds, baselines, length bias.

    python tests/bench/real_data.py --model SMOLLM2 --pairs train.jsonl.gz --eval_pairs test.jsonl.gz \\
        --groups groups.jsonl.gz --work runs/real --output real_data.json
    python tests/bench/real_data.py ... --only_read              # the tables again, from the runs that are finished

Settings: `pairs` (all weights, LoRA) on two files of pairs; `groups` on prompts with scored answers, of which a part is
held out: all comparisons in one step, the same with the length penalty of tests/hacks/, and one random pair per prompt
for as many tokens. The first setting of each data set also evaluates before the first step: an untrained head. Runs
that exist are not repeated, so the command can be stopped and started again. With `--jobs 2` two runs share the cores,
which is faster than one after the other on two cores. `--max_steps` is for a test of the script.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from common import make_config, pair_lengths, tokenize  # noqa: E402
from groups import interval  # noqa: E402

from rm.data.dataset import PreferenceData  # noqa: E402
from rm.data.tokenizer import load_tokenizer  # noqa: E402
from rm.evaluate.statistics import is_right  # noqa: E402

SHOWN = ("accuracy", "loss", "longer_answer_baseline_accuracy", "ece", "temperature", "margin_length_spearman")
ALL, LORA = {"learning_rate": 3e-5}, {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 3e-4}


def read_rows(path: str) -> list[dict]:
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def split_groups(args: argparse.Namespace) -> dict[str, str]:
    """Files: training and held-out groups (other prompts), and one random pair with different scores per prompt."""
    rows, rng = read_rows(args.groups), random.Random(0)
    rng.shuffle(rows)
    for row in rows if args.answers else ():
        row.update({key: row[key][: args.answers] for key in ("responses", "scores")})
    rows = [row for row in rows if len(set(row["scores"])) > 1]
    num_test = args.test_prompts or len(rows) // 5
    test, train, pairs = rows[:num_test], rows[num_test:], []
    train = train[: args.prompts] if args.prompts else train
    for row in train:
        a, b = rng.sample(range(len(row["responses"])), 2)
        if row["scores"][a] != row["scores"][b]:
            chosen, rejected = (a, b) if row["scores"][a] > row["scores"][b] else (b, a)
            texts = {"chosen": row["responses"][chosen], "rejected": row["responses"][rejected]}
            pairs.append({"prompt": row["prompt"], **texts})
    named = {"groups-train": train, "groups-test": test, "one-pair": pairs}
    return {name: write_rows(Path(args.work, f"{name}.jsonl"), found) for name, found in named.items()}


def tokenized(path: str, args: argparse.Namespace) -> PreferenceData:
    config = make_config(argparse.Namespace(model=args.model, data=path, max_length=args.max_length))
    return tokenize(path, load_tokenizer(config), config)


def num_tokens(data: PreferenceData) -> int:
    """Tokens of one epoch in trees."""
    return sum(len(tree.prefix) + sum(map(len, tree.answers)) for tree in data.trees(range(len(data))))


def length_coefficient(data: PreferenceData) -> float:
    """The b with which σ(b · length difference) predicts the labels best (maximum likelihood, equal prompts)."""
    longer, share = np.subtract(*pair_lengths(data)), data.comparisons["share"].to_numpy()
    found = np.linspace(-0.05, 0.05, 1001)
    return round(float(min(found, key=lambda b: (share * np.logaddexp(0, -b * longer)).sum())), 4)


def edited_copy(coefficient: float, folder: Path) -> Path:
    """The program with the length penalty of tests/hacks/, and this coefficient in place of that of the toy data."""
    if not folder.exists():
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / "rm", folder / "rm")
        shutil.copy(ROOT / "train_rm.py", folder)
        patch = (ROOT / "tests" / "hacks" / "length_penalty.diff").read_text().replace("0.02", str(coefficient))
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # git skips files of a repository around it
        subprocess.run(["git", "apply", "-"], cwd=folder, input=patch, text=True, check=True, env=env)
    return folder


def train(name: str, options: dict, args: argparse.Namespace, root: Path = ROOT) -> None:
    folder = Path(args.work, name).resolve()
    if (folder / "finished.json").exists():
        return
    given = dict(model_name_or_path=args.model, max_length=args.max_length, overlength="truncate_left")
    given |= dict(warmup_ratio=0.1, micro_batch_tokens=2048, mixed_precision="bf16", num_normalization_samples=0)
    given |= {"output_dir": folder, "resume_from_checkpoint": "latest", "save_steps": 0.5, "save_total_limit": 1}
    given |= {"max_steps": args.max_steps} if args.max_steps else {}
    command = [sys.executable, root / "train_rm.py", *(f"{key}={value}" for key, value in (given | options).items())]
    print(f"{name}: {' '.join(map(str, command[1:]))}", flush=True)
    with open(f"{folder}.log", "a") as log:
        env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        subprocess.run(command, cwd=root, env=env, stdout=log, stderr=log, check=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # three times the size of the model


def read(folder: Path) -> dict[str, float]:
    """Metrics of a run with the parts by length: pairs whose chosen answer is the shorter one, and the others."""
    results = json.loads((folder / "results.json").read_text())
    summary, lines = results["summary"], (folder / "metrics.jsonl").read_text().splitlines()
    found = {name: float(summary[f"eval/{name}"]) for name in SHOWN}
    of_groups = ("best_of_n_accuracy", "kendall_tau")
    found |= {name: float(summary[f"eval/{name}"]) for name in of_groups if f"eval/{name}" in summary}
    found |= {"interval": results["intervals"]["eval/accuracy"], "steps": summary["train/steps"]}
    found["train_seconds"] = summary["speed/train_seconds"]
    start = json.loads(lines[0])
    if start["step"] == 0:
        found |= {f"untrained_{name}": float(start[f"eval/{name}"]) for name in ("accuracy", "loss")}
    table = pd.read_parquet(folder / "eval" / f"step-{summary['train/steps']}.parquet")
    right = pd.Series(is_right((table["reward_chosen"] - table["reward_rejected"]).to_numpy()))
    longer = np.sign(table["length_chosen"] - table["length_rejected"])
    for part, sign in (("shorter_preferred", -1), ("longer_preferred", 1)):
        weight = table["share"].where(longer == sign, 0)
        found[f"accuracy_{part}"] = float((right * weight).sum() / weight.sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs")
    parser.add_argument("--eval_pairs")
    parser.add_argument("--groups")
    parser.add_argument("--work", required=True, help="folder for data and runs")
    parser.add_argument("--output", help="JSON file for all numbers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--num_pairs", type=int, help="train on the first pairs only")
    parser.add_argument("--prompts", type=int, help="train on as many prompts with scored answers")
    parser.add_argument("--test_prompts", type=int, help="hold out as many of them; none: a fifth")
    parser.add_argument("--answers", type=int, help="use the first answers of a prompt only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, which share the cores")
    parser.add_argument("--only_read", action="store_true")
    args = parser.parse_args()
    args.work = str(Path(args.work).resolve())
    args.model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model  # runs have other folders
    Path(args.work).mkdir(parents=True, exist_ok=True)

    settings: dict[str, tuple[dict, Path]] = {}
    if args.pairs:
        data = {"dataset_name": Path(args.pairs).resolve(), "eval_dataset_name": Path(args.eval_pairs).resolve()}
        data |= {"train_batch_size": 16} | ({"max_train_samples": args.num_pairs} if args.num_pairs else {})
        settings["pairs, all weights"] = (data | ALL | {"eval_on_start": True}, ROOT)
        settings["pairs, LoRA"] = (data | LORA, ROOT)
    if args.groups:
        files = split_groups(args)
        groups, one_pair = (tokenized(files[name], args) for name in ("groups-train", "one-pair"))
        ratio = num_tokens(groups) / num_tokens(one_pair)
        data = {"dataset_name": files["groups-train"], "eval_dataset_name": files["groups-test"], "train_batch_size": 8}
        print(f"length penalty: {(coefficient := length_coefficient(groups))} per token; one pair: {ratio:.2f} epochs")
        penalty = edited_copy(coefficient, Path(args.work, "length-penalty"))
        settings["groups, all weights"] = (data | ALL | {"eval_on_start": True}, ROOT)
        settings["groups, length penalty"] = (data | ALL, penalty)
        pair = data | ALL | {"dataset_name": files["one-pair"], "num_train_epochs": round(ratio, 3)}
        settings["one pair per prompt, equal tokens"] = (pair, ROOT)
        settings["groups, LoRA"] = (data | LORA, ROOT)
    folders = {
        (name, seed): f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
        for seed in range(args.seeds)
        for name in settings
    }

    def run(key: tuple[str, int]) -> None:
        options, root = settings[key[0]]
        train(folders[key], options | {"seed": key[1]}, args, root)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, () if args.only_read else folders))
    found: dict[str, list[dict]] = {}
    for (name, _), folder in folders.items():
        if Path(args.work, folder, "finished.json").exists():
            found.setdefault(name, []).append(read(Path(args.work, folder)))
    if args.output:
        record = {"arguments": vars(args) | {"model": Path(args.model).name, "work": None}, "runs": found}
        Path(args.output).write_text(json.dumps(record, indent=1, default=str) + "\n")
    for name, runs in found.items():
        print(f"\n{name}, {len(runs)} seeds")
        for key in runs[0]:
            values = [run[key] for run in runs]
            if key == "interval":
                print(f"  {'95% interval (prompts), first seed':36} {values[0][0]:.3f} to {values[0][1]:.3f}")
            else:
                print(f"  {key:36} {interval(values) if len(values) > 1 else f'{statistics.mean(values):.4f}'}")
        base = found.get("pairs, all weights" if name.startswith("pairs") else "groups, all weights", [])
        pairs = list(zip(runs, base, strict=False))  # of the same seed
        for key in ("accuracy", "loss", "margin_length_spearman") if runs is not base and len(pairs) > 1 else ():
            print(f"  {key + ' minus all weights':36} {interval([run[key] - other[key] for run, other in pairs])}")


if __name__ == "__main__":
    main()
