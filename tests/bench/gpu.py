"""The first ten minutes on a GPU: speed of kernels and layouts, selected kernels, the cost of new shapes, memory.

    python tests/bench/gpu.py                                           # random weights in the shape of Qwen2.5-0.5B
    python tests/bench/gpu.py --trl_python TRL_ENV/bin/python           # and TRL on the same pairs
    python tests/bench/gpu.py --device cpu --layers 1 --prompts 4 --micro_batch_tokens 2048 --shapes 3   # rehearsal

Data are random tokens with lengths like those of UltraFeedback: pairs, and groups of six answers. Contenders take turns
step by step on the same prompts. Model-FLOP utilization counts 6 FLOPs per weight and token, and 12 per layer, hidden
unit and pair of query and key that a tree needs, on tokens of trees, whatever a contender computes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import ROOT
from memory import SHAPES
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm.collate import collate_trees
from rm.data.plan import Layout, StepPlan
from rm.data.tokenize import Tree
from rm.forward import choose_layout, score_batch
from rm.loss import pairwise_loss
from rm.model.attention import VARLEN
from rm.model.reward_model import RewardModel
from rm.score.scorer import TreeList

CONTENDERS = {  # layout, kernel
    "trees, varlen": ("shared_prefix", VARLEN),
    "trees, dense masks": ("shared_prefix", "sdpa"),
    "trees, eager": ("shared_prefix", "eager"),
    "sequences in one row, varlen": ("concatenated", VARLEN),
    "sequences, padded": ("concatenated", "sdpa"),
}


def draw(num_prompts: int, num_answers: int, seed: int, longest: int = 1024) -> TreeList:
    """Lognormal lengths: means of 160 tokens in a prompt and 330 in an answer."""
    rng = np.random.default_rng(seed)

    def length(median: float, sigma: float) -> int:
        return int(np.clip(rng.lognormal(np.log(median), sigma), 4, longest))

    shapes = [(length(90, 1.1), [length(270, 0.65) for _ in range(num_answers)]) for _ in range(num_prompts)]
    return TreeList(Tree(rng.integers(3, 130, p), [rng.integers(3, 130, n) for n in answers]) for p, answers in shapes)


def make_model(args: argparse.Namespace) -> RewardModel:
    hidden, mlp, layers, heads, kv_heads, _ = SHAPES["0.5B (Qwen2.5)"]
    sizes = dict(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=args.layers or layers, vocab_size=4096, num_labels=1, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    return RewardModel(AutoModelForSequenceClassification.from_config(config)).to(args.device).train()


class Bench:
    """Steps of one model with any contender."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.model = args, torch.device(args.device), make_model(args)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        config = self.model.config
        self.layers, self.hidden = config.num_hidden_layers, config.hidden_size
        self.num_weights = sum(p.numel() for n, p in self.model.named_parameters() if "embed_tokens" not in n)

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)

    def layout(self, name: str) -> Layout:
        layout, kernel = CONTENDERS[name]
        self.model.classifier.set_attn_implementation(kernel)
        return Layout(layout, 0, by_tree=kernel == VARLEN)

    def backward(self, trees: TreeList, micro_batch, layout: Layout) -> int:
        """Forward and backward pass of one micro-batch; returns its tokens with padding."""
        batch = collate_trees(trees, micro_batch, layout).to(self.device)
        with self.autocast():
            rewards_N = score_batch(self.model, batch)
        first = np.repeat(np.cumsum([0, *trees.num_answers[:-1]]), trees.num_answers - 1)
        other = np.setdiff1d(np.arange(len(rewards_N)), first)
        chosen, rejected = (torch.from_numpy(index).to(self.device, non_blocking=True) for index in (first, other))
        pairwise_loss(rewards_N[chosen], rewards_N[rejected]).sum().backward()
        return batch.input_ids_RL.numel()

    def step(self, data: TreeList, plan: StepPlan, number: int) -> int:
        tokens = 0
        for micro_batch in plan.step(number)[0]:
            tokens += self.backward(TreeList(data.trees(micro_batch.prompts)), micro_batch, plan.layout)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tokens

    def model_flops(self, trees: list[Tree]) -> float:
        total = 0.0
        for tree in trees:
            prefix, answers = len(tree.prefix), np.array(list(map(len, tree.answers)))
            seen = prefix * (prefix + 1) / 2 + (answers * prefix + answers * (answers + 1) / 2).sum()
            total += 6 * self.num_weights * len(tree) + 12 * self.layers * self.hidden * seen
        return total


