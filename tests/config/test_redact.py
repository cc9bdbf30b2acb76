"""Tests of rm/config/redact.py: secrets in a config and on a command line."""

import pytest

from rm.config.redact import redact, redact_arguments, safe_line
from rm.train import finish

HUB_TOKEN, KEY = "hf_" + "a" * 34, "0123456789abcdef" * 2 + "01234567"
HIDDEN = "[redacted]"


@pytest.mark.parametrize(
    "given, hidden",
    [
        (["--seed=1", "--use_peft", "max_length=none"], ["--seed=1", "--use_peft", "max_length=none"]),
        (["--hub_token=abc=="], [f"--hub_token={HIDDEN}"]),
        (["--hub-token", "abc=="], ["--hub-token", HIDDEN]),
        (["hub_token=abc"], [f"hub_token={HIDDEN}"]),
        (["--use_peft", "api_key=abc"], ["--use_peft", f"api_key={HIDDEN}"]),
        (["--run_name=x", HUB_TOKEN, KEY], ["--run_name=x", HIDDEN, HIDDEN]),
        ([f"--{HUB_TOKEN}"], [f"--{HIDDEN}"]),
        (["--note", f"by {HUB_TOKEN}"], ["--note", f"by {HIDDEN}"]),
        (["--dataset_name=https://me:a@b@host/x"], [f"--dataset_name=https://{HIDDEN}@host/x"]),
        ([f"--model_revision={KEY}"], [f"--model_revision={KEY}"]),  # a commit
        ([f"--run_name={KEY}"], [f"--run_name={HIDDEN}"]),
        (
            ["--chat_template_kwargs={\"api_key\": \"abc\", \"n\": 1}"],
            [f"--chat_template_kwargs={{'api_key': '{HIDDEN}', 'n': 1}}"],
        ),
        (["--chat_template_kwargs", "{'api_key': 'abc'}"], ["--chat_template_kwargs", f"{{'api_key': '{HIDDEN}'}}"]),
        (["--lora_target_modules=('q_proj', 'v_proj')"], ["--lora_target_modules=('q_proj', 'v_proj')"]),
        (["--secrets=x", "--eos_token=</s>"], ["--secrets=x", "--eos_token=</s>"]),
        (['--secret=["a", "b"]'], [f"--secret={HIDDEN}"]),
    ],
    ids=lambda value: value[0][:30],
)  # fmt: skip
def test_command_line(given, hidden):
    assert redact_arguments(given) == hidden
    assert redact_arguments(hidden) == hidden


def test_provenance_has_no_secrets(monkeypatch):
    monkeypatch.setattr(finish, "git", lambda *arguments: f"{arguments[0]} {HUB_TOKEN}")
    assert finish.provenance()["git_diff"] == f"diff {HIDDEN}"  # the command is redacted before: test_security.py
    monkeypatch.setattr(finish, "git", lambda *arguments: None)  # no checkout
    assert finish.provenance()["git_diff"] is None


def test_a_safe_line():
    assert safe_line(f"a\nb\x1b[2J\u202e\ud800 naïve {HUB_TOKEN}") == rf"a\nb\x1b[2J\u202e\ud800 naïve {HIDDEN}"


def test_redact():
    config = {
        "hub_token": HUB_TOKEN,
        "apiKey": "abc",
        "wandb_api_key": KEY,
        "smtp_password": "hunter2",
        "secrets": "kept: not a whole word",
        "use_auth_token": True,
        "token": None,
        "micro_batch_tokens": 8192,
        "eos_token": "</s>",
        "tokenizer_name_or_path": "gpt2",
        "model_revision": KEY,
        "learning_rate": 1e-5,
        "dataset_name": "https://me:hunter2@example.com/data.jsonl",
        "note": f"made with {HUB_TOKEN} and {KEY}",
        "lora_target_modules": ["q_proj", "v_proj", HUB_TOKEN],
        "nested": {"password": "hunter2", "depth": [{"api_key": ["hunter2"], "n": 1}]},
    }
    hidden = "[redacted]"
    assert redact(config) == config | {
        "hub_token": hidden,
        "apiKey": hidden,
        "wandb_api_key": hidden,
        "smtp_password": hidden,
        "dataset_name": f"https://{hidden}@example.com/data.jsonl",
        "note": f"made with {hidden} and {hidden}",
        "lora_target_modules": ["q_proj", "v_proj", hidden],
        "nested": {"password": hidden, "depth": [{"api_key": hidden, "n": 1}]},
    }
    assert config["hub_token"] == HUB_TOKEN  # a copy
