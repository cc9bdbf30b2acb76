"""Tests of rm/token_rewards.py: the head's value at every token is the reward of the sequence that ends there; its texts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CAUSAL, PAD, random_pairs, tiny_classifier, tiny_tokenizer
from runs import reset_accelerate
from test_forward import with_lora

from rm.evaluate import token_rewards as trace
from rm.evaluate.evaluator import evaluate_rewards
from rm.evaluate.token_rewards import answer_start, make_trace, pieces, token_rewards, trace_pairs
from rm.model.attention import SDPA_BY_TREE
from rm.model.reward_model import RewardModel

SIDES = ("chosen", "rejected")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def values_of(model, dataset, layout, tokens=64, accelerator=None):
    options = {"layout": layout, "micro_batch_tokens": tokens, "pad_token_id": PAD}
    return token_rewards(model, accelerator or Accelerator(cpu=True), dataset, **options)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_each_value_is_the_reward_of_the_sequence_up_to_there(kind, lora, pairs):
    """By plain transformers, one unpadded sequence a pass; the last one is the evaluation's."""
    classifier = with_lora(tiny_classifier(kind)) if lora else tiny_classifier(kind)
    model = RewardModel(classifier)
    expected = []
    with torch.no_grad():
        for row in pairs:
            for side in SIDES:
                ids = torch.tensor(row[f"input_ids_{side}"])[None]
                ends = {0, ids.shape[1] // 2, ids.shape[1] - 1}
                expected.append({i: classifier(input_ids=ids[:, : i + 1]).logits[0, 0].item() for i in ends})
    cases = [("concatenated", "sdpa"), ("shared_prefix", "sdpa"), ("shared_prefix", SDPA_BY_TREE)]
    for layout, kernel in cases:
        model.bare.set_attn_implementation(kernel)
        got = [values for pair in values_of(model, pairs, layout) for values in pair]
        lengths = [row[f"length_{side}"] for row in pairs for side in SIDES]
        assert [len(values) for values in got] == lengths
        for values, known in zip(got, expected, strict=True):
            assert {i: values[i] for i in known} == pytest.approx(known, abs=1e-5), (layout, kernel)
        options = {"layout": layout, "micro_batch_tokens": 1000, "pad_token_id": PAD}
        rewards = evaluate_rewards(model, Accelerator(cpu=True), pairs, **options)
        np.testing.assert_allclose([values[-1] for values in got], rewards.flatten(), atol=1e-5)


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_shares_of_processes_make_up_the_whole(layout):
    """Two pairs on three processes: one of them has only a filler, which counts for nothing."""
    model, dataset, tables = RewardModel(tiny_classifier("llama")), random_pairs(3).select([1, 2]), []
    expected = values_of(model, dataset, layout)
    for rank in range(3):

        def reduce(table, how):
            tables.append(table)
            return table

        fake = SimpleNamespace(num_processes=3, process_index=rank, device=torch.device("cpu"), reduce=reduce)
        values_of(model, dataset, layout, accelerator=fake)
    flat = np.concatenate([values for pair in expected for values in pair])
    np.testing.assert_allclose(sum(tables), flat, atol=1e-6)
    assert sum(bool(table.any()) for table in tables) == 2


def test_training_mode_comes_back(pairs):
    model = RewardModel(tiny_classifier("llama")).train()
    values_of(model, pairs, "shared_prefix")
    assert model.training


# ------------------------------------------------------------------------------ texts


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


TEXTS = [" he said", "he said: he, hé? no ,  \n\n he", "你好 👍🏽 a👨‍👩‍👧b", "e\u0301 \u200d ש‎ל\ufffd\ufffd!"]
TEXTS += ["\ufffd" * 40]


@pytest.mark.parametrize("make", [byte_level, with_spaces])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_make_up_the_text(make, text):
    tokenizer = make()
    prompt = tokenizer("he asks:")["input_ids"]
    ids = tokenizer("he asks:" + text)["input_ids"] + [tokenizer.eos_token_id]
    found = list(pieces(tokenizer, ids, len(prompt)))
    assert "".join(piece for piece, _ in found) == text + "<|eos|>"
    ends = [i for _, i in found]
    assert ends == sorted(set(ends)) and ends[-1] == len(ids) - 1 and found[-1][0].endswith("<|eos|>")
    assert len(found) > 2 and (found[-1][0] == "<|eos|>" or text.endswith("\ufffd"))
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece, _ in found)


def test_tokens_inside_a_character_are_one_piece():
    tokenizer = byte_level()
    ids = tokenizer("a👍 he")["input_ids"]
    assert list(pieces(tokenizer, ids, 0)) == [("a", 0), ("👍", 4), (" he", 5)]
    values = np.float32([0.5, 9, 9, 9, 1.25, -2])
    assert make_trace(tokenizer, ids, values, 0) == [["a", 0.5], ["👍", 1.25], [" he", -2.0]]
    assert make_trace(tokenizer, ids, values, 5) == [["", 1.25], [" he", -2.0]]
    assert list(pieces(tokenizer, ids[:3], 1)) == [("\ufffd", 2)]  # the text ends inside it


