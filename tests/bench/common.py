"""What the benchmarks need of this project: options, tokenized pairs, and their token ids in the form of TRL."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from rm.config.options import RewardConfig  # noqa: E402
from rm.data.cache import tokenize_source  # noqa: E402
from rm.data.dataset import PreferenceData  # noqa: E402
from rm.data.load import load_source  # noqa: E402


def make_config(args: argparse.Namespace, **options) -> RewardConfig:
    names = ("micro_batch_tokens", "max_length")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)} | options
    return RewardConfig(model_name_or_path=args.model, dataset_name=args.data, **options)


def tokenize(path: str, tokenizer, config: RewardConfig) -> PreferenceData:
    """The usable pairs of one file, with no part held out."""
    source = load_source(path, split="train")
    return tokenize_source(source, "train", tokenizer, config)


def pair_ids(data: PreferenceData) -> list[dict[str, list[int]]]:
    """Chosen and rejected token ids of every comparison, as `RewardTrainer` takes them."""
    sequences = [tree.sequences() for tree in data.trees(range(len(data)))]
    compared = data.comparisons[["index", "chosen", "rejected"]].to_numpy(int)
    sides = [(sequences[prompt][chosen], sequences[prompt][rejected]) for prompt, chosen, rejected in compared]
    return [{"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()} for chosen, rejected in sides]


def pair_lengths(data: PreferenceData) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the chosen and of the rejected sequences, int64 [n] each."""
    return tuple(data.comparisons[f"length_{side}"].to_numpy(np.int64) for side in ("chosen", "rejected"))
