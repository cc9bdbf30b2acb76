"""Token rewards as text; the numbers are tested in tests/test_forward.py (`score_prompts` with `every_token`)."""

import json

import numpy as np
import pandas as pd
import pytest
from runs import reset_accelerate

from rm.data.tokenize import make_tree
from rm.evaluate import __main__ as program
from rm.evaluate.evaluator import token_rewards

SIDES = ("chosen", "rejected")


def byte_level():
    """A byte-level BPE tokenizer (as GPT-2's, Llama 3's, Qwen's) without merges but two: a letter is up to 4 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "he", "Ġhe"])}
    backend = Tokenizer(models.BPE(vocab, [("h", "e"), ("Ġ", "he")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", clean_up_tokenization_spaces=True)


def with_spaces():
    """As Llama 2's: spaces as ▁, one in front, which decoding drops; bytes where the vocabulary has no letter."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.normalizers import Prepend, Replace, Sequence
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,!?", "he", "▁he"]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [("h", "e"), ("▁", "he")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


def rewards_of(tokenizer, *texts: str) -> list[list]:
    """Token rewards of sequences that start alike; the reward at a token is its index."""
    tree = make_tree([np.array(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in texts])
    return token_rewards(tokenizer, tree, np.concatenate([np.arange(len(ids)) for ids in tree.sequences()]))


TEXTS = [" he said", "he said: he, hé? no ,  \n\n he", "你好 👍🏽 a👨‍👩‍👧b", "e\u0301 \u200d ש‎ל\ufffd\ufffd!"]


@pytest.mark.parametrize("make", [byte_level, with_spaces])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_make_up_the_text(make, text):
    tokenizer = make()
    found, _ = rewards_of(tokenizer, "he asks:" + text, "he asks:#")
    assert "".join(piece for piece, _ in found) == text + "<|eos|>"
    length = len(tokenizer("he asks:" + text)["input_ids"])
    assert found[0] == ["", len(tokenizer("he asks:")["input_ids"]) - 1] and found[-1][1] == length
    ends = [i for _, i in found]
    assert ends == sorted(set(ends)) and len(found) > 3 and found[-1][0].endswith("<|eos|>")
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece, _ in found)


def test_tokens_inside_a_character_are_one_piece():
    """The letters share three of their four bytes; the pieces start before them."""
    one, other = rewards_of(byte_level(), "a👍 he", "a👎")
    assert one == [["", 0], ["👍", 4], [" he", 5], ["<|eos|>", 6]]
    assert other == [["", 0], ["👎", 4], ["<|eos|>", 5]]
    assert rewards_of(byte_level(), "he", "a")[0] == [["he", 0], ["<|eos|>", 1]]  # nothing in common


def test_a_run_records_them(train):
    """Of the first pairs of the toy data: the answer as it was given, and the rewards of the evaluation."""
    _, folder = train("out", "--eval_steps=2")
    for step in (2, 4):
        records = [json.loads(line) for line in (folder / f"samples/step-{step}.jsonl").read_text().splitlines()]
        assert len(records) == 4
        for record in records:
            starts = [record[f"token_rewards_{side}"][0] for side in SIDES]
            assert starts[0] == pytest.approx(starts[1]) and starts[0][0] == ""
            for side in SIDES:
                (*_, (last, reward)) = record[f"token_rewards_{side}"]
                assert last.strip() == "<|end|>" and reward == pytest.approx(record[f"reward_{side}"], abs=1e-5)
                text = "".join(piece for piece, _ in record[f"token_rewards_{side}"])
                assert f"{record[side]} <|end|>".endswith(text.strip())  # from where the answers part


def test_a_run_records_groups(train, capsys):
    """Answers from the best to the worst rank in the data; rewards and ranks of the table of answers of the best step,
    although it is not the last one; the same mistakes again by `rm.evaluate`."""
    options = ["--dataset_name=toy_groups", "--eval_steps=2", "--metric_for_best_model=eval/margin"]
    options += ["--load_best_model_at_end", "--greater_is_better=false", "--num_print_samples=2"]
    summary, folder = train("out", *options)
    step = summary["train/best_step"]
    answers = pd.read_parquet(folder / f"eval/step-{step}-answers.parquet")
    files = [(folder / name).read_text() for name in (f"samples/step-{step}.jsonl", "mistakes.jsonl")]
    samples, mistakes = ([json.loads(line) for line in file.splitlines()] for file in files)
    assert step == 2 and len(samples) == 2 and len(mistakes) > 2
    assert len({record["id"] for record in mistakes}) == len(mistakes)  # one for each prompt
    for record in [*samples, *mistakes]:
        own = answers[answers["id"] == record["id"]].sort_values("score", ascending=False)
        for place, (answer, reward) in enumerate(zip(record["answers"], own["reward"], strict=True)):
            assert answer["reward"] == pytest.approx(reward) and answer["score"] == -1 - place
            assert answer["rank"] == 1 + (own["reward"] > reward).sum()
            assert answer["is_inverted"] == bool((own["reward"][place:] > reward).any())
            (*_, (last, reward)) = answer["token_rewards"]
            assert last.strip() == "<|end|>" and reward == pytest.approx(answer["reward"], abs=1e-5)
            text = "".join(piece for piece, _ in answer["token_rewards"])
            assert f"{answer['text']} <|end|>".endswith(text.strip())  # from where the answers part
    assert all(record["correct"] != "right" and record["accuracy"] < 1 for record in mistakes)
    reset_accelerate()
    program.main([f"--model={folder}", "--mistakes=3", f"--output={folder / 'again'}"])
    again = [json.loads(line) for line in (folder / "again" / "mistakes.jsonl").read_text().splitlines()]
    assert [record["id"] for record in again] == [record["id"] for record in mistakes[:3]]
    assert "3 worst mistakes" in capsys.readouterr().out and again[0]["answers"][0]["token_rewards"]


def test_an_encoder_run_has_no_token_rewards(tmp_path, train, capsys):
    from conftest import ENCODERS, ROOT
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny_llama")
    config = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, num_labels=1, pad_token_id=0, **ENCODERS["bert"],
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    _, folder = train("out", f"--model_name_or_path={tmp_path / 'bert'}")
    (record, *_) = (json.loads(line) for line in (folder / "samples/step-4.jsonl").read_text().splitlines())
    assert "reward_chosen" in record and "token_rewards_chosen" not in record
