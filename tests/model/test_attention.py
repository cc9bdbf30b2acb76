"""Attention of one row of trees piece by piece, by `varlen_attn` and by `sdpa`; which kernel a request selects."""

import shutil

import numpy as np
import pytest
import torch
import varlen
from conftest import COMMON, PAD, VOCAB, random_pairs, tiny_classifier
from tiny import base, load
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rm.collate import collate, collate_trees
from rm.config.errors import InputError
from rm.data.plan import Layout, MicroBatch
from rm.data.tokenize import Tree
from rm.data.tokenizer import load_tokenizer
from rm.evaluate import __main__ as evaluate
from rm.forward import choose_layout, score_batch
from rm.model import attention
from rm.model.attention import SDPA_BY_TREE, VARLEN, attend_by_tree, attention_pieces, dense_mask, varlen_arguments
from rm.model.load import load_saved_model, recorded_config
from rm.model.reward_model import RewardModel
from rm.score import scorer

CPU, NO_MASK = torch.device("cpu"), torch.empty(1, 1, 1, 0)
PARTS = [[2, 1, 2], [0, 3], [9, 4, 12, 1, 7], [5, 5]]


def row_of(parts):
    rng = np.random.default_rng(0)
    trees = [Tree(rng.integers(3, VOCAB, p), [rng.integers(3, VOCAB, n) for n in answers]) for p, *answers in parts]
    return collate_trees(trees, MicroBatch([list(range(len(trees)))]), Layout("shared_prefix", PAD, by_tree=True))


def row_options(parts) -> dict:
    pieces = attention_pieces(parts)
    return {"pieces": pieces, "varlen": varlen_arguments(pieces, CPU)}


def layer(groups: int = 3) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = groups
    return module


def with_gradients(attend, mask, dtypes=(torch.float64,) * 3, seed=0, **options):
    """Output of a layer with 2 key-value heads of 8 numbers, and gradients of a random projection of it, float64."""
    torch.manual_seed(seed)
    length = sum(map(sum, PARTS))
    states = [
        torch.randn(1, heads, length, 8).to(t).requires_grad_() for heads, t in zip((6, 2, 2), dtypes, strict=True)
    ]
    output = attend(layer(), *states, mask, scaling=0.3, **options)[0]
    direction = torch.randn(output.shape).to(output.dtype)
    return output, *torch.autograd.grad(output, states, direction)


def test_pieces_by_hand():
    pieces = attention_pieces([[2, 1, 2], [0, 3]])
    assert pieces == [(2, [0]), (1, [0, 1]), (2, [0, 2]), (3, [3])]
    cut = [(5, [0]), (3, [1]), (5, [2]), (2, [2, 3]), (5, [2, 3, 4]), (1, [2, 3, 4, 5]), (4, [2, 3, 6])]
    assert attention_pieces([[2, 1, 2], [0, 3], [7, 6, 4]], block=5) == cut
    key_T, cu_seq_q, cu_seq_k, *longest = varlen_arguments(pieces, CPU)
    assert key_T.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7] and longest == [3, 4]
    assert cu_seq_q.tolist() == [0, 2, 3, 5, 8] and cu_seq_k.tolist() == [0, 2, 5, 9, 12]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 5])
def test_equals_the_dense_mask_in_float64(monkeypatch, window):
    """Grouped-query attention, a scale, trees with and without prefix; with and without a sliding window."""
    batch, row = row_of(PARTS), row_options(PARTS)
    mask = dense_mask(batch, window)
    assert mask[0, 0, 5:8, :5].sum() == 0 and (window is None) == bool(mask[0, 0, 16, 8])
    expected = with_gradients(sdpa_attention_forward, mask)
    for atol in (1e-5, 1e-12):  # first piece by piece in float32, as without autocast
        found = with_gradients(attend_by_tree, NO_MASK, sliding_window=window, **row)
        varlen.install(monkeypatch)
        for name, a, b in zip("oqkv", found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=atol, msg=name)


@pytest.mark.parametrize("runs", [False, True])
def test_any_mix_of_dtypes(monkeypatch, runs):
    """Queries and keys may be float32 behind a norm or a rotation, masks bfloat16 behind FSDP."""
    if runs:
        varlen.install(monkeypatch)
    dtypes, half = (torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16,) * 3
    batch, row = row_of(PARTS), row_options(PARTS)
    expected = with_gradients(attend_by_tree, NO_MASK, half, **row)[0]
    padded = with_gradients(attend_by_tree, dense_mask(batch), dtypes)[0]
    for found in (with_gradients(attend_by_tree, NO_MASK, dtypes, **row)[0], padded):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=0)
    config = tiny_classifier("llama", attn_implementation=SDPA_BY_TREE).config
    inputs = attention.attention_inputs(config, batch, torch.float32)
    masked = with_gradients(attend_by_tree, inputs["attention_mask"].bfloat16(), half, pieces=inputs["pieces"])[0]
    torch.testing.assert_close(masked, expected, atol=2e-2, rtol=0)


def test_what_the_kernel_does_not_have(monkeypatch):
    varlen.install(monkeypatch)
    row = row_options(PARTS)
    for given, message in (({"softcap": 50.0}, "no softcap$"), ({"dropout": 0.1}, "dropout: set disable_dropout=true")):
        with pytest.raises(InputError, match=message):
            with_gradients(attend_by_tree, NO_MASK, **row, **given)
    states = [torch.zeros(1, 2, 4, 12)] * 3
    with pytest.raises(InputError, match="no heads of 12 numbers"):
        attend_by_tree(layer(1), *states, NO_MASK, **row_options([[0, 4]]))


