"""Speed of rendering and tokenizing against TRL, nothing cached: pairs/s on the same rows, in turn.

    python tests/bench/tokenizing.py --model MODEL --data pairs.jsonl --trl_python TRL_ENV/bin/python --rounds 5
    python tests/bench/tokenizing.py --model MODEL --data pairs.jsonl … --conversations

`trl` is `RewardTrainer._prepare_dataset`, `ours` is `rm.data.cache.tokenize_source`, both with the defaults of their
options and `--num_proc` processes. `--conversations` turns texts of the form of hh-rlhf ("\\n\\nHuman: … \\n\\n
Assistant: …") into messages, which both render with the chat template of the tokenizer. `--repeat` makes more rows out
of few (a number is written in front of each, so that no two are alike).
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from turns import Contender, Turn  # noqa: E402


def run_trl(turn: Turn, args: argparse.Namespace) -> None:
    from datasets import disable_caching, load_dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = dict(bf16=False, use_cpu=True, report_to="none", dataset_num_proc=args.num_proc)
    config = RewardConfig(output_dir=args.folder, max_length=args.max_length, **options)
    for number in range(args.rounds + 1):
        data = load_dataset("json", data_files=f"{args.folder}/rows-{number}.jsonl", split="train")
        turn.wait()
        kept = RewardTrainer._prepare_dataset(None, data, tokenizer, config, "train")
        turn.note = {"kept": len(kept), "first": kept[0]["chosen_ids"] + kept[0]["rejected_ids"]}
        turn.tokens = len(kept)
    turn.wait()


def run_ours(turn: Turn, args: argparse.Namespace) -> None:
    import datasets
    from common import make_config

    from rm.data.cache import tokenize_source
    from rm.data.load import load_source
    from rm.data.tokenizer import load_tokenizer

    datasets.config.HF_DATASETS_CACHE = Path(args.folder, "cache")
    config = make_config(args, dataset_num_proc=args.num_proc)
    tokenizer = load_tokenizer(config)
    for number in range(args.rounds + 1):
        source = load_source(f"{args.folder}/rows-{number}.jsonl", split="train")
        turn.wait()
        kept = tokenize_source(source, "train", tokenizer, config)
        chosen, rejected = kept.trees([0])[0].sequences()
        turn.note = {"kept": len(kept), "first": [*chosen.tolist(), *rejected.tolist()]}
        turn.tokens = len(kept)
    turn.wait()


def messages(text: str) -> list[dict]:
    turns = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    return [
        {"role": {"Human": "user", "Assistant": "assistant"}[role], "content": content}
        for role, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def prepare(args: argparse.Namespace) -> int:
    """A file of rows for every round, no two rows alike; returns the number of rows in a file."""
    from rm.data.load import load_source

    raw = load_source(args.data, split="train").dataset
    rows = [{side: row[side] for side in ("chosen", "rejected")} for row in raw]
    for number in range(args.rounds + 1):
        with Path(args.folder, f"rows-{number}.jsonl").open("w") as file:
            for copy in range(args.repeat):
                for row in rows:
                    start = f"\n\nHuman: {number} {copy} "
                    new = {side: re.sub("^\n\nHuman: ", start, text) for side, text in row.items()}
                    if args.conversations:
                        new = {side: messages(text) for side, text in new.items()}
                    file.write(json.dumps(new) + "\n")
    return len(rows) * args.repeat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--trl_python", default=sys.executable, help="python of an environment with trl==1.16.0")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--num_proc", type=int)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--conversations", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return globals()[f"run_{args.worker}"](Turn(), argparse.Namespace(**json.loads(args.arguments)))

    with tempfile.TemporaryDirectory() as args.folder:
        num_rows = prepare(args)
        contenders = {}
        for name, python in (("trl", args.trl_python), ("ours", sys.executable)):
            contenders[name] = Contender(name, python, __file__, vars(args), Path(args.folder, f"{name}.log"))
        for number in range(args.rounds + 1):
            said = {}
            for name in contenders if number % 2 else reversed(contenders):
                said[name] = contenders[name].work(count=number > 0)
                speed, kept = num_rows / said[name]["seconds"], said[name]["kept"]
                print(f"round {number}: {name:5} {speed:8.0f} pairs/s, {kept} kept", flush=True)
            same = said["trl"]["first"] == said["ours"]["first"]
            assert same or args.conversations, "the two give other tokens"
        for contender in contenders.values():
            contender.stop()
    for name, contender in contenders.items():
        speeds = [num_rows / s for s in contender.seconds]
        print(f"{name:5} median {statistics.median(speeds):.0f} pairs/s ({min(speeds):.0f} to {max(speeds):.0f})")
    ratios = [a / b for a, b in zip(contenders["trl"].seconds, contenders["ours"].seconds, strict=True)]
    print(
        f"ours / trl: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) on {num_rows} pairs, "
        f"{args.num_proc or 1} process(es), first pair {'the same tokens' if same else 'other tokens'}"
    )


if __name__ == "__main__":
    main()
