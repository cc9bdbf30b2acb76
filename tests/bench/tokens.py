"""Tokens that a trainer computes per pair: the part of a speed ratio that is the same on every machine.

    python tests/bench/tokens.py --model MODEL --data pairs.jsonl --batch 16

Counts over the whole data set, nothing is trained: TRL's collator at batches of 8, in random order and grouped by
length (`get_length_grouped_indices`, as its `train_sampling_strategy="group_by_length"` does); and our rows.
"""

import argparse

import numpy as np
import torch
from common import make_config, pair_lengths, tokenize
from transformers.trainer_pt_utils import get_length_grouped_indices

from rm.data.plan import ROW_MULTIPLE, Layout, StepPlan
from rm.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--micro_batch_tokens", type=int, default=1024)
    args = parser.parse_args()
    config = make_config(args)
    data = tokenize(args.data, load_tokenizer(config), config)
    chosen, rejected = pair_lengths(data)
    longer, num = np.maximum(chosen, rejected), len(data)

    def collated(order, size: int = 8) -> float:
        batches = [order[i : i + size] for i in range(0, num, size)]
        return sum(2 * len(batch) * longer[batch].max() for batch in batches) / num

    def ours(layout: Layout) -> float:
        plan, total = StepPlan(data, layout, config, args.batch, 0, 1), 0
        for step in range(plan.steps_per_epoch):
            for micro_batch in plan.step(step)[0]:
                length = max(int(plan.costs[row].sum()) for row in micro_batch.rows)
                is_rounded = layout.name == "shared_prefix" and not layout.by_tree
                total += len(micro_batch.rows) * (length + is_rounded * (-length % ROW_MULTIPLE))
        return total / num

    torch.manual_seed(0)
    rows = {
        "TRL, batches of 8 in random order": np.mean([collated(torch.randperm(num).numpy()) for _ in range(10)]),
        "TRL, batches of 8 grouped by length": collated(np.array(get_length_grouped_indices(longer.tolist(), 8))),
        "two sequences, no padding": (chosen + rejected).mean(),
        "ours, concatenated, padded": ours(Layout("concatenated", 0)),
        "ours, concatenated, tree by tree": ours(Layout("concatenated", 0, by_tree=True)),
        "ours, shared_prefix, dense mask": ours(Layout("shared_prefix", 0)),
        "ours, shared_prefix, tree by tree": ours(Layout("shared_prefix", 0, by_tree=True)),
    }
    least = rows["ours, shared_prefix, tree by tree"]
    print(f"{num} pairs of at most {args.max_length} tokens, {args.batch} per step")
    for name, tokens in rows.items():
        print(f"{name:38} {tokens:6.0f} tokens per pair, {tokens / least:.2f} : 1")


if __name__ == "__main__":
    main()
