"""`python -m rm.data`: the numbers of small files by hand, and prompts as the model will see them."""

import logging

import pytest
from conftest import ROOT
from examples import GOOD, say, write

from rm.config.errors import InputError
from rm.data.__main__ import main

pytestmark = pytest.mark.usefixtures("own_cache")
MODEL = f"--model_name_or_path={ROOT / 'configs' / 'tiny_llama'}"


@pytest.fixture
def inspect(tmp_path, capsys, monkeypatch, caplog):
    """inspect(rows, *options) → what the program prints, and its log."""
    monkeypatch.setenv("COLUMNS", "200")
    caplog.set_level(logging.DEBUG)

    def run(rows, *options: str) -> tuple[str, str]:
        main([f"--dataset_name={write(tmp_path / 'rows.jsonl', rows)}", *options])
        return capsys.readouterr().out, caplog.text

    yield run
    logging.getLogger("rm.data.formats").setLevel(logging.NOTSET)


def numbers(printed: str, name: str) -> list[float]:
    """count, mean, min, five quantiles, max of a row of the table."""
    line = next(line for line in printed.splitlines() if line.startswith(name))
    return [float(word.replace(",", "")) for word in line.removeprefix(name).split()]


def test_pairs_without_a_model(inspect):
    rows = [{"question": "ab", "chosen": f"c{'x' * i}\n", "rejected": "\x1b", "margin": i, "note": 3} for i in range(3)]
    printed, log = inspect(rows, "--prompt_column=question", "--max_length=6", "--rows=1")
    assert "layout pair: chosen is chosen, rejected is rejected, question is prompt, margin is margin" in log
    assert "other columns that are not read: note" in log
    assert "over_length        │     1 │" in printed and "kept               │     2 │" in printed
    assert numbers(printed, "bytes of chosen") == [2, 5.5, 5, 5.05, 5.25, 5.5, 5.75, 5.95, 5.99, 6]  # with EOS
    assert numbers(printed, "answers of a prompt") == [2, *[2] * 9]
    assert "42.1% of the bytes are shared; trees compute 78.9%" in printed  # 4 · 2 of 5 + 4 + 6 + 4; 2 · 2 less
    assert "(0.9, 1.0]         1" in printed and "rows.jsonl, row 1: 2 tokens that all" in printed
    assert "ab\n── answer 1: 3 tokens, 1 times chosen, 0 times rejected\nc\n<eos>\n── answer 2: 2 tokens" in printed
    assert "\n\\x1b<eos>\n" in printed and "row 2" not in printed


def test_a_group_and_held_out_prompts_with_a_model(inspect, tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nequal_scores: tie\n")
    prompts = "cook rice", "bake bread", "make tea", "paint a wall"
    rows = [
        {"prompt": say(prompt), "responses": ["add salt", "rest", "hello"], "scores": [2, 1, 1]} for prompt in prompts
    ]
    printed, _ = inspect(rows, MODEL, f"--config={tmp_path / 'c.yaml'}", "--eval_fraction=0.25")
    assert "train: 3 prompts" in printed and "test: 1 prompts" in printed
    assert numbers(printed, "comparisons of a prompt")[:2] == [3, 3]
    assert numbers(printed, "p_chosen")[:3] == [9, pytest.approx(0.8333, abs=1e-4), 0.5]
    prompt, tokens = "<|user|>cookrice<|end|><|assistant|>", "3tokens,2timeschosen,0timesrejected\naddsalt<|end|>"
    assert f"{prompt}\n──answer1:{tokens}\n" in printed.replace(" ", "")


@pytest.mark.parametrize(("options", "message"), [
    (["--learning_rate=1"], "learning_rate has no effect in this program"),
    (["--prompt_column=q"], "prompt_column=q: there is no such column; there are chosen, rejected$"),
    (["--eval_fraction=2"], "eval_fraction=2"),
])  # fmt: skip
def test_wrong_options(inspect, options, message):
    with pytest.raises(InputError, match=message):
        inspect([GOOD], *options)
    with pytest.raises(InputError, match="--dataset_name is needed: the data to inspect"):
        main([MODEL])
