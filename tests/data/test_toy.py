"""The embedded data: deterministic, with a true reward that can be recomputed and a known best accuracy."""

import runpy

import numpy as np
from conftest import ROOT
from transformers import AutoConfig, AutoTokenizer

from rm.data.toy import SUBSETS, toy_dataset, true_reward

TINY_LLAMA = ROOT / "configs" / "tiny_llama"


def say(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def test_a_pure_function_of_split_and_seed(own_cache):
    train = toy_dataset("train", 50)
    (path,) = own_cache.rglob("*.arrow")
    written = path.stat().st_mtime_ns
    assert toy_dataset("train", 50)[:] == train[:] and path.stat().st_mtime_ns == written  # read from the cache
    assert toy_dataset("train", 20)[:] == train[:20]  # the first N are the same
    assert toy_dataset("train", 50, seed=1)["prompt"][:] != train["prompt"][:]


def test_no_prompt_is_in_both_splits():
    train, test = (set(map(str, toy_dataset(split, 2000)["prompt"])) for split in ("train", "test"))
    assert len(train) > 500 and not train & test


def test_scores_are_the_true_rewards_of_the_texts():
    data = toy_dataset("test", 500)
    for row in data:
        for side in ("chosen", "rejected"):
            assert true_reward(row["prompt"], row[side][0]["content"]) == row[f"score_{side}"]
        assert row["true_margin"] == row["score_chosen"] - row["score_rejected"] and row["chosen"] != row["rejected"]
    assert set(data["subset"]) == set(SUBSETS)
    assert {len(prompt) for prompt in data["prompt"]} >= {1, 2, 3}  # one turn, a system message, several turns


def test_the_true_reward_by_hand():
    """The requests of user and system decide what a longer answer is worth, the words of the assistant do not."""
    short, long, assistant = (
        "boil water.",
        "boil water, then warm the cup, and add milk.",
        say("assistant", "a quick rinse."),
    )
    assert true_reward(say("user", "be brief."), short) == 0
    assert true_reward(say("user", "be brief.") + assistant + say("user", "and now?"), long) == -2 * 0.8125
    assert true_reward(say("system", "give detailed answers.") + say("user", "how?"), long) == 2 * 1.8125
    assert true_reward(assistant + say("user", "how?"), long) == 0
    assert true_reward(say("user", "be brief."), f"gladly, {short}") == 1


def test_labels_follow_the_bradley_terry_model():
    """Of pairs whose better answer wins with probability p, it is chosen in a share p (within 4 standard errors)."""
    margin = np.array(toy_dataset("train", 8000)["true_margin"][:])
    p = 1 / (1 + np.exp(-np.abs(margin)))
    error = np.sqrt(np.sum(p * (1 - p))) / len(p)
    assert abs(np.mean(margin > 0) + 0.5 * np.mean(margin == 0) - np.mean(p)) < 4 * error
    assert 0.8 < np.mean(p) < 0.9  # the best possible accuracy


def test_the_committed_tokenizer(tmp_path):
    """It is what the script makes, fits the model's config, knows every word, and gives texts back."""
    runpy.run_path(str(TINY_LLAMA / "make_tokenizer.py"))["build_tokenizer"]().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (TINY_LLAMA / name).read_text(), name
    tokenizer, config = AutoTokenizer.from_pretrained(TINY_LLAMA), AutoConfig.from_pretrained(TINY_LLAMA)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert config.vocab_size == len(tokenizer) and tokenizer.model_max_length == config.max_position_embeddings
    rendered = tokenizer.apply_chat_template(say("user", "be brief."), tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>be brief.<|end|><|assistant|>"
    rows = toy_dataset("train", 500)
    talks = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    ids = tokenizer(tokenizer.apply_chat_template(talks, tokenize=False))["input_ids"]
    assert tokenizer.unk_token_id not in {token for sequence in ids for token in sequence}
    text = rows["chosen"][7][0]["content"]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
