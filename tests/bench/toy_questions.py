"""Questions with known answers on the toy data: one grid of small runs, a figure and a table for each question.

    python tests/bench/toy_questions.py --output docs/results/toy            # continues what is there
    python tests/bench/toy_questions.py --output docs/results/toy --questions centering,margins --seeds 5
    python tests/bench/toy_questions.py --output docs/results/toy --only_draw

Every run trains the tiny model of the quickstart on one epoch of pairs and evaluates 2,000 held-out pairs without label
noise of its own. The seed changes data, weights and order. Settings of a question share their seeds, so differences
from the first setting are paired. Intervals are 95% intervals over seeds (Student's t).
"""

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from groups import T_975  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import rm.evaluate.evaluator  # noqa: E402
import rm.train.finish  # noqa: E402
import train_rm  # noqa: E402
from rm.config.options import RewardConfig  # noqa: E402
from rm.data.tokenizer import load_tokenizer  # noqa: E402
from rm.data.toy import toy_dataset  # noqa: E402
from rm.evaluate.statistics import is_right  # noqa: E402
from rm.model.load import load_reward_model  # noqa: E402
from rm.train.processes import seed_everything  # noqa: E402

TINY, PAIRS, NUM_EVAL = "configs/tiny_llama", 4000, 2000
COMMON = dict(train_batch_size=64, learning_rate=4e-3, warmup_ratio=0.1)
COMMON |= dict(micro_batch_tokens=4096, num_print_samples=0, num_normalization_samples=0)
UNUSED = ["id", "subset", "score_chosen", "score_rejected"]
SEPARATION = (0, 1, 2, 4, math.inf)  # bins of the absolute true margin (log-odds)
KEPT = (
    "accuracy accuracy_ceiling loss reward_mean reward_std ece temperature spearman_true_margin margin_length_spearman"
).split()


# ---------------------------------------------------------------- columns that a setting adds to the training data


def strength(row: dict) -> int:
    """The strength of a preference in four classes, 0 to 3, as in Llama 2: by the true margin in favor of the label."""
    return sum(row["true_margin"] >= limit for limit in (1, 2, 4))


def margins(unit: float) -> Callable:
    return lambda row, rng: {"margin": unit * strength(row)}


def flipped(fraction: float) -> Callable:
    def flip(row: dict, rng: random.Random) -> dict:
        swapped = {"chosen": row["rejected"], "rejected": row["chosen"], "true_margin": -row["true_margin"]}
        return swapped if rng.random() < fraction else {}

    return flip


def soft_label(row: dict, rng: random.Random) -> dict:
    return {"p": 1 / (1 + math.exp(-row["true_margin"]))}


def plain(row: dict, rng: random.Random) -> dict:
    return {}


# ---------------------------------------------------------------- settings: (columns, pairs, start, options)


def setting(columns: Callable = plain, pairs: int = PAIRS, start: str = TINY, **options) -> tuple:
    return columns, pairs, start, options


BASE = setting()
LORA = dict(use_peft=True, lora_alpha=32, lora_dropout=0, lora_target_modules="all-linear")
QUESTIONS: dict[str, dict[str, tuple]] = {
    "centering": {"0": BASE} | {f"{k:g}": setting(center_rewards_coefficient=k) for k in (0.001, 0.01, 0.1)},
    "margins": {
        "none": BASE,
        "small (0 to 1)": setting(margins(1 / 3)),
        "large (0 to 3)": setting(margins(1)),
        "scaled BT": setting(lambda row, rng: {"strength": 1 + strength(row)}, weight_column="strength"),
    },
    "labels": {"hard": BASE, "soft": setting(soft_label, probability_column="p")},
    "smoothing": {
        f"{flips:.0%} flipped, s={s:g}": setting(flipped(flips) if flips else plain, **smoothing)
        for flips in (0, 0.1, 0.2)
        for s, smoothing in ((0, {}), (0.1, {"label_smoothing_factor": 0.1}))
    },
    "head": {"std 1/√(d+1)": BASE}
    | {f"std {std:g}": setting(start=f"head {std}", eval_on_start=True) for std in (0, 0.02, 1)},
    "lora": {
        "full, lr 4e-3": setting(start="language model"),
        "LoRA r=1, lr 4e-3": setting(start="language model", lora_r=1, **LORA),
        "LoRA r=4, lr 4e-3": setting(start="language model", lora_r=4, **LORA),
        "LoRA r=16, lr 4e-3": setting(start="language model", lora_r=16, **LORA),
        "LoRA r=16, lr 2e-2": setting(start="language model", lora_r=16, learning_rate=2e-2, **LORA),
    },
    "size": {f"{n:,}": setting(pairs=n) for n in (1000, 2000, 4000, 8000, 16000)},
}  # fmt: skip


# ---------------------------------------------------------------- runs


