"""Tokens/s of the training loop against forward and backward passes of the backbone alone.

    python tests/bench/limit.py --model MODEL --data pairs.jsonl --batch 16 --rounds 5

The bare side runs `base_model` on the same unique tokens: those of each micro-batch, one after the other, cut into
full rows of 256 (its tail is neither run nor counted). Plain causal attention, no padding, mask, loss or optimizer;
`backward` starts at the last hidden states. Our side is the loop of `train_rm.py` on the same pairs: plan, collation,
head, loss, meter, clipping, fused AdamW. The two sides take turns, on two copies of the model.
"""

import argparse
import copy
import statistics
import time

import numpy as np
import torch
from accelerate import Accelerator
from common import make_config, tokenize

from rm.collate import collate
from rm.data.plan import Layout, StepPlan
from rm.data.tokenizer import load_tokenizer
from rm.forward import concatenated_forward
from rm.loss import pairwise_loss
from rm.model.load import load_reward_model
from rm.model.reward_model import unwrapped
from rm.train.state import Meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true", help="autocast, both sides")
    parser.add_argument("--compile", action="store_true", help="torch_compile, our side only")
    args = parser.parse_args()

    config = make_config(args, seed=0, torch_compile=args.compile)
    tokenizer = load_tokenizer(config)
    data = tokenize(args.data, tokenizer, config)
    model = load_reward_model(tokenizer, config).train()
    base = load_reward_model(tokenizer, make_config(args, seed=0)) if args.compile else copy.deepcopy(model)
    base = unwrapped(base.classifier).base_model.train()
    base.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    layout = Layout("shared_prefix", tokenizer.pad_token_id, by_tree=True)
    plan, meter = StepPlan(data, layout, config, args.batch, 0, 1), Meter(Accelerator(cpu=True))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)

    def ours(number: int) -> int:
        micro_batches, num_prompts = plan.step(number)
        for micro_batch in micro_batches:
            batch = collate(data, micro_batch, layout)
            with autocast():
                chosen_C, rejected_C, _ = concatenated_forward(model, batch)
            loss_C = batch.weight_C * pairwise_loss(chosen_C, rejected_C, batch.margin_C, batch.p_chosen_C)
            ((loss_C * batch.share_C).sum() / num_prompts).backward()
            meter.update(loss_C, chosen_C, rejected_C, batch)
        float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return int(plan.costs[plan.prompts(number)].sum())

    def bare(number: int) -> int:
        tokens = 0
        for micro_batch in plan.step(number)[0]:
            trees = data.trees(micro_batch.prompts)
            flat = np.concatenate([part for tree in trees for part in (tree.prefix, *tree.answers)])
            if len(flat) < 256:
                continue
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
