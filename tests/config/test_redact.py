"""Secrets on a command line; those of a config are tested in test_tracking.py."""

import sys

import pytest

from rm.config.redact import redact_arguments, safe_line
from rm.train import provenance

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
            [f"--chat_template_kwargs={{\"api_key\": \"{HIDDEN}\", \"n\": 1}}"],
        ),
        (["--chat_template_kwargs", "{'api_key': 'abc'}"], ["--chat_template_kwargs", f'{{"api_key": "{HIDDEN}"}}']),
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
    monkeypatch.setattr(sys, "argv", ["train_rm.py", "--hub_token", "abc"])
    monkeypatch.setattr(provenance, "git", lambda *arguments: f"{arguments[0]} {HUB_TOKEN}")
    record = provenance.provenance()
    assert record["command"] == ["train_rm.py", "--hub_token", HIDDEN]
    assert record["git_diff"] == f"diff {HIDDEN}"
    monkeypatch.setattr(provenance, "git", lambda *arguments: None)  # no checkout
    assert provenance.provenance()["git_diff"] is None


def test_a_safe_line():
    assert safe_line(f"a\nb\x1b[2J\u202e\ud800 naïve {HUB_TOKEN}") == rf"a\nb\x1b[2J\u202e\ud800 naïve {HIDDEN}"