def data_files(columns: Callable, pairs: int, seed: int, folder: Path) -> dict[str, Path]:
    """Training pairs with the columns of a setting, and held-out pairs with hard labels of weight 1."""
    rng = random.Random(f"columns/{seed}")
    rows = {
        "train": (row | columns(row, rng) for row in toy_dataset("train", pairs, seed).remove_columns(UNUSED)),
        "test": (row | {"strength": 1, "p": 1.0} for row in toy_dataset("test", NUM_EVAL, seed).remove_columns(UNUSED)),
    }
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"dataset_name": folder / "train.jsonl", "eval_dataset_name": folder / "test.jsonl"}


def start_of(start: str, seed: int, folder: Path) -> str:
    """The model that training starts with: the tiny Llama, also with another head, or trained as a language model."""
    if start == TINY:
        return TINY
    where = folder / f"{start.replace(' ', '-')}-{seed}"
    if start.startswith("head") and not where.exists():
        config = RewardConfig(model_name_or_path=TINY, seed=seed)
        seed_everything(seed, 0, 0)
        tokenizer = load_tokenizer(config)
        load_reward_model(tokenizer, config).classifier.save_pretrained(where)
        tokenizer.save_pretrained(where)
        weights = load_file(where / "model.safetensors")
        unit = weights["score.weight"] * (weights["score.weight"].numel() + 1) ** 0.5
        weights["score.weight"] = unit * float(start.split()[1])
        save_file(weights, where / "model.safetensors", {"format": "pt"})
    elif not where.exists():
        language_model(seed, where)
    return str(where)


def language_model(seed: int, where: Path, steps: int = 250, batch: int = 64) -> None:
    """Train the tiny Llama on next tokens of toy dialogues (other prompts and answers than those of the pairs)."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    rows = toy_dataset("train", steps * batch, seed + 1000)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for step in range(steps):
        inputs = tokenizer(texts[step * batch : (step + 1) * batch], padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"language model, seed {seed}: loss {loss.item():.3f} after {steps} steps", flush=True)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)


def run(name: str, made: tuple, seed: int, starts: Path) -> dict[str, float]:
    """One training; the metrics that are kept, accuracy by separation, and those before the first step (if known)."""
    columns, pairs, start, options = made
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = COMMON | {"model_name_or_path": start_of(start, seed, starts), "seed": seed}
        given["output_dir"] = folder / "run"
        given |= data_files(columns, pairs, seed, folder) | options
        with contextlib.redirect_stdout(sys.stderr):
            summary = train_rm.main([f"{key}={value}" for key, value in given.items()])
        found = {key: summary[f"eval/{key}"] for key in KEPT} | {"train_seconds": summary["speed/train_seconds"]}
        table = pd.read_parquet(folder / "run" / "eval" / f"step-{summary['train/steps']}.parquet")
        first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        if first["step"] == 0:
            found |= {f"start_{key}": first[f"eval/{key}"] for key in ("loss", "accuracy", "reward_std")}
    right = pd.Series(is_right((table["reward_chosen"] - table["reward_rejected"]).to_numpy()))
    bins = pd.cut(table["true_margin"].abs(), SEPARATION, right=False, labels=SEPARATION[:-1])
    found["by_separation"] = [round(float(value), 4) for value in right.groupby(bins, observed=False).mean()]
    found["below_ceiling"] = found["accuracy_ceiling"] - found["accuracy"]
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}


# ---------------------------------------------------------------- figures and tables

# question: metrics of its figure, with their labels (no loss where settings change the loss itself)
FIGURES = {
    "centering": {"reward_mean": "mean reward", "accuracy": "accuracy", "ece": "calibration error"},
    "margins": {"accuracy": "accuracy", "reward_std": "standard deviation of rewards", "ece": "calibration error"},
    "labels": {"accuracy": "accuracy", "loss": "loss (nats)", "spearman_true_margin": "rank correlation, true margin"},
    "smoothing": {"accuracy": "accuracy", "ece": "calibration error", "temperature": "temperature (1: calibrated)"},
    "head": {"accuracy": "accuracy", "loss": "loss (nats)"},
    "lora": {"accuracy": "accuracy", "loss": "loss (nats)"},
    "size": {"accuracy": "accuracy", "loss": "loss (nats)"},
}


# question: the known answer
EXPECTED = {
    "centering": "Centering 0, 0.001, 0.01, 0.1: the mean reward goes to 0, the accuracy does not change "
    "(Eisenstein et al. 2023). A large coefficient also shrinks the rewards, so the probabilities are too low.",
    "margins": "Margins by strength of preference, and the scaled Bradley-Terry loss: small differences in accuracy; "
    "margins spread the rewards (Llama 2, tables 27 and 28; HelpSteer2-Preference).",
    "labels": "Soft labels (the true probabilities) against hard ones: soft labels have no noise and should be better.",
    "smoothing": "Label smoothing s with 0, 10 and 20% flipped labels: it shrinks rewards and repairs no accuracy.",
    "head": "Standard deviation of the new head: it changes the start, hardly the end; d + 1 is 33 here.",
    "lora": "LoRA ranks and rates against full training, from the same tiny language model.",
    "size": "Number of comparisons in one epoch: accuracy approaches the best possible one.",
}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval over seeds (Student's t)."""
    mean = statistics.mean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, half


