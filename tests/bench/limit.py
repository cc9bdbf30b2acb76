"""How near training comes to the model alone: tokens/s of the loop against bare forward and backward passes.

    python tests/bench/limit.py --model MODEL --data pairs.jsonl --batch 16 --rounds 5

The bare side runs `base_model` on the same unique tokens: those of each micro-batch, one after the other, cut into
full rows of 256 (its tail is neither run nor counted). Plain causal attention, no padding, mask, loss or optimizer;
`backward` starts at the last hidden states. Our side is the loop of `train_rm.py` on the same pairs: plan, collation,
head, loss, meter, clipping, fused AdamW. Turn about, on two copies of the model.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rm.collate import COLUMNS, collate, pair_tree  # noqa: E402
from rm.data.load import load_raw  # noqa: E402
from rm.data.plan import StepPlan  # noqa: E402
from rm.data.rows import tokenize_pairs  # noqa: E402
from rm.evaluate.evaluator import pair_lengths  # noqa: E402
from rm.forward import concatenated_forward  # noqa: E402
from rm.loss import pairwise_loss  # noqa: E402
from rm.model.attention import block_size  # noqa: E402
from rm.model.load import (
    load_classifier,
    load_tokenizer,  # noqa: E402
)
from rm.model.reward_model import RewardModel, compile_layers  # noqa: E402
from rm.train.meter import Meter  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true", help="autocast, both sides")
    parser.add_argument("--compile", action="store_true", help="torch_compile, our side only")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    pairs = tokenize_pairs(load_raw(args.data, split="train"), tokenizer, max_length=args.max_length)
    dataset = pairs.dataset.with_format("numpy", columns=COLUMNS)
    model = RewardModel(load_classifier(args.model, tokenizer, seed=0)).train()
    base = copy.deepcopy(model.bare.base_model)
    base.set_attn_implementation("sdpa")
    if args.compile:
        compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    options = dict(train_batch_size=args.batch, micro_batch_tokens=args.micro_batch_tokens, seed=0)
    options |= dict(layout="shared_prefix", block_size=block_size(model))
    plan, meter = StepPlan(pair_lengths(pairs.dataset), **options), Meter(torch.device("cpu"))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)

    def ours(number: int) -> int:
        micro_batches, num_pairs = plan.step(number)
        for micro_batch in micro_batches:
            batch = collate(dataset, micro_batch, "shared_prefix", tokenizer.pad_token_id)
            with autocast():
                chosen_B, rejected_B = concatenated_forward(model, batch)
            loss_B = pairwise_loss(chosen_B, rejected_B, batch.margin_B)
            (loss_B.sum() / num_pairs).backward()
            meter.update(loss_B, chosen_B, rejected_B, batch.weight_B, batch.input_ids_RL.numel())
        float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return int(plan.costs[plan.indices(number)].sum())

    def bare(number: int) -> int:
        tokens = 0
        for micro_batch in plan.step(number)[0]:
            trees = [pair_tree(dataset[i]) for row in micro_batch.rows for i in row]
            flat = np.concatenate([part for tree in trees for part in (tree.prefix, *tree.branches)])
            rows = torch.from_numpy(flat[: len(flat) // 256 * 256].astype(np.int64)).view(-1, 256)
            with autocast():
                hidden = base(input_ids=rows, use_cache=False).last_hidden_state
            hidden.sum().backward()
            tokens += rows.numel()
        base.zero_grad()
        return tokens

    speeds = {"ours": [], "bare": []}
    for number in range(args.rounds + 1):
        for name, run in (("ours", ours), ("bare", bare))[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            tokens = run(number)
            speed = tokens / (time.perf_counter() - began)
            print(f"round {number}: {name:5} {speed:6.1f} tokens/s", "" if number else "(not counted)", flush=True)
            if number:
                speeds[name].append(speed)
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["bare"], strict=True)]
    for name, values in speeds.items():
        print(f"{name:5} median {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) tokens/s")
    print(
        f"ours / bare: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{torch.get_num_threads()} threads, {'bf16' if args.bf16 else 'float32'}"
    )


if __name__ == "__main__":
    main()
