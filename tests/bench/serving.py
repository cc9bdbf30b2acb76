"""Rewards per second of a vLLM server against `rm.score`'s scorer: the same groups of answers on one machine, in turn.

    VLLM_PYTHON=vllm_env/bin/python python tests/bench/serving.py --model runs/my_run --data groups.jsonl

Each round has other prompts, so that vLLM's prefix cache holds the prompts of one round only. vLLM gets token ids, all
sequences of a round in one request. docs/scoring_and_serving.md says how to install it.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import requests  # noqa: E402

from rm.score import load_scorer  # noqa: E402
from rm.score.scorer import encode_inputs  # noqa: E402


def start_server(model: str, dtype: str) -> tuple[subprocess.Popen, str]:
    """A vLLM server and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    command = [env["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype]
    command += ["--runner", "pooling", "--served-model-name", "model", "--port", str(port), "--enforce-eager"]
    server, address = subprocess.Popen(command, env=env, stdout=sys.stderr), f"http://127.0.0.1:{port}"
    while True:
        assert server.poll() is None, "the server ended"
        try:
            if requests.get(f"{address}/health", timeout=2).ok:
                return server, address
        except requests.ConnectionError:
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output folder of a run: a whole model or a merged adapter")
    parser.add_argument("--data", required=True, help="JSON lines with prompt and responses")
    parser.add_argument("--prompts", type=int, default=16, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    with open(args.data) as file:
        rows = [json.loads(line) for line, _ in zip(file, range(args.prompts * (args.rounds + 1)), strict=False)]
    records = [{"prompt": row["prompt"], "responses": row["responses"]} for row in rows]
    scorer = load_scorer(args.model, dtype=args.dtype, mixed_precision="no", overlength="truncate_left")
    server, address = start_server(args.model, args.dtype)

    def by_scorer(part: list[dict], ids: list[list[int]]) -> np.ndarray:
        return np.concatenate(scorer.rewards(part))

    def by_vllm(part: list[dict], ids: list[list[int]]) -> np.ndarray:
        request = {"model": "model", "input": ids, "use_activation": False}
        answer = requests.post(f"{address}/classify", json=request, timeout=3600)
        answer.raise_for_status()
        return np.array([entry["probs"][0] for entry in answer.json()["data"]])

    seconds: dict[str, list[float]] = {"rm.score": [], "vLLM": []}
    try:
        for number in range(args.rounds + 1):  # the first one warms up
            part, found = records[number * args.prompts :][: args.prompts], {}
            trees = encode_inputs(part, scorer.tokenizer, scorer.encoding)
            ids = [sequence.tolist() for tree in trees for sequence in tree.sequences()]
            contenders = [("rm.score", by_scorer), ("vLLM", by_vllm)]
            for name, score in contenders if number % 2 else contenders[::-1]:
                started = time.perf_counter()
                found[name] = score(part, ids)
                seconds[name].append(time.perf_counter() - started)
            difference = np.abs(found["rm.score"] - found["vLLM"]).max()
            tokens, computed = sum(map(len, ids)), sum(map(len, trees))
            speeds = {name: round(len(ids) / each[-1], 2) for name, each in seconds.items()}
            what = f"{len(ids)} answers, {tokens} tokens, {computed} as trees"
            print(f"round {number}: {what}; rewards/s {speeds}; largest difference {difference:.2g}", flush=True)
    finally:
        server.terminate()
        server.wait(60)
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)][1:]
    print(f"rm.score / vLLM: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