def paired(runs: dict[str, list[dict]], name: str, metric: str) -> tuple[float, float]:
    """`interval` of the difference from the first setting with the same seed."""
    first = next(iter(runs.values()))
    return interval([run[metric] - other[metric] for run, other in zip(runs[name], first, strict=False)])


def draw(question: str, runs: dict[str, list[dict]], path: Path) -> None:
    metrics = FIGURES[question]
    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": question}):
        figure = Figure(figsize=(2.9 * len(metrics) + 1.1, 0.8 + 0.3 * len(runs)), layout="constrained")
        for axes, (metric, label) in zip(figure.subplots(1, len(metrics), sharey=True), metrics.items(), strict=True):
            for row, found in enumerate(runs.values()):
                values = [run[metric] for run in found]
                mean, half = interval(values)
                axes.plot(values, [row] * len(values), ".", color="#9aa3ad", markersize=5)
                axes.errorbar(mean, row, xerr=half, fmt="o", color="#0062a8", capsize=3)
            if metric == "accuracy":
                ceiling = np.mean([run["accuracy_ceiling"] for found in runs.values() for run in found])
                axes.axvline(ceiling, color="#1b1f24", linewidth=1, linestyle=":")
                axes.text(ceiling, -0.6, "best possible ", ha="right", va="top", fontsize=8)
            axes.set(xlabel=label, ylim=(len(runs) - 0.4, -0.7))
            axes.set_yticks(range(len(runs)), list(runs))
            axes.grid(axis="x", color="#dde1e6", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def show(question: str, runs: dict[str, list[dict]]) -> str:
    """The table of a question, Markdown: means with intervals, and the paired difference in accuracy."""
    metrics = list(FIGURES[question])
    lines = [f"| {question} | {' | '.join(metrics)} | accuracy, difference from the first row |"]
    lines.append("| --- " * (len(metrics) + 2) + "|")
    for name, found in runs.items():
        cells = ["{:.4f} ± {:.4f}".format(*interval([run[metric] for run in found])) for metric in metrics]
        cells.append("{:+.4f} ± {:.4f}".format(*paired(runs, name, "accuracy")))
        lines.append(f"| {name} | {' | '.join(cells)} |".replace(" ± nan", ""))  # one seed has no interval
    for name, found in runs.items() if question == "margins" else ():
        bins = np.mean([run["by_separation"] for run in found], axis=0).round(3).tolist()
        lines.append(f"\nAccuracy by absolute true margin from {SEPARATION[:-1]}, {name}: {bins}.")
    return "\n".join(lines)


def main() -> None:
    rm.train.finish.write_report = lambda folder: None  # half of the time of such a small run
    rm.evaluate.evaluator.evaluation_intervals = lambda table, options: {}  # over prompts; here they are over seeds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for a JSON file and a figure of each question")
    parser.add_argument("--questions", default=",".join(QUESTIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only_draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    output, names = Path(args.output), args.questions.split(",")
    output.mkdir(parents=True, exist_ok=True)
    files = {question: output / f"{question}.json" for question in names}
    found = {question: json.loads(path.read_text()) if path.exists() else {} for question, path in files.items()}
    shared = [(made, question, name) for question in names for name, made in QUESTIONS[question].items()]
    with tempfile.TemporaryDirectory() as starts:
        for seed, question, name in [(s, q, n) for s in range(args.seeds) for q in names for n in QUESTIONS[q]]:
            made, runs = QUESTIONS[question][name], found[question].setdefault(name, [])
            if len(runs) > seed or args.only_draw:
                continue
            same = [found[q][n][seed] for m, q, n in shared if m == made and len(found[q].get(n, [])) > seed]
            runs.append(same[0] if same else run(name, made, seed, Path(starts)))
            files[question].write_text(json.dumps(found[question], indent=0, ensure_ascii=False))
            print(f"{question}, {name}, seed {seed}: {runs[seed]}", flush=True)
    page = ["# Questions with known answers on toy data", "Written by `tests/bench/toy_questions.py`."]
    for question in names:
        runs = {name: found[question][name] for name in QUESTIONS[question] if found[question].get(name)}
        draw(question, runs, output / f"{question}.svg")
        count = f"Seeds per row: {', '.join(str(len(seeds)) for seeds in runs.values())}."
        page += [f"## {question}", EXPECTED[question], f"![{question}]({question}.svg)", show(question, runs), count]
        print(show(question, runs) + "\n")
    (output / "README.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
