"""From launch to the first optimizer step: seconds and memory, on a first start and on one that reads the cache.

    python tests/bench/startup.py --model MODEL --data pairs.jsonl --trl_python TRL_ENV/bin/python
    python tests/bench/startup.py --model configs/tiny_llama --data toy --pairs 100000     # and 1000000

Every start is a process of its own: `train_rm.py`, or `RewardTrainer.train()` on the same file (`--trl_python`; not for
the toy data). "to the loop" ends before the first forward pass, "first step" before that of the second step. Memory
is that of the process alone, without the files that it maps (their pages belong to the system's cache).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from turns import Contender, Turn  # noqa: E402


def run_ours(turn: Turn, args: argparse.Namespace) -> None:
    import train_rm
    from rm.train.processes import GradientAccumulation

    attempt = GradientAccumulation.attempt

    def waiting_attempt(self, step):
        turn.wait()
        return attempt(self, step)

    GradientAccumulation.attempt = waiting_attempt
    given = dict(model_name_or_path=args.model, dataset_name=args.data, output_dir=args.output_dir)
    given |= dict(overwrite_output_dir=True, max_steps=args.steps + 2)
    given |= dict(train_batch_size=args.batch, max_train_samples=args.pairs)
    given |= dict(max_eval_samples=200) if args.data == "toy" else dict(eval_fraction=0.05)
    train_rm.main([f"{key}={value}" for key, value in given.items()])


def run_trl(turn: Turn, args: argparse.Namespace) -> None:
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Waiting(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.wait()

    options = dict(output_dir=args.output_dir, report_to="none", save_strategy="no", use_cpu=True)
    options |= dict(per_device_train_batch_size=8, gradient_accumulation_steps=args.batch // 8)
    config = RewardConfig(max_steps=args.steps + 2, **options)
    data = load_dataset("json", data_files=args.data, split="train")
    data = data.select(range(args.pairs)) if args.pairs else data
    RewardTrainer(model=args.model, args=config, train_dataset=data, callbacks=[Waiting()]).train()


def private_gb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--trl_python", help="python of an environment with trl==1.16.0; none: without TRL")
    parser.add_argument("--pairs", type=int, help="use the first N pairs")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="steps after the first, for the time of one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return globals()[f"run_{args.worker}"](Turn(), argparse.Namespace(**json.loads(args.arguments)))

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        for start in ("first", "second"):
            for name in ["ours"] + ["trl"] * bool(args.trl_python):
                python, began = args.trl_python if name == "trl" else sys.executable, time.perf_counter()
                given = vars(args) | {"output_dir": f"{folder}/{name}"}
                contender = Contender(name, python, __file__, given, Path(folder, f"{name}.log"))
                to_loop, pid = time.perf_counter() - began, contender.process.pid
                at_loop = private_gb(pid)
                first_step = contender.work()["seconds"]
                later = [contender.work()["seconds"] for _ in range(args.steps)]
                print(
                    f"{start} start, {name:4}: {to_loop:6.1f} s to the loop, first step {first_step:.2f} s, then "
                    f"{sum(later) / max(len(later), 1):.3f} s a step; {at_loop:.2f} GB at the loop, "
                    f"{private_gb(pid):.2f} GB {args.steps} steps later",
                    flush=True,
                )
                contender.stop()


if __name__ == "__main__":
    main()
