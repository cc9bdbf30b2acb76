"""Tests of the model card: what it says is so, its code gives the evaluated rewards, and nothing breaks out."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm.data.audit import MEANING
from rm.report.hub import hub_name, model_card


def block(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    return code


def rewards_by(card: str, folder, text: str, capsys) -> list[float]:
    """The rewards that the code in the card prints, with the statement `text` and from `folder`."""
    code = re.sub(r"^folder = .*$", lambda _: f"folder = {str(folder)!r}", block(card), flags=re.M)
    example = r"messages = \[.*?\n\]" if text.startswith("messages") else r"text = [^\n]*"
    assert re.search(example, code, re.S)
    capsys.readouterr()
    exec(re.sub(example, lambda _: text, code, count=1, flags=re.S), {})
    return [float(line) for line in capsys.readouterr().out.splitlines()]


def rows(conversations: bool) -> list[dict]:
    """40 pairs of texts or of conversations."""
    pairs = []
    for i in range(40):
        prompt, chosen, rejected = f"how can i bake bread {i} times?", f"mix flour and water {i}.", f"no {i}."
        if conversations:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


@pytest.mark.parametrize("conversations", [True, False], ids=["conversations", "texts"])
@pytest.mark.parametrize("kind", ["whole", "lora", "merged"])
def test_the_code_in_the_card_gives_the_evaluated_reward(train, pretrained, tmp_path, kind, conversations, capsys):
    pairs = rows(conversations)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    options = [f"--model_name_or_path={pretrained}", "--dataset_name=pairs.jsonl", "--eval_fraction=0.25"]
    options += {"whole": [], "lora": ["--use_peft"], "merged": ["--use_peft", "--merge_adapter"]}[kind]
    summary, folder = train("out", *options, "--learning_rate=0.01", "--num_print_samples=-1")
    card = (folder / "README.md").read_text()
    samples = [json.loads(line) for line in (folder / "samples" / "step-4.jsonl").read_text().splitlines()]
    for sample in samples[:3]:
        pair = next(p for p in pairs if sample["chosen"] in json.dumps(p["chosen"]))
        for side in ("chosen", "rejected"):
            text = f"{'messages' if conversations else 'text'} = {pair['prompt'] + pair[side]!r}"
            rewards = rewards_by(card, folder, text, capsys)  # by the model, and by the pipeline
            assert len(rewards) == (1 if kind == "lora" else 2)
            assert rewards == pytest.approx([sample[f"reward_{side}"]] * len(rewards), abs=1e-4)

    header = ModelCard(card).data.to_dict()
    assert header["library_name"] == ("peft" if kind == "lora" else "transformers")
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == summary["eval/accuracy"]
    assert "reward-model" in header["tags"] and "base_model" not in header and "license" not in header
    low, high = (f"{summary[f'eval/accuracy_{end}']:.4g}" for end in ("low", "high"))
    assert f"| {summary['eval/accuracy']:.4g} ({low} to {high}) |" in card and "none was given" in card
    assert str(tmp_path) not in card and pretrained not in card and f"`{pretrained.split('/')[-1]}`" in card


def test_the_pipeline_returns_the_reward_of_a_head_with_two_outputs(train, tmp_path, capsys):
    _, folder = train("out", "--max_steps=1")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score = torch.nn.Linear(model.score.in_features, 2)
    model.config.num_labels = 2
    model.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "two")
    for text in ("hello.", "goodbye, and thanks."):
        messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": text}]
        by_model, by_pipeline = rewards_by(
            (folder / "README.md").read_text(), tmp_path / "two", f"messages = {messages}", capsys
        )
        assert by_pipeline == pytest.approx(by_model, abs=1e-6)


@pytest.fixture(scope="module")
def results() -> dict:
    """As of a run by names on the hub, with an adapter."""
    split = dict(source="org/pairs, split train", format="text_implicit_prompt", fingerprint="0" * 64, total=12)
    split |= dict(empty=1, identical=0, over_length=2, kept=9, truncated=0, duplicate=1, contradictory=0, max_tokens=9)
    import dataclasses

    from rm.config.cli import parse_config

    config = parse_config(["--model_name_or_path=org/base", "--dataset_name=org/pairs", "--use_peft"])
    summary = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.25, "eval/accuracy_high": 0.75, "eval/loss": 0.69}
    summary |= {"eval/comparisons": 10, "train/steps": 5, "speed/train_seconds": 1.5, "output_dir": "runs/x"}
    summary |= {"eval/easy/accuracy": 0.875, "eval/easy/comparisons": 4}
    return {
        "summary": summary,
        "intervals": {"eval/loss": [0.5, 0.75]},
        "config": dataclasses.asdict(config) | {"train_batch_size": 64, "mixed_precision": "no"},
        "adapter": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q"]},
        "layout": "concatenated (it was asked for)",
        "data": {"train": split, "test": split | {"source": "org/pairs, split test", "in_train": 3}},
        "command": ["/home/ann/code/train_rm.py", "--dataset_name=org/pairs"],
        "git_commit": "c0ffee" * 6 + "c0ff",
        "git_diff": "+ secret change",
        "packages": {"torch": "2.13.0"},
        "machine": {"python": "3.11.7", "system": "Linux", "cpus": 2, "gpus": []},
    }


def test_what_the_card_says(results):
    config = results["config"] | {"license": "mit"}
    card = model_card(results | {"config": config}, name="x", repo_id="me/my-rm")
    header = ModelCard(card).data
    assert (header.base_model, header.datasets, header.license) == ("org/base", ["org/pairs"], "mit")
    assert header.eval_results[0].metric_value == 0.5 and header.eval_results[0].dataset_type == "org/pairs"
    assert "folder = 'me/my-rm'" in block(card) and "num_labels=1, dtype='float32'" in block(card)
    for text in (
        "| `train` | `org/pairs, split train` | text_implicit_prompt | 12 | 9 | 9 | `0000000000000000` |",
        f"- `train`: 2 comparisons {MEANING['over_length']}",
        f"- `test`: 3 comparisons {MEANING['in_train']}",
        "5 optimizer steps of 64 prompts with the Bradley-Terry loss",
        '(peft_type `LORA`, r `16`, lora_alpha `32`, lora_dropout `0.05`, target_modules `["q"]`)',
        "| `use_peft` | `true` | `false` |",
        "| `all` | 10 | 0.5 (0.25 to 0.75) | 0.69 (0.5 to 0.75) |",
        "| `easy` | 4 | 0.875 | – |",
        "and the EOS token at the end",
        "commit `c0ffeec0ffee",
        "with uncommitted changes",
        "torch 2.13.0",
        "`train_rm.py --dataset_name=org/pairs`",
    ):
        assert text in card, text
    assert "secret change" not in card and "/home/ann" not in card


def test_after_a_quantised_run_the_base_is_loaded_so(results):
    config = results["config"] | {"load_in_4bit": True, "dtype": "bfloat16"}
    card = model_card(results | {"config": config}, name="x")
    assert "quantization_config=BitsAndBytesConfig(" in block(card) and "import BitsAndBytesConfig" in block(card)
    assert "bnb_4bit_quant_type='nf4'" in block(card) and "bnb_4bit_compute_dtype='bfloat16'" in block(card)
    compile(block(card), "card", "exec")


def test_the_card_of_an_adapter_that_is_trained_further(train, pretrained, tmp_path):
    """It tells that adapter's settings and base, not the options' defaults."""
    options = ["--use_peft", "--max_steps=1", "--head_learning_rate=0.5"]
    lora = ["--lora_r=3", "--lora_alpha=7", "--use_dora", "--lora_target_modules=q_proj"]
    (tmp_path / "ia3.yaml").write_text("peft_type: IA3")
    for name, first, said in (
        ("lora", lora, 'peft_type `LORA`, r `3`, lora_alpha `7`, lora_dropout `0.05`, use_dora `true`, '),
        ("ia3", ["--peft_config=ia3.yaml"], 'peft_type `IA3`, target_modules `["down_proj", "k_proj", "v_proj"]`'),
    ):  # fmt: skip
        train(name, f"--model_name_or_path={pretrained}", *options, *first)
        _, folder = train(f"{name}-2", f"--model_name_or_path={tmp_path / name}", *options)
        card = (folder / "README.md").read_text()
        assert said in card and f"Training continued from the adapter `{name}`." in card
        assert f"- base model: `{Path(pretrained).name}`, a local directory" in card
        assert "| `head_learning_rate` | `0.5` | `null` |" in card
        assert said in (tmp_path / name / "README.md").read_text()


def test_of_groups(results):
    summary, config = results["summary"] | {"eval/best_of_n_accuracy": 0.625}, results["config"]
    card = model_card(results | {"summary": summary, "config": config | {"loss_type": "plackett_luce"}}, name="x")
    assert "has the highest score, is 0.625." in card and "64 prompts with the Plackett-Luce loss" in card
    assert "plackett-luce" in ModelCard(card).data.tags


def test_a_metric_that_is_not_finite(results):
    card = model_card(results | {"summary": results["summary"] | {"eval/accuracy": "NaN"}}, name="x")
    assert "| `all` | 10 | NaN (" in card and ModelCard(card).data.eval_results is None


EVIL = "x\n---\n\n# owned <script>alert(1) `|` ```\n```python\nimport os\n``` | a: [b"


def test_names_cannot_break_out(results):
    """A data set, a subset, a run, a template variable that are called what would end the place they stand in."""
    data = {name: split | {"source": EVIL} for name, split in results["data"].items()}
    config = results["config"] | {"dataset_name": EVIL, "model_name_or_path": EVIL}
    config |= {"chat_template_kwargs": {EVIL: EVIL}, "lr_scheduler_type": EVIL}
    data["train"]["format"] = "conversation_explicit_prompt"
    summary = results["summary"] | {f"eval/{EVIL}/accuracy": 0.5, f"eval/{EVIL}/comparisons": 1}
    evil = results | {
        "data": data,
        "config": config,
        "summary": summary,
        "command": ["train_rm.py", EVIL],
        "adapter": results["adapter"] | {"target_modules": [EVIL]},
        "layout": EVIL,
    }
    evil["machine"] = results["machine"] | {"gpus": [EVIL]}
    card = model_card(evil, name=EVIL)
    _, header, text = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    assert set(yaml.safe_load(header)) == set(ModelCard(card).data.to_dict())
    compile(block(card), "card", "exec")
    assert len(re.findall(r"^```", text, re.M)) == 2  # a block, opened and closed
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert headings[1:] == [f"## {t}" for t in ("Use", "Data", "Training", "Evaluation", "Provenance")]
    plain = re.sub(r"`[^`\n]*`", "", outside.replace(headings[0], ""))  # code is shown as it is
    assert "<script>" not in plain and "owned" not in plain and "\\<script\\>" in headings[0]
    table = [line for line in outside.splitlines() if line.startswith("| `")]
    assert table and all(len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 8) for line in table)


def test_no_path_and_no_secret_gets_into_the_card(results):
    token = "hf_" + "aB" * 17
    home = "/home/ann/secret project"
    config = results["config"] | {"model_name_or_path": f"{home}/base", "dataset_name": "../ann/pairs.jsonl"}
    config |= {
        "output_dir": f"{home}/out",
        "chat_template_kwargs": {"k": token},
    }
    command = ["/opt/x/train_rm.py", f"--output_dir={home}/out", "--config", "/home/ann/c.yaml", "--chat_template_path"]
    command += ["~/ann/template", 'chat_template_kwargs={"a": "/home/ann/b"}', f"--dataset_config={token}"]
    data = {"test": results["data"]["test"] | {"source": "../ann/pairs.jsonl"}}
    adapter = results["adapter"] | {"target_modules": "/home/ann/layers"}
    more = {"config": config, "command": command, "data": data, "adapter": adapter}
    card = model_card(results | more, name="x")
    assert "ann" not in card and "secret" not in card and token not in card
    assert "`base`" in card and "`pairs.jsonl`" in card and "--output_dir=out --config c.yaml" in card


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub_name("org/base") == "org/base" and hub_name("gpt2") == "gpt2"
    for local in (
        "configs/tiny_llama",
        "toy",
        None,
        "pairs.jsonl",
        "data/pairs.jsonl.gz",
        "/a/b",
        "a/b/c",
        str(tmp_path),
    ):
        assert hub_name(local) is None, local
