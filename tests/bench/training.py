"""Training speed and memory against TRL's `RewardTrainer`: whole programs, step by step in turn.

    python tests/bench/training.py --model MODEL --data pairs.jsonl --trl_python TRL_ENV/bin/python --steps 6
    python tests/bench/training.py --model MODEL --data groups.jsonl --prompts 60 --prompts_per_step 4 \\
        --contenders trl_best,ours,ours_pairs --trl_python TRL_ENV/bin/python --steps 6

The second form is for prompts with several scored answers: `ours` trains on groups, `ours_pairs` and TRL on the same
comparisons as shuffled pairs.

Every contender is a process of its own that runs its real program: `train_rm.main`, or `RewardTrainer.train()` in an
environment that has TRL and a tokenizer and head made by this project. All start from the same weights; a round lets
each of them make one optimizer step while the others wait, so that all see the same machine. A contender that is named
`ours` is timed with the precision of the peer it is compared with. Without length grouping the pairs of a step are the
same for all, so that losses and gradient norms can be compared; with it, TRL chooses other pairs for a step, and here
gets an even sample of the batches that its sampler makes from the whole data set (4 pairs a batch, which is faster here
than 8 and needs half the memory; its default is 8).

Prints for each contender the median and range of pairs/s, tokens computed a pair, the peak of its memory, and the
ratios round by round.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from turns import Contender, Turn  # noqa: E402

BEST = {"gradient_checkpointing": False, "group": True, "per_device": 4}
# name: (program, precision, options that differ from the program's defaults)
CONTENDERS = {
    "trl_default": ("trl", "bf16", {}),
    "trl_best": ("trl", "bf16", {"gradient_checkpointing": False, "group": True, "per_device": 4}),
    "trl_best_compile": (
        "trl",
        "bf16",
        {"gradient_checkpointing": False, "group": True, "per_device": 4, "torch_compile": True},
    ),
    "trl_default_fp32": ("trl", "no", {}),
    "trl_best_fp32": ("trl", "no", BEST),
    "ours": ("ours", "bf16", {}),
    "ours_pairs": ("ours", "bf16", {"as_pairs": True}),  # of groups: every comparison as a pair of its own
    "ours_concatenated": ("ours", "bf16", {"layout": "concatenated"}),
    "ours_varlen": ("ours", "bf16", {"attn_implementation": "flash_attention_2"}),  # on a GPU
    "ours_compile": ("ours", "bf16", {"torch_compile": True}),
    "ours_fp32": ("ours", "no", {}),
    "ours_compile_fp32": ("ours", "no", {"torch_compile": True}),
}


# ---------------------------------------------------------------------------------------------- in the worker


def run_ours(turn: Turn, args: argparse.Namespace, precision: str, options: dict) -> None:
    import train_rm
    from rm.log.trackers import RunLog
    from rm.train.processes import GradientAccumulation

    attempt, collate, log = GradientAccumulation.attempt, train_rm.collate, RunLog.log

    def waiting_attempt(self, step):
        turn.wait()
        return attempt(self, step)

    def counting_collate(*arguments):
        batch = collate(*arguments)
        turn.tokens += batch.input_ids_RL.numel()
        turn.pairs += len(batch.chosen_C)
        return batch

    def noting_log(self, metrics, step):
        turn.note = {"loss": metrics["train/loss"], "grad_norm": metrics["optim/grad_norm"]}
        log(self, metrics, step)

    GradientAccumulation.attempt, train_rm.collate, RunLog.log = waiting_attempt, counting_collate, noting_log
    given = dict(
        model_name_or_path=args.model,
        dataset_name=args.data,
        eval_fraction=0.01,
        max_train_samples=args.prompts,
        equal_scores=args.equal_scores,
        train_batch_size=args.prompts_per_step or args.batch,
        max_length=args.max_length,
        micro_batch_tokens=args.micro_batch_tokens,
        mixed_precision=precision,
        learning_rate=args.learning_rate,
        max_steps=args.steps + 2,
        logging_steps=1,
        output_dir=args.output_dir,
        overwrite_output_dir=True,
    )
    if options.pop("as_pairs", False):
        given |= {"dataset_name": args.pairs, "train_batch_size": args.batch, "max_train_samples": None}
    train_rm.main([f"{key}={value}" for key, value in (given | options).items()])


def run_trl(turn: Turn, args: argparse.Namespace, precision: str, options: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl import RewardConfig, RewardTrainer

    pairs = json.loads(Path(args.tokens).read_text())
    per_device = options.pop("per_device", 8)
    if options.pop("group", False):
        torch.manual_seed(0)
        lengths = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs["all"]]
        grouped = get_length_grouped_indices(lengths, per_device)
        batches = [grouped[i : i + per_device] for i in range(0, len(grouped) - per_device + 1, per_device)]
        wanted = (args.steps + 2) * args.batch // per_device
        batches = [batches[(2 * i + 1) * len(batches) // (2 * wanted)] for i in range(wanted)]
        torch.manual_seed(1)
        order = [i for b in torch.randperm(wanted).tolist() for i in batches[b]]
        rows = [pairs["all"][i] for i in order]
    else:
        rows = [pairs["all"][i] for i in pairs["order"]]

    class Trainer(RewardTrainer):
        def compute_loss(self, model, inputs, *rest, **named):
            turn.tokens += inputs["input_ids"].numel()
            turn.pairs += len(inputs["input_ids"]) // 2
            return super().compute_loss(model, inputs, *rest, **named)

    class Waiting(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.wait()

        def on_log(self, arguments, state, control, logs=None, **_):
            turn.note = {key: float(logs[key]) for key in ("loss", "grad_norm") if key in logs}

    config = RewardConfig(
        output_dir=args.output_dir,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=args.batch // per_device,
        bf16=precision == "bf16",
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        max_steps=args.steps + 2,
        train_sampling_strategy="sequential",  # the rows stand in the order that is wanted
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    trainer = Trainer(
        model=args.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Waiting()],
    )
    trainer.train()


# ---------------------------------------------------------------------------------------------- in the controller


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """One model folder with head and pad token for all, and the pairs in the order in which our steps take them."""
    from common import make_config, pair_ids, pair_lengths

    from rm.data.mixture import load_data
    from rm.data.plan import Layout, StepPlan
    from rm.data.tokenizer import load_tokenizer
    from rm.model.load import load_reward_model

    config = make_config(args, eval_fraction=0.01, max_train_samples=args.prompts, equal_scores=args.equal_scores)
    tokenizer = load_tokenizer(config)
    load_reward_model(tokenizer, config).classifier.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data, _ = load_data(tokenizer, config)
    plan = StepPlan(data, Layout("shared_prefix", tokenizer.pad_token_id, by_tree=True), config, args.batch, 0, 1)
    order = [int(i) for step in range(args.steps + 2) for i in plan.prompts(step)]
    rows = pair_ids(data)
    if len(rows) > len(data):  # groups: the comparisons are not shuffled yet
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
    args.tokens, args.model, args.pairs = (str(folder / name) for name in ("tokens.json", "model", "pairs.jsonl"))
    Path(args.tokens).write_text(json.dumps({"all": rows, "order": order}))
    Path(args.pairs).write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    print(
        f"{len(rows)} pairs of at most {args.max_length} tokens; mean tokens of a pair: "
        f"{sum(pair_lengths(data)).mean():.0f} in two sequences, {plan.costs.sum() / len(rows):.0f} in trees"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--trl_python", default=sys.executable, help="python of an environment with trl==1.16.0")
    parser.add_argument("--contenders", default="trl_default,trl_best,ours")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--prompts", type=int, help="of groups: use the first prompts only")
    parser.add_argument("--equal_scores", default="drop", help="of groups: tie keeps equal scores as comparisons")
    parser.add_argument("--prompts_per_step", type=int, help="of groups: prompts of a step of ours")
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after one that is not")
    parser.add_argument("--micro_batch_tokens", type=int, default=1024)
    parser.add_argument("--max_length", type=int, default=1024, help="the default of both programs")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        program, precision, options = CONTENDERS[args.worker]
        given = argparse.Namespace(**json.loads(args.arguments))
        return {"ours": run_ours, "trl": run_trl}[program](Turn(), given, precision, dict(options))

    names = args.contenders.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args, folder)
        contenders = {}
        for name in names:  # one after the other: two that load at once would disturb each other
            python = args.trl_python if CONTENDERS[name][0] == "trl" else sys.executable
            given = vars(args) | {"output_dir": str(folder / name)}
            contenders[name] = Contender(name, python, __file__, given, folder / f"{name}.log")
        for number in range(args.steps + 1):
            for name in names if number % 2 else names[::-1]:
                said = contenders[name].work(count=number > 0)
                speed = said["pairs"] / said["seconds"]
                print(
                    f"step {number}: {name:18} {speed:6.3f} pairs/s, {said['tokens']:6} tokens, "
                    f"loss {said.get('loss', float('nan')):.4f}, gradient norm {said.get('grad_norm', 0):.3f}"
                    + ("" if number else "  (warm-up, not counted)"),
                    flush=True,
                )
        memory = {name: contender.peak_memory_gb() for name, contender in contenders.items()}
        for contender in contenders.values():
            contender.stop()
    speeds = {name: np.divide(c.pairs, c.seconds) for name, c in contenders.items()}
    per_pair = {name: sum(c.tokens) / sum(c.pairs) for name, c in contenders.items()}
    overall = {name: sum(c.pairs) / sum(c.seconds) for name, c in contenders.items()}

    print(f"\n{args.steps} steps, {os.cpu_count()} cores")
    for name in names:
        print(
            f"{name:18} {overall[name]:6.3f} pairs/s overall, median "
            f"{np.median(speeds[name]):.3f} ({min(speeds[name]):.3f} to {max(speeds[name]):.3f}); "
            f"{per_pair[name]:.0f} tokens a pair, {per_pair[name] * overall[name]:.0f} tokens/s; "
            f"peak {memory[name]:.2f} GB"
        )
    for own in (name for name in names if name.startswith("ours")):
        for peer in (name for name in names if CONTENDERS[name][:2] == ("trl", CONTENDERS[own][1])):
            ratios = speeds[own] / speeds[peer]
            print(
                f"{own} / {peer}: {overall[own] / overall[peer]:.2f} overall, median "
                f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); tokens of a pair "
                f"{per_pair[peer] / per_pair[own]:.2f} : 1; memory {memory[own] / memory[peer]:.2f}"
            )


if __name__ == "__main__":
    main()
