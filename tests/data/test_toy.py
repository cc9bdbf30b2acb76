"""The embedded data: deterministic, with a true reward that can be recomputed and a known best accuracy."""

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoConfig, AutoTokenizer

from rm.data.toy import SUBSETS, build_tokenizer, toy_dataset, true_reward
from rm.evaluate.statistics import accuracy_ceiling


def user(text):
    return [{"role": "user", "content": text}]


def test_a_pure_function_of_split_and_seed():
    train, again = toy_dataset("train", 50), toy_dataset("train", 50)
    assert train[:] == again[:]
    assert toy_dataset("train", 20)[:] == train[:20]  # the first N are the same
    assert toy_dataset("train", 50, seed=1)["prompt"][:] != train["prompt"][:]
    with pytest.raises(ValueError, match="splits 'train' and 'test'"):
        toy_dataset("validation", 5)


def test_no_prompt_is_in_both_splits():
    train, test = (set(map(str, toy_dataset(split, 2000)["prompt"])) for split in ("train", "test"))
    assert len(train) > 500 and not train & test


def test_scores_are_the_true_rewards_of_the_texts():
    data = toy_dataset("test", 500)
    for row in data:
        for side in ("chosen", "rejected"):
            assert true_reward(row["prompt"], row[side][0]["content"]) == row[f"score_{side}"]
        assert row["true_margin"] == row["score_chosen"] - row["score_rejected"]
        assert row["chosen"] != row["rejected"]
    assert set(data["subset"]) == set(SUBSETS)
    assert {len(prompt) for prompt in data["prompt"]} >= {1, 2, 3}  # one turn, a system message, several turns


def test_the_prompt_decides_what_a_longer_answer_is_worth():
    brief, detailed = (
        [{"role": "user", "content": f"be {style}. how do i make tea?"}] for style in ("brief", "detailed")
    )
    short, long = "boil water.", "boil water, then warm the cup, and add milk."
    assert true_reward(brief, short) > true_reward(brief, long)
    assert true_reward(detailed, short) < true_reward(detailed, long)
    assert true_reward(brief, "gladly, boil water.") == true_reward(brief, short) + 1.0


def test_labels_follow_the_bradley_terry_model():
    """Of pairs whose better answer wins with probability p, it is chosen in a share p (within 4 standard errors)."""
    margin = np.array(toy_dataset("train", 8000)["true_margin"][:])
    p = 1 / (1 + np.exp(-np.abs(margin)))
    error = np.sqrt(np.sum(p * (1 - p))) / len(p)
    assert abs(np.mean(margin > 0) + 0.5 * np.mean(margin == 0) - np.mean(p)) < 4 * error
    assert 0.8 < accuracy_ceiling(margin) < 0.9


def test_ceiling_by_hand():
    assert accuracy_ceiling(np.log([3.0, 1 / 4, 1.0])) == pytest.approx((0.75 + 0.8 + 0.5) / 3)


def test_the_committed_tokenizer_is_the_one_that_the_code_builds(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (ROOT / "configs" / "tiny_llama" / name).read_text(), name


def test_the_tokenizer_knows_every_word_and_renders_by_template():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny_llama")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "be brief. tell me how to make tea."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>be brief. tell me how to make tea.<|end|><|assistant|>"
    ids = tokenizer(rendered)["input_ids"]
    assert tokenizer.decode(ids[1:10]) == "be brief. tell me how to make tea"
    for row in toy_dataset("train", 2000):
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    toy_dataset("train", 50)
    (path,) = tmp_path.rglob("*.arrow")
    before = path.stat().st_mtime_ns
    toy_dataset("train", 50)
    assert path.stat().st_mtime_ns == before


def test_the_users_and_systems_requests_count_and_the_assistants_words_do_not():
    system = [{"role": "system", "content": "give detailed answers."}]
    assistant = [{"role": "assistant", "content": "a quick rinse."}]
    answer = "rinse it, then boil it."
    assert true_reward(system + user("how?"), answer) == 1.8125
    assert true_reward(user("be brief.") + assistant + user("and now?"), answer) == -0.8125
    assert true_reward(assistant + user("how?"), answer) == 0.0


def test_decoding_gives_the_text_back_and_the_config_fits():
    tokenizer, config = (
        AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny_llama"),
        AutoConfig.from_pretrained(ROOT / "configs" / "tiny_llama"),
    )
    text = toy_dataset("train", 300)["chosen"][7][0]["content"]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert config.vocab_size == len(tokenizer) and tokenizer.model_max_length == config.max_position_embeddings
    with pytest.raises(ValueError, match="at least one pair, not 0"):
        toy_dataset("train", 0)
