"""Both layouts give the rewards and gradients of separate passes, on every architecture that we name."""

import numpy as np
import pytest
import torch
from conftest import CAUSAL, ENCODERS, PAD, random_pairs, tiny_classifier

from rm.collate import Batch, Tree, collate, collate_trees
from rm.data.plan import MicroBatch
from rm.forward import concatenated_forward, resolve_layout, score_batch
from rm.loss import pairwise_loss
from rm.model.attention import SDPA_BY_TREE, attention_mask, dense_mask, shared_prefix_rule
from rm.model.reward_model import RewardModel


def with_lora(classifier):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: the adapter would not act
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def one_by_one(classifier, dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: plain transformers, one unpadded sequence a pass, its own pooling."""
    sides = ("input_ids_chosen", "input_ids_rejected")
    rewards = [[classifier(input_ids=torch.tensor(row[s])[None]).logits[0, 0] for s in sides] for row in dataset]
    table = torch.stack([torch.stack(pair) for pair in rewards])
    return table[:, 0], table[:, 1]


def gradients(model: torch.nn.Module, chosen, rejected, margin) -> dict[str, torch.Tensor]:
    model.zero_grad()
    pairwise_loss(chosen, rejected, margin, center_rewards_coefficient=0.1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ROWS = {"one row": [[0, 1, 2, 3, 4, 5]], "three rows": [[5, 0], [1, 2, 3], [4]]}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_layouts_equal_separate_passes(kind, lora, pairs):
    classifier = tiny_classifier(kind)
    if lora:
        classifier = with_lora(classifier)
    model = RewardModel(classifier)
    margin = torch.tensor(np.asarray(pairs["margin"], dtype=np.float32))
    chosen, rejected = one_by_one(classifier, pairs)
    expected = gradients(model, chosen, rejected, margin)
    assert any("score" in name for name in expected)

    cases = [("concatenated", [[i] for i in range(6)], "sdpa")]
    cases += [("shared_prefix", rows, kernel) for rows in ROWS.values() for kernel in ("sdpa", SDPA_BY_TREE)]
    for layout, rows, kernel in cases:
        model.bare.set_attn_implementation(kernel)
        batch = collate(pairs, MicroBatch(rows), layout, PAD)
        got_chosen, got_rejected = concatenated_forward(model, batch)
        torch.testing.assert_close(got_chosen, chosen[batch.index_B], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_rejected, rejected[batch.index_B], atol=1e-5, rtol=1e-5)
        got = gradients(model, got_chosen, got_rejected, batch.margin_B)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=2e-4, rtol=1e-4, msg=f"{layout} {kernel} {name}")


def test_eager_attention_takes_the_additive_mask(pairs):
    model = RewardModel(tiny_classifier("llama"))
    batch = collate(pairs, MicroBatch(ROWS["three rows"]), "shared_prefix", PAD)
    expected = score_batch(model, batch)
    model.bare.set_attn_implementation("eager")
    torch.testing.assert_close(score_batch(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_run_concatenated(kind, pairs):
    classifier = tiny_classifier(kind)
    model = RewardModel(classifier)
    chosen, rejected = one_by_one(classifier, pairs)
    batch = collate(pairs, MicroBatch([[i] for i in range(6)]), "concatenated", PAD)
    got = concatenated_forward(model, batch)
    torch.testing.assert_close(got[0], chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], rejected, atol=1e-5, rtol=1e-5)


def test_padding_does_not_change_a_reward(pairs):
    model = RewardModel(tiny_classifier("llama"))
    long = random_pairs(1, seed=1, max_prefix=0, max_suffix=9)
    for layout in ("concatenated", "shared_prefix"):
        alone = concatenated_forward(model, collate(pairs, MicroBatch([[3]]), layout, PAD))
        beside = concatenated_forward(model, collate(pairs, MicroBatch([[3], [0], [1], [2]]), layout, PAD))
        torch.testing.assert_close(alone[0], beside[0][:1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(alone[1], beside[1][:1], atol=1e-6, rtol=1e-6)
    assert len(long) == 1


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_any_number_of_branches(layout):
    """Trees of 1, 3 and 2 branches, one without a prefix: rewards in tree order equal the sequences alone."""
    classifier = tiny_classifier("qwen3")
    rng = np.random.default_rng(0)
    trees = [
        Tree(rng.integers(3, 64, p), [rng.integers(3, 64, n) for n in ns])
        for p, ns in ((5, [4]), (0, [2, 7, 3]), (8, [1, 1]))
    ]
    tensors = collate_trees([[trees[0], trees[1]], [trees[2]]], layout, PAD)
    empty = torch.zeros(0)
    rewards = score_batch(RewardModel(classifier), Batch(**tensors, margin_B=empty, weight_B=empty, index_B=empty))
    alone = [classifier(input_ids=torch.tensor(s)[None]).logits[0, 0] for tree in trees for s in tree.sequences()]
    torch.testing.assert_close(rewards, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_mask_by_hand():
    """Tree 0 is [p p | a | b b], then one padding token."""
    tree = torch.tensor([[0, 0, 0, 0, 0, -1]])
    branch = torch.tensor([[0, 0, 1, 2, 2, 0]])
    position = torch.tensor([[0, 1, 2, 2, 3, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]

    def mask(window=None):
        return dense_mask(shared_prefix_rule(tree, branch, position, window), 1, 6, tree.device)[0, 0].int().tolist()

    assert mask() == expected
    expected[2][0] = expected[3][0] = 0  # position 2 - position 0 = 2 is outside a window of 2
    expected[4][0] = expected[4][1] = 0
    assert mask(window=2) == expected


@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind != "gpt2"])  # transformers' GPT-2 has no flex kernel
def test_flex_attention_sees_what_the_dense_mask_shows(kind, pairs, monkeypatch):
    """Forward only: the kernel has no backward pass on a CPU. Its reference implementation, not the compiled one."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as kernel

    monkeypatch.setattr(kernel, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    model = RewardModel(tiny_classifier(kind))
    for rows in ROWS.values():
        batch = collate(pairs, MicroBatch(rows), "shared_prefix", PAD)
        expected = score_batch(model, batch)
        dense = attention_mask(model.config, batch, torch.float32)
        model.bare.set_attn_implementation("flex_attention")
        blocks = attention_mask(model.config, batch, torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(score_batch(model, batch), expected, atol=1e-5, rtol=1e-5)
        model.bare.set_attn_implementation("sdpa")
        for one, other in zip(*(m.values() if isinstance(m, dict) else [m] for m in (dense, blocks)), strict=True):
            length = one.shape[-1]
            shown = torch.stack(
                [
                    other.mask_mod(torch.tensor(r), None, torch.arange(length)[:, None], torch.arange(length))
                    for r in range(len(one))
                ]
            )
            assert torch.equal(shown, one[:, 0])


def test_attention_tree_by_tree_is_float32_and_falls_back(pairs, monkeypatch):
    """Under autocast the kernel gets float32; a model that hands no trees on is run with the dense mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = RewardModel(tiny_classifier("llama"))
    model.bare.set_attn_implementation(SDPA_BY_TREE)
    seen = []

    def spy(module, query, key, value, mask, **options):
        seen.append((query.dtype, query.shape[2], mask.shape[2:]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr("rm.model.attention.sdpa_attention_forward", spy)
    batch = collate(pairs, MicroBatch([[0, 1]]), "shared_prefix", PAD)
    with torch.autocast("cpu", torch.bfloat16):
        score_batch(model, batch)
    assert seen == [(torch.float32, n, (n, n)) for n in batch.tree_lengths] * 2  # two layers
    forward = type(model.bare.model).forward
    monkeypatch.setattr(type(model.bare.model), "forward", lambda self, tree_lengths=None, **k: forward(self, **k))
    layout, reason = resolve_layout("auto", model, pairs, [0, 1, 2], PAD, torch.device("cpu"))
    assert layout == "shared_prefix" and model.config._attn_implementation == "sdpa", reason


def test_padding_to_whole_blocks_is_a_piece_of_its_own(pairs):
    """A row of 30 tokens or so, padded to 64: the rewards stay, and the padding is the last piece of `tree_lengths`."""
    model = RewardModel(tiny_classifier("llama"))
    model.bare.set_attn_implementation(SDPA_BY_TREE)
    exact = collate(pairs, MicroBatch([[1, 2, 3]]), "shared_prefix", PAD)
    padded = collate(pairs, MicroBatch([[1, 2, 3]], pad_to_multiple_of=64), "shared_prefix", PAD)
    width = exact.input_ids_RL.shape[1]
    assert padded.input_ids_RL.shape == (1, 64 * -(-width // 64)) and sum(exact.tree_lengths) == width
    assert padded.tree_lengths == [*exact.tree_lengths, padded.input_ids_RL.shape[1] - width]
    torch.testing.assert_close(score_batch(model, padded), score_batch(model, exact), atol=1e-6, rtol=1e-6)


def test_flex_attention_skips_blocks_between_trees():
    """Four pairs of 256 tokens in one row: only blocks on the diagonal and below it, in a pair, are computed."""
    rng = np.random.default_rng(0)
    trees = [Tree(rng.integers(3, 64, 128), [rng.integers(3, 64, 64), rng.integers(3, 64, 64)]) for _ in range(4)]
    empty = torch.zeros(0)
    batch = Batch(**collate_trees([trees], "shared_prefix", PAD), margin_B=empty, weight_B=empty, index_B=empty)
    config = tiny_classifier("llama").config
    config._attn_implementation = "flex_attention"
    blocks = attention_mask(config, batch, torch.float32)
    assert blocks.to_dense()[0, 0].int().tolist() == [
        [int(i // 2 == j // 2 and j <= i) for j in range(8)] for i in range(8)
    ]


def test_a_wrong_mask_is_noticed(pairs, monkeypatch):
    """auto falls back when packed rewards differ; shared_prefix, asked for by name, is an error."""
    model = RewardModel(tiny_classifier("llama"))
    device = torch.device("cpu")
    layout, reason = resolve_layout("auto", model, pairs, [0, 1, 2], PAD, device)
    assert layout == "shared_prefix" and "proved" in reason
    monkeypatch.setattr(
        "rm.model.attention.shared_prefix_rule",
        lambda tree, branch, position, window=None: lambda row, head, query, key: (key <= query) & (row >= 0),
    )
    layout, reason = resolve_layout("auto", model, pairs, [0, 1, 2], PAD, device)
    assert layout == "concatenated" and "differ by" in reason
    with pytest.raises(ValueError, match="layout=shared_prefix: rewards of 3 pairs differ"):
        resolve_layout("shared_prefix", model, pairs, [0, 1, 2], PAD, device)


def test_auto_falls_back_with_the_reason(pairs):
    device = torch.device("cpu")
    bert = RewardModel(tiny_classifier("bert"))
    assert resolve_layout("auto", bert, pairs, [0], PAD, device)[1].startswith("the model is an encoder")
    llama = RewardModel(tiny_classifier("llama"))
    llama.config._attn_implementation = "flash_attention_2"
    layout, reason = resolve_layout("auto", llama, pairs, [0], PAD, device)
    assert layout == "concatenated" and "takes no mask for each query" in reason
