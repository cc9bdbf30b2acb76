"""Evaluation and scoring speed: pairs/s against TRL's `evaluate`, candidates/s against transformers' pipeline.

    python tests/bench/evaluation.py --model MODEL --data pairs.jsonl --trl_python TRL_ENV/bin/python --rounds 5

Every contender is a process of its own with the same weights; in a round each scores the same chunk of the data while
the others wait. `trl` is `RewardTrainer.evaluate` at its defaults (batches of 8), `ours` is `score_prompts` on pairs,
both in bf16 unless `--float32`. `pipeline` is `pipeline("text-classification", batch_size=8)` on the whole texts of N
answers to a prompt, sorted by length, `ours_candidates` is `score_prompts` with the N answers in one tree, both in
float32; answers beyond the pair's own two are taken from other prompts. Rewards of the last two are compared.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from turns import Contender, Turn  # noqa: E402

PEERS = {"ours": "trl", "ours_candidates": "pipeline"}


def run_trl(turn: Turn, args: argparse.Namespace, chunks: dict) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    class Trainer(RewardTrainer):
        def compute_loss(self, model, inputs, *rest, **named):
            turn.tokens += inputs["input_ids"].numel()
            return super().compute_loss(model, inputs, *rest, **named)

    config = RewardConfig(output_dir=args.output_dir, bf16=not args.float32, report_to="none", use_cpu=True)
    data = [Dataset.from_list(chunk) for chunk in chunks["pairs"]]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = Trainer(model=args.model, args=config, train_dataset=data[0], processing_class=tokenizer)
    for chunk in data:
        turn.wait()
        turn.note = {"accuracy": trainer.evaluate(chunk)["eval_accuracy"]}
    turn.wait()


def load_ours(args: argparse.Namespace):
    from common import make_config

    from rm.data.plan import Layout
    from rm.data.tokenizer import load_tokenizer
    from rm.model.load import load_saved_model

    config = make_config(args)
    tokenizer = load_tokenizer(config)
    return load_saved_model(args.model, tokenizer, config), Layout("shared_prefix", tokenizer.pad_token_id, True)


def run_ours(turn: Turn, args: argparse.Namespace, chunks: dict) -> None:
    import numpy as np
    from accelerate import Accelerator

    from rm.data.tokenize import make_tree
    from rm.evaluate.statistics import accuracy
    from rm.score.scorer import TreeList, score_prompts

    model, layout = load_ours(args)
    accelerator = Accelerator(cpu=True, mixed_precision="no" if args.float32 else "bf16")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for chunk in chunks["pairs"]:
        sides = ([np.array(pair[key], np.int32) for key in ("chosen_ids", "rejected_ids")] for pair in chunk)
        data = TreeList([make_tree(pair) for pair in sides])
        turn.wait()
        rewards = np.stack(score_prompts(model, data, layout, args.micro_batch_tokens, accelerator))
        turn.tokens = int(data.costs(layout).sum())  # rows of trees have no padding
        turn.note = {"accuracy": float(accuracy(rewards[:, 0] - rewards[:, 1], np.ones(len(rewards))))}
    turn.wait()


def run_pipeline(turn: Turn, args: argparse.Namespace, chunks: dict) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = dict(function_to_apply="none", device="cpu", dtype="float32")
    classify = pipeline("text-classification", model=args.model, tokenizer=tokenizer, **options)
    preprocess = classify.preprocess

    def counting_preprocess(*arguments, **named):
        inputs = preprocess(*arguments, **named)
        turn.tokens += inputs["input_ids"].numel()  # without padding
        return inputs

    classify.preprocess = counting_preprocess
    for chunk in chunks["trees"]:
        texts = [text for tree in chunk for text in tree["texts"]]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        turn.wait()
        scores = [out["score"] for out in classify([texts[i] for i in order], batch_size=8)]
        rewards = [score for _, score in sorted(zip(order, scores, strict=True))]
        turn.note = {"rewards": rewards}
    turn.wait()


def run_ours_candidates(turn: Turn, args: argparse.Namespace, chunks: dict) -> None:
    import numpy as np

    from rm.data.tokenize import Tree
    from rm.score.scorer import TreeList, score_prompts

    model, layout = load_ours(args)
    for chunk in chunks["trees"]:
        trees = TreeList([Tree(np.array(tree["prompt"]), [np.array(a) for a in tree["answers"]]) for tree in chunk])
        turn.wait()
        rewards = score_prompts(model, trees, layout, args.micro_batch_tokens)
        turn.tokens = sum(map(len, trees))
        turn.note = {"rewards": np.concatenate(rewards).tolist()}
    turn.wait()


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """A model folder with head and pad token for all; chunks of pairs, and of prompts with N answers."""
    import numpy as np
    from common import make_config, pair_ids, tokenize

    from rm.data.tokenizer import load_tokenizer
    from rm.model.load import load_reward_model

    config = make_config(args)
    tokenizer = load_tokenizer(config)
    load_reward_model(tokenizer, config).classifier.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = tokenize(args.data, tokenizer, config)
    chosen = np.random.default_rng(0).permutation(len(data))[: (args.rounds + 1) * args.chunk]
    every, found = pair_ids(data), data.trees(chosen.tolist())
    pairs = [every[i] for i in chosen]
    answers = [answer.tolist() for tree in found for answer in tree.answers]
    trees = []
    for i, tree in enumerate(found):
        prompt, own = tree.prefix.tolist(), [(2 * i + k) % len(answers) for k in range(args.candidates)]
        texts = [tokenizer.decode(prompt + answers[k]) for k in own]
        ids = tokenizer(texts)["input_ids"]  # the tokens that the pipeline will see
        shared = min(map(len, ids)) - 1
        shared = next((n for n in range(shared) if len({side[n] for side in ids}) > 1), shared)
        trees.append({"texts": texts, "prompt": ids[0][:shared], "answers": [side[shared:] for side in ids]})
    starts, few = range(0, len(pairs), args.chunk), max(1, args.chunk * 2 // args.candidates)
    chunks = {"pairs": [pairs[i : i + args.chunk] for i in starts], "trees": [trees[i : i + few] for i in starts]}
    args.model, args.chunks = str(folder / "model"), str(folder / "chunks.json")
    Path(args.chunks).write_text(json.dumps(chunks))
    args.num_candidates = few * args.candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--trl_python", default=sys.executable, help="python of an environment with trl==1.16.0")
    parser.add_argument("--contenders", default="trl,ours,pipeline,ours_candidates")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--chunk", type=int, default=32, help="pairs scored in a round")
    parser.add_argument("--candidates", type=int, default=8, help="N, answers to a prompt")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        given = argparse.Namespace(**json.loads(args.arguments))
        chunks = json.loads(Path(given.chunks).read_text())
        return globals()[f"run_{args.worker}"](Turn(), given, chunks)

    names = args.contenders.split(",")
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args, folder)
        given = vars(args) | {"output_dir": str(folder / "out")}
        contenders = {}
        for name in names:
            python = args.trl_python if name == "trl" else sys.executable
            contenders[name] = Contender(name, python, __file__, given, folder / f"{name}.log")
        units = {name: args.num_candidates if name in ("pipeline", "ours_candidates") else args.chunk for name in names}
        for number in range(args.rounds + 1):
            rewards = {}
            for name in names if number % 2 else names[::-1]:
                said = contenders[name].work(count=number > 0)
                rewards[name] = said.get("rewards", [])
                speed, accuracy = units[name] / said["seconds"], said.get("accuracy", float("nan"))
                print(f"round {number}: {name:16} {speed:7.3f}/s, {said['tokens']:6} tokens, accuracy {accuracy:.3f}")
            for a, b in zip(rewards.get("pipeline", []), rewards.get("ours_candidates", []), strict=False):
                worst = max(worst, abs(a - b))
        memory = {name: contender.peak_memory_gb() for name, contender in contenders.items()}
        for contender in contenders.values():
            contender.stop()

    seconds = {name: contender.seconds for name, contender in contenders.items()}
    tokens = {name: sum(contender.tokens) for name, contender in contenders.items()}
    for name in names:
        speeds = [units[name] / s for s in seconds[name]]
        print(
            f"{name:16} median {statistics.median(speeds):.3f}/s ({min(speeds):.3f} to {max(speeds):.3f}), "
            f"{tokens[name]:,} tokens, peak {memory[name]:.2f} GB"
        )
    for own, peer in PEERS.items():
        if own in names and peer in names:
            ratios = [a / b for a, b in zip(seconds[peer], seconds[own], strict=True)]
            print(
                f"{own} / {peer}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
                f"tokens {tokens[peer] / tokens[own]:.2f} : 1, memory {memory[own] / memory[peer]:.2f}"
            )
    if "pipeline" in names:
        print(f"largest difference of a candidate's reward: {worst:.1e}")


if __name__ == "__main__":
    main()