def shared(ids):
    return next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)


@pytest.mark.parametrize(
    "answers, found",
    [
        ((" yes", " no"), " yes"),
        ((" no, no", " no"), " no, no"),  # they begin alike
        (("👍", "👎"), "👍"),  # three bytes in common
        (("e", "expand"), "e"),
        ((" He said", " He SAID it"), " he said"),  # the tokenizer may change case
        ((" he he he he", " he he"), " he he he he"),
    ],
)
def test_the_answer_is_whole_where_both_begin_alike(answers, found):
    tokenizer = byte_level()
    texts = [("say he: " + answer).lower().replace(":  ", ": ") for answer in answers]
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    start = answer_start(tokenizer, ids, answers, shared(ids))
    assert tokenizer.decode(ids[0][start:]).strip() == found.strip() + "<|eos|>"


def test_an_answer_that_is_not_there_begins_where_the_two_part():
    """As where it was cut to length; never inside a character."""
    tokenizer = byte_level()
    ids = [tokenizer(text)["input_ids"] for text in ("he 👍 a", "he 👎 b")]
    assert tokenizer.decode(ids[0][: shared(ids)]) == "he \ufffd"
    start = answer_start(tokenizer, ids, ("other", "text"), shared(ids))
    assert tokenizer.decode(ids[0][:start]) == "he "


# ------------------------------------------------------------------------------ pairs


def pair_sets(dataset, texts, tokenizer):
    part = SimpleNamespace(tokenizer=tokenizer)
    return SimpleNamespace(dataset=dataset, sets={"s": part}, texts=lambda i: texts[i])


def test_rows_as_asked_and_no_more_than_the_limit(pairs, monkeypatch):
    tokenizer, accelerator = tiny_tokenizer(), Accelerator(cpu=True)
    texts = []
    for row in pairs:
        tails = [tokenizer.decode(row[f"input_ids_{side}"][row["prefix_length"] :]) for side in SIDES]
        texts.append({"prompt": "", **dict(zip(SIDES, tails, strict=True))})
    model, sets = RewardModel(tiny_classifier("llama")), pair_sets(pairs, texts, tokenizer)
    options = {"layout": "shared_prefix", "micro_batch_tokens": 1000, "pad_token_id": PAD}
    expected = values_of(model, pairs, "shared_prefix")
    monkeypatch.setattr(trace, "MAX_TRACES", 2)
    traces = trace_pairs(model, accelerator, sets, [4, 0, 2], **options)
    assert traces[2:] == [None]
    for (row, pair), i in zip(zip((4, 0), traces, strict=False), (4, 0), strict=True):
        n = pairs[row]["prefix_length"]
        for found, side, values in zip(pair, SIDES, expected[i], strict=True):
            assert "".join(piece for piece, _ in found).split() == texts[i][side].split()
            rewards = values[n - 1 :] if n else values  # with the prompt's end, where there is a prompt
            assert (found[0][0] == "") == (n > 0)
            np.testing.assert_allclose([reward for _, reward in found], rewards, atol=1e-5)
    assert trace_pairs(model, accelerator, sets, [], **options) == []


def test_an_encoder_has_none(pairs):
    options = {"layout": "concatenated", "micro_batch_tokens": 1000, "pad_token_id": PAD}
    sets = pair_sets(pairs, [], tiny_tokenizer())
    assert trace_pairs(RewardModel(tiny_classifier("bert")), Accelerator(cpu=True), sets, [0, 1], **options) == []


def test_a_run_records_them(train):
    """Of the first pairs of the toy data: the answer as it was given, and the rewards of the evaluation."""
    _, folder = train("out", "--eval_steps=2")
    for step in (2, 4):
        records = [json.loads(line) for line in (folder / f"samples/step-{step}.jsonl").read_text().splitlines()]
        assert len(records) == 4
        for record in records:
            starts = [record[f"trace_{side}"][0] for side in SIDES]
            assert starts[0] == pytest.approx(starts[1]) and starts[0][0] == ""
            for side in SIDES:
                (*_, (last, reward)) = record[f"trace_{side}"]
                assert last.strip() == "<|end|>" and reward == pytest.approx(record[f"reward_{side}"], abs=1e-5)
                text = "".join(piece for piece, _ in record[f"trace_{side}"])
                assert text.strip() == record[side] + " <|end|>"


def test_an_encoder_run_has_no_strips(tmp_path, train, capsys):
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
    assert "reward_chosen" in record and "trace_chosen" not in record
