"""The README's blocks that serve a model give the rewards of its evaluation."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import ROOT
from runs import reset_accelerate
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rm.evaluate import __main__ as evaluate

README = (ROOT / "docs" / "scoring_and_serving.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^<!-- serving: (.+?) -->\n```python\n(.*?)^```$", README, re.M | re.S))


def run_block(name: str, folder, *changes: tuple[str, str], scope: dict | None = None) -> dict:
    """What the README's block defines, with `folder` for runs/my_run."""
    code = BLOCKS[name]
    for old, new in (('"runs/my_run"', repr(str(folder))), *changes):
        assert old in code, old
        code = code.replace(old, new)
    scope = {} if scope is None else scope
    exec(code, scope)
    return scope


def evaluated(folder, pair: list, tmp_path) -> list[float]:
    """The rewards of a pair of whole conversations or texts: of one pair they are `rm.evaluate`'s means."""
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps(dict(zip(("chosen", "rejected"), pair, strict=True))))
    reset_accelerate()
    metrics = evaluate.main([f"--model={folder}", f"--dataset_name={file}"])
    assert metrics["eval/comparisons"] == 1
    return [metrics["eval/reward_chosen"], metrics["eval/reward_rejected"]]


@pytest.fixture
def base(pretrained, tmp_path):
    """A model that punishes mistakes: its config names no pad token, its tokenizer puts a BOS before every text."""
    folder = tmp_path / "base"
    tokenizer, config = AutoTokenizer.from_pretrained(pretrained), AutoConfig.from_pretrained(pretrained)
    bos = ("<|tool|>", tokenizer.convert_tokens_to_ids("<|tool|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|tool|> $A", special_tokens=[bos])
    config.pad_token_id = None
    shutil.copytree(pretrained, folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("no.")["input_ids"][0] == bos[1]
    return folder


@pytest.fixture
def trained(train, tmp_path, base):
    """trained(*options, text=False) → the folder of a run on conversations, or on plain text."""

    def run(*options: str, text: bool = False, name: str = "my_run"):
        if text:
            rows = [{"chosen": f"tell me {i}. gladly.", "rejected": f"tell me {i}. no."} for i in range(16)]
            (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
            options = (*options, "--dataset_name=texts.jsonl", "--eval_fraction=0.25")
        return train(name, f"--model_name_or_path={base}", "--max_steps=2", "--learning_rate=0.01", *options)[1]

    return run


def test_pipeline(trained, tmp_path):
    folder = trained()
    found = run_block("pipeline", folder)
    want = evaluated(folder, found["conversations"], tmp_path)
    assert found["rewards"] == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 1e-3
    unsaid = run_block("pipeline", folder, (', function_to_apply="none"', ""))  # the saved config says it too
    assert unsaid["rewards"] == found["rewards"]


def test_classifier_on_conversations(trained, tmp_path):
    folder = trained()
    found = run_block("classifier", folder)
    want = evaluated(folder, found["conversations"], tmp_path)
    assert found["rewards"] == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 1e-3


def test_classifier_on_text(trained, tmp_path):
    folder = trained(text=True)
    found = run_block("classifier", folder)
    want = evaluated(folder, found["plain"], tmp_path)
    assert found["plain_rewards"] == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 1e-3


def test_peft(trained, tmp_path):
    folder = trained("--use_peft")
    loaded = run_block("peft", folder)
    _, rest = BLOCKS["classifier"].split(".eval()\n", 1)
    exec("import torch\n" + rest, loaded)
    want = evaluated(folder, loaded["conversations"], tmp_path)
    assert loaded["rewards"] == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 1e-3


@pytest.fixture
def classify_server():
    """start(folder) → the address of a stand-in for vLLM's /classify, which takes token ids and puts a sigmoid on the
    output unless `use_activation` is false."""
    servers = []

    def start(folder) -> str:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path == "/classify"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                data = []
                for ids in request["input"]:
                    with torch.no_grad():
                        value = model(input_ids=torch.tensor([ids])).logits
                    value = value if request.get("use_activation") is False else value.sigmoid()
                    data.append({"index": len(data), "label": "LABEL_0", "probs": value[0].tolist(), "num_classes": 1})
                reply = json.dumps({"object": "list", "model": request["model"], "data": data}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


def test_the_request_to_vllm(trained, classify_server, tmp_path):
    folder = trained()
    found = run_block("vllm", folder, ("http://localhost:8000", classify_server(folder)))
    want = evaluated(folder, found["conversations"], tmp_path)
    assert found["rewards"] == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 1e-3


def test_function_for_trl(trained, tmp_path):
    """As GRPOTrainer calls it: a list of prompts and one of completions, of text or of messages, and more."""
    folder = trained(text=True)
    reward = run_block("trl function", folder)["reward"]
    want = evaluated(folder, ["tell me. gladly.", "tell me. no."], tmp_path)
    got = reward(["tell me. "] * 2, ["gladly.", "no."], completion_ids=[[3], [4]], trainer_state=None)
    assert got == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 1e-3
    asked, said = [[{"role": "user", "content": "tell me."}]], [[{"role": "assistant", "content": "gladly."}]]
    values = run_block("trl function", trained(name="talk"))["reward"](
        asked * 3, said + [[said[0][0] | {"content": ""}]] + said
    )
    assert values[1] is None and values[0] == values[2] and isinstance(values[0], float)


def test_trl(trained, pretrained, tmp_path, monkeypatch):
    """One real step of GRPOTrainer: the reward that it computes from the folder is ours of the same conversation."""
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    folder, seen = trained(), []
    policy = tmp_path / "policy"
    AutoModelForCausalLM.from_pretrained(pretrained).save_pretrained(policy)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(policy)
    reward = run_block("trl function", folder)["reward"]

    def ours(prompts, completions, **more):
        values = reward(prompts, completions, **more)
        seen.extend(zip(prompts, completions, values, strict=True))
        return values

    reset_accelerate()
    few = 'output_dir="runs/policy", max_steps=1, per_device_train_batch_size=4, num_generations=4, report_to="none", '
    few += "max_completion_length=8, logging_steps=1, use_cpu=True, bf16=False"
    trainer = run_block(
        "trl",
        folder,
        ('"POLICY"', repr(str(policy))),
        (f"reward_funcs={str(folder)!r}", f"reward_funcs=[{str(folder)!r}, ours]"),
        ('output_dir="runs/policy"', few),
        scope={"ours": ours},
    )["trainer"]
    logged = next(row for row in trainer.state.log_history if "rewards/my_run/mean" in row)
    assert len(seen) == 4 and logged["rewards/my_run/mean"] == pytest.approx(logged["rewards/ours/mean"], abs=1e-5)
    theirs = list(trainer._logs["rewards"]["my_run"])
    assert theirs == pytest.approx([value for *_, value in seen], abs=1e-5)
    prompt, completion, value = seen[0]
    other = [{"role": "user", "content": "no."}]
    assert evaluated(folder, [prompt + completion, other], tmp_path)[0] == pytest.approx(value, abs=1e-5)


def test_the_readme_has_these_blocks():
    assert set(BLOCKS) == {
        "pipeline",
        "classifier",
        "peft",
        "trl",
        "trl function",
        "vllm",
        "vllm messages",
        "vllm pooling",
    }