def compare(bench: Bench, title: str, num_answers: int, names: list[str]) -> None:
    """Interleaved steps of all contenders, after one that is not counted."""
    args, plans, results = bench.args, {}, {name: [] for name in names}
    data = draw(args.prompts * (args.rounds + 1), num_answers, seed=num_answers)
    config = SimpleNamespace(micro_batch_tokens=args.micro_batch_tokens, seed=0)
    for number in range(args.rounds + 1):
        for name in names if number % 2 else names[::-1]:
            layout = bench.layout(name)
            plans.setdefault(name, StepPlan(data, layout, config, args.prompts, 0, 1))
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = bench.sync()
            tokens = bench.step(data, plans[name], number)
            seconds = bench.sync() - began
            peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else float("nan")
            results[name].append((seconds, tokens, bench.model_flops(data.trees(plans[name].prompts(number))), peak))
    print(f"\n{title}: {args.prompts} prompts per step, {args.rounds} rounds")
    base = None
    for name in names:
        seconds, tokens, flops, peak = np.array(results[name][1:]).T
        speed = args.prompts * args.rounds / seconds.sum()
        base = base or speed
        print(
            f"{name:30} {speed:8.2f} prompts/s ({speed / base:.2f}), {tokens.sum() / args.prompts / args.rounds:6.0f} "
            f"tokens per prompt, MFU {flops.sum() / seconds.sum() / args.peak_tflops / 1e12:.1%}, {peak.max():.1f} GB"
        )


def shapes(bench: Bench) -> None:
    """Micro-batches of different lengths against as many of one length, with the same tokens altogether."""
    count = bench.args.shapes
    for name in ("trees, varlen", "trees, dense masks", "sequences, padded"):
        layout, seconds = bench.layout(name), {}
        config = SimpleNamespace(micro_batch_tokens=10**9, seed=0)
        for kind, widths in (("different", np.linspace(300, 700, count).astype(int)), ("equal", np.full(count, 500))):
            began = 0.0
            for i, width in enumerate([500, *widths]):
                answers = [np.full(width // 3, 5), np.full(width // 4, 6)]
                trees = TreeList([Tree(np.full(width - width // 3 - width // 4, 4), answers)])
                bench.backward(trees, StepPlan(trees, layout, config, 1, 0, 1).step(0)[0][0], layout)
                began = bench.sync() if i == 0 else began  # the first is a warm-up
            seconds[kind] = bench.sync() - began
        print(f"{name:30} {count} different shapes / {count} equal ones: {seconds['different'] / seconds['equal']:.2f}")
    bench.optimizer.zero_grad()


def kernels(bench: Bench) -> None:
    """The names of the attention operators that each contender calls."""
    from torch.profiler import ProfilerActivity, profile

    trees, config = draw(2, 2, 0), SimpleNamespace(micro_batch_tokens=10**9, seed=0)
    for name in CONTENDERS:
        layout = bench.layout(name)
        (micro_batch, *_), _ = StepPlan(trees, layout, config, 2, 0, 1).step(0)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
        with profile(activities=activities) as record:
            bench.backward(TreeList(trees.trees(micro_batch.prompts)), micro_batch, layout)
        found = {event.key for event in record.key_averages()}
        shown = sorted(key for key in found if any(w in key.lower() for w in ("attention", "flash", "fmha", "cudnn")))
        print(f"{name}: {', '.join(key[:70] for key in shown) or 'matrix products'}")
    bench.optimizer.zero_grad()


def against_trl(args: argparse.Namespace) -> None:
    """tests/bench/training.py on the same lengths, with this model saved as a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in (ROOT / "configs" / "tiny_llama").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        make_model(args).classifier.save_pretrained(folder)
        with open(folder / "pairs.jsonl", "w") as file:
            for tree in draw(400, 2, 1):
                chosen, rejected = (ids.tolist() for ids in tree.sequences())
                file.write(json.dumps({"input_ids_chosen": chosen, "input_ids_rejected": rejected}) + "\n")
        command = [sys.executable, str(Path(__file__).with_name("training.py")), "--trl_python", args.trl_python]
        command += ["--model", temporary, "--data", str(folder / "pairs.jsonl"), "--max_length", "2048"]
        command += ["--micro_batch_tokens", str(args.micro_batch_tokens)]
        subprocess.run([*command, "--contenders", "trl_default,trl_best,ours,ours_varlen"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--prompts", type=int, default=64, help="per step")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--micro_batch_tokens", type=int, default=16384)
    parser.add_argument("--shapes", type=int, default=50)
    parser.add_argument(
        "--peak_tflops", type=float, default=989, help="dense bf16 of the GPU; 989: H100 SXM (data sheet)"
    )
    parser.add_argument("--trl_python", help="python of an environment with trl==1.16.0")
    args = parser.parse_args()
    print(torch.cuda.get_device_name() if args.device == "cuda" else "CPU: only a rehearsal, no figure means anything")
    bench = Bench(args)
    kernels(bench)
    bench.layout("trees, varlen")
    with bench.autocast():
        print(f"start-up check: {choose_layout('auto', bench.model, draw(8, 2, 0), 0)}")
    shapes(bench)
    compare(bench, "pairs", 2, list(CONTENDERS))
    compare(bench, "groups of six answers", 6, [name for name in CONTENDERS if name != "trees, eager"])
    if args.trl_python:
        del bench
        against_trl(args)


if __name__ == "__main__":
    main()
