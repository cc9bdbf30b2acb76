"""Tokens that a trainer computes for a pair: the part of a speed ratio that is the same on every machine.

    python tests/bench/tokens.py --model MODEL --data pairs.jsonl --batch 16

Counts over the whole data set, nothing is trained: TRL's collator at batches of 8, in random order and grouped by
length (`get_length_grouped_indices`, as its `train_sampling_strategy="group_by_length"` does); and our rows.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers.trainer_pt_utils import get_length_grouped_indices  # noqa: E402

from rm.data.load import load_raw  # noqa: E402
from rm.data.plan import StepPlan  # noqa: E402
from rm.data.rows import tokenize_pairs  # noqa: E402
from rm.evaluate.evaluator import pair_lengths  # noqa: E402
from rm.model.load import load_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--micro_batch_tokens", type=int, default=1024)
    args = parser.parse_args()
    pairs = tokenize_pairs(load_raw(args.data, split="train"), load_tokenizer(args.model), max_length=args.max_length)
    lengths = pair_lengths(pairs.dataset)
    longer, num = np.maximum(lengths.chosen, lengths.rejected), len(lengths.chosen)

    def collated(order, size: int = 8) -> float:
        batches = [order[i : i + size] for i in range(0, num, size)]
        return sum(2 * len(batch) * longer[batch].max() for batch in batches) / num

    def ours(layout: str, block_size: int | None = None) -> float:
        options = dict(train_batch_size=args.batch, micro_batch_tokens=args.micro_batch_tokens, seed=0)
        plan, total = StepPlan(lengths, layout=layout, block_size=block_size, **options), 0
        for step in range(plan.steps_per_epoch):
            for micro_batch in plan.step(step)[0]:
                width = max(plan.costs[row].sum() for row in micro_batch.rows)
                total += (
                    len(micro_batch.rows) * -(-width // micro_batch.pad_to_multiple_of) * micro_batch.pad_to_multiple_of
                )
        return total / num

    torch.manual_seed(0)
    unique = lengths.cost("shared_prefix").mean()
    rows = {
        "TRL, batches of 8 in random order": np.mean([collated(torch.randperm(num).numpy()) for _ in range(10)]),
        "TRL, batches of 8 grouped by length": collated(np.array(get_length_grouped_indices(longer.tolist(), 8))),
        "two sequences, no padding": (lengths.chosen + lengths.rejected).mean(),
        "ours, concatenated": ours("concatenated"),
        "ours, shared_prefix, dense mask": ours("shared_prefix"),
        "ours, shared_prefix, FlexAttention (blocks of 128)": ours("shared_prefix", 128),
        "ours, shared_prefix, tree by tree": ours("shared_prefix", 1),
    }
    print(
        f"{num} pairs of at most {args.max_length} tokens, {args.batch} a step; with the prefix once {unique:.0f} each"
    )
    for name, tokens in rows.items():
        print(f"{name:52} {tokens:6.0f} tokens a pair, {tokens / rows['ours, shared_prefix, tree by tree']:.2f} : 1")


if __name__ == "__main__":
    main()