# ---------------------------------------------------------------- the check of a kernel


def without_checks(*args, **kwargs):
    return varlen.emulated(*args[:5], *(int(cu.diff().max()) for cu in args[3:5]), **kwargs)


def longer_window(*args, window_size, **kwargs):
    return varlen.emulated(*args, window_size=(window_size[0] + (window_size[0] >= 0), 0), **kwargs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrong", ["", "cu_seqlens", "keys"])
def test_a_wrong_kernel_is_replaced_by_dense_masks(monkeypatch, wrong, autocast):
    """It is checked in the dtype of training: errors of bf16 hide no wrong boundary and no wrong key."""

    def damaged(*args):
        key_T, cu_seq_q, cu_seq_k, *longest = varlen_arguments(*args)
        key_T = key_T.roll(1) if wrong == "keys" else key_T
        cu_seq_k[2] -= int(wrong == "cu_seqlens")
        return key_T, cu_seq_q, cu_seq_k, *longest

    varlen.install(monkeypatch, without_checks)
    monkeypatch.setattr(attention, "varlen_arguments", damaged)
    for kind in ("llama", "gemma3_text"):
        for name in ("auto", "concatenated"):
            model = RewardModel(tiny_classifier(kind, attn_implementation=VARLEN))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                layout = choose_layout(name, model, random_pairs(40), PAD)
            assert layout.by_tree is not bool(wrong)
            assert model.config._attn_implementation == ("sdpa" if wrong else VARLEN)
        assert layout.name == "concatenated"


def test_a_wrong_window_is_noticed_although_the_rows_are_short(monkeypatch, pairs):
    varlen.install(monkeypatch, longer_window)
    for kind, more, is_right in (("llama", {}, True), ("mistral", {"sliding_window": 200}, False)):
        model = RewardModel(tiny_classifier(kind, attn_implementation=VARLEN, **more))
        layout = choose_layout("auto", model, pairs, PAD)
        assert (layout.name, layout.by_tree) == ("shared_prefix", is_right)
        assert ("dense masks: varlen_by_tree differs from float64 by " in layout.reason) is not is_right


def test_models_and_dtypes_without_the_kernel(monkeypatch, pairs):
    """Softcap needs `eager`; float32, as on a GPU without autocast, dense masks."""
    config = AutoConfig.for_model("gemma2", **COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config, attn_implementation=VARLEN))
    layout = choose_layout("auto", model, pairs, PAD)
    assert layout.reason.endswith("dense masks: varlen_by_tree needs half precision on CUDA")
    batch = collate(pairs, MicroBatch([[0, 1, 2]]), Layout("shared_prefix", PAD, by_tree=True))
    rewards = [score_batch(RewardModel(tiny_classifier("mistral", attn_implementation=kernel)), batch)
               for kernel in (VARLEN, "sdpa")]  # fmt: skip
    torch.testing.assert_close(*rewards)  # an export check turns autocast off
    varlen.install(monkeypatch)
    model.classifier.set_attn_implementation(VARLEN)
    layout = choose_layout("auto", model, pairs, PAD)
    assert layout.name == "shared_prefix" and layout.reason.endswith("dense masks: varlen_by_tree has no softcap")
    assert model.config._attn_implementation == "eager"


# ---------------------------------------------------------------- which kernel


def test_a_request_for_flash_attention(monkeypatch):
    """On a CPU the same pieces with `sdpa`; on a GPU of the Ampere generation or newer `varlen_attn`."""
    for chosen, kernel in (
        (None, SDPA_BY_TREE),
        ("flash_attention_2", SDPA_BY_TREE),
        ("sdpa", "sdpa"),
        ("eager", "eager"),
    ):
        assert load(base(), attn_implementation=chosen).config._attn_implementation == kernel
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for chosen, capability, kernel in (
        ("flash_attention_2", (8, 0), VARLEN),
        ("flash_attention_3", (9, 0), VARLEN),
        ("flash_attention_2", (7, 5), "sdpa"),
        (None, (9, 0), "sdpa"),
    ):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda capability=capability: capability)
        assert load(base(), attn_implementation=chosen).config._attn_implementation == kernel


def test_evaluation_and_scoring_use_the_kernel_of_the_run(monkeypatch, tmp_path):
    """Of a run on a GPU, if there is one now. The command line decides otherwise."""
    shutil.copytree(base(), tmp_path, dirs_exist_ok=True)
    tiny_classifier("llama").save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("dataset_name: toy\nattn_implementation: eager\n")

    def kernels() -> list[str]:
        configs = [recorded_config(str(tmp_path), given) for given in ({}, {"attn_implementation": "sdpa"})]
        models = [load_saved_model(str(tmp_path), load_tokenizer(config), config) for config in configs]
        return [model.config._attn_implementation for model in models]

    assert kernels() == [SDPA_BY_TREE, "sdpa"]
    assert "attn_implementation" in scorer.ACCEPTED and "attn_implementation" in evaluate.ACCEPTS
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert kernels() == ["eager", "sdpa"]
