"""Pairs per second of the two layouts, interleaved: the same optimizer steps on the same pairs, turn about.

    python tests/bench/layouts.py --model MODEL --data pairs.jsonl --batch 16 --rounds 5

A round is one optimizer step (forward, backward, clip, fused AdamW) in each layout, on copies of one model, with the
pairs of one step of the plan. Prints the median and range of pairs/s over the rounds, the padded tokens, and the ratios
round by round.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from rm.batching import StepPlan  # noqa: E402
from rm.collate import COLUMNS, collate  # noqa: E402
from rm.data import tokenize_pairs  # noqa: E402
from rm.evaluate import pair_lengths  # noqa: E402
from rm.forward import concatenated_forward  # noqa: E402
from rm.load import load_raw  # noqa: E402
from rm.loss import pairwise_loss  # noqa: E402
from rm.model import RewardModel, load_classifier, load_tokenizer  # noqa: E402

LAYOUTS = ("concatenated", "shared_prefix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    pairs = tokenize_pairs(load_raw(args.data, split=args.split), tokenizer, max_length=args.max_length)
    dataset = pairs.dataset.with_format("numpy", columns=COLUMNS)
    classifier = load_classifier(args.model, tokenizer, seed=0)
    models = {layout: RewardModel(copy.deepcopy(classifier)) for layout in LAYOUTS}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for name, model in models.items()}
    plans = {
        layout: StepPlan(
            pair_lengths(pairs.dataset),
            train_batch_size=args.batch,
            layout=layout,
            micro_batch_tokens=args.micro_batch_tokens,
            seed=0,
        )
        for layout in LAYOUTS
    }

    def step(layout: str, number: int) -> tuple[float, int, float]:
        """(pairs/s, padded tokens, gradient norm) of one optimizer step."""
        model, began, tokens = models[layout], time.perf_counter(), 0
        micro_batches, num_pairs = plans[layout].step(number)
        for micro_batch in micro_batches:
            batch = collate(dataset, micro_batch, layout, tokenizer.pad_token_id)
            chosen_B, rejected_B = concatenated_forward(model, batch)
            (pairwise_loss(chosen_B, rejected_B).sum() / num_pairs).backward()
            tokens += batch.input_ids_RL.numel()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizers[layout].step()
        optimizers[layout].zero_grad()
        return num_pairs / (time.perf_counter() - began), tokens, norm

    speeds, tokens = {layout: [] for layout in LAYOUTS}, dict.fromkeys(LAYOUTS, 0)
    for number in range(args.rounds + 1):
        for layout in LAYOUTS if number % 2 else LAYOUTS[::-1]:
            speed, padded, norm = step(layout, number)
            note = "  (warm-up, not counted)" if number == 0 else ""
            print(
                f"round {number}: {layout:13} {speed:6.3f} pairs/s, {padded:6} tokens, gradient norm {norm:.5f}{note}"
            )
            if number:
                speeds[layout].append(speed)
                tokens[layout] += padded
    for layout in LAYOUTS:
        low, high = min(speeds[layout]), max(speeds[layout])
        print(
            f"{layout:13} median {statistics.median(speeds[layout]):.3f} pairs/s ({low:.3f} to {high:.3f}), "
            f"{tokens[layout]:,} padded tokens"
        )
    ratios = [b / a for a, b in zip(*(speeds[layout] for layout in LAYOUTS), strict=True)]
    print(
        f"shared_prefix / concatenated: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"tokens {tokens['concatenated'] / tokens['shared_prefix']:.2f} : 1, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
