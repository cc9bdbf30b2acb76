"""Rewards and gradients of both layouts equal those of plain transformers, for any number of answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import varlen
from conftest import CAUSAL, ENCODERS, PAD, ROOT, VOCAB, random_pairs, tiny_classifier
from examples import preference_data
from runs import SMALL
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm.collate import _pack, collate, collate_trees
from rm.config.errors import InputError
from rm.data.plan import Layout, MicroBatch, plan_micro_batches
from rm.forward import choose_layout, concatenated_forward, forward_batch, layout_problem, score_batch
from rm.loss import pairwise_loss
from rm.model.attention import SDPA_BY_TREE, VARLEN, attention_inputs, sees
from rm.model.reward_model import RewardModel, unwrapped
from rm.score.scorer import TreeList, score_prompts

CPU = torch.device("cpu")
PACKED, BY_TREE = Layout("shared_prefix", PAD), Layout("shared_prefix", PAD, by_tree=True)
PADDED, UNSHARED = Layout("concatenated", PAD), Layout("concatenated", PAD, by_tree=True)
BY_TREE_KERNELS = (SDPA_BY_TREE, VARLEN)
ROWS = {"one row": [[0, 1, 2, 3, 4]], "three rows": [[4, 0], [1, 2], [3]]}


@pytest.fixture(scope="module")
def groups():
    """Prompts with 2, 3, 6, 2 and 1 answers, with several comparisons, margins, weights and soft labels."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(3, VOCAB, count).tolist()

    prompts = []
    for num_answers, prefix in ((2, 0), (3, 5), (6, 12), (2, 8), (3, 1)):
        start = draw(prefix)
        prompts.append([start + draw(n) for n in rng.integers(1, 9, num_answers)])
    comparisons = [[(1, 0)], [(0, 1), (2, 0), (1, 2)], [(0, 5), (4, 1), (2, 3), (5, 2)], [(0, 1)], [(2, 1)]]
    columns = {name: [rng.uniform(low, 1, len(c)).round(2).tolist() for c in comparisons]
               for name, low in (("margin", -1), ("weight", 0), ("p_chosen", 0.5))}  # fmt: skip
    return preference_data(prompts, comparisons, **columns)


def with_lora(classifier):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: the adapter would have no effect
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def plain_rewards(classifier, data) -> torch.Tensor:
    """The reference: plain transformers on padded sequences, with its own pooling; [N], prompt by prompt."""
    sequences = [torch.from_numpy(ids).long() for tree in data.trees(range(len(data))) for ids in tree.sequences()]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    return classifier(input_ids=input_ids, attention_mask=(input_ids != PAD).long()).logits[:, 0]


def step_loss(chosen_C, rejected_C, batch) -> torch.Tensor:
    loss_C = pairwise_loss(chosen_C, rejected_C, batch.margin_C, batch.p_chosen_C, center_rewards_coefficient=0.1)
    return (batch.share_C * batch.weight_C * loss_C).sum()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def set_kernel(model: RewardModel, kernel: str) -> RewardModel:
    unwrapped(model.classifier).set_attn_implementation(kernel)
    return model


@pytest.mark.parametrize("kind", [*CAUSAL, "llama with LoRA"])
def test_layouts_equal_plain_transformers(kind, groups, monkeypatch):
    classifier = tiny_classifier(kind.split()[0])
    classifier = with_lora(classifier) if "LoRA" in kind else classifier
    expected = plain_rewards(classifier, groups)
    table, first = groups.comparisons, np.cumsum([0, *groups.num_answers])
    chosen, rejected = (torch.tensor(first[table["index"]] + table[side]) for side in ("chosen", "rejected"))
    columns = {name: torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in ("margin", "p_chosen")}
    loss_C = pairwise_loss(expected[chosen], expected[rejected], columns["margin"], columns["p_chosen"],
                           center_rewards_coefficient=0.1)  # fmt: skip
    model = RewardModel(classifier)
    want = gradients(model, (torch.tensor(table["share"] * table["weight"]) * loss_C).sum())
    assert any("score" in name for name in want) and any("1" in name for name in want)

    cases = [(PADDED, [[i] for i in range(5)], "sdpa")]
    cases += [(PACKED, rows, kernel) for rows in ROWS.values() for kernel in ("sdpa", SDPA_BY_TREE)]
    cases += [(layout, ROWS["one row"], kernel) for layout in (BY_TREE, UNSHARED) for kernel in BY_TREE_KERNELS]
    varlen.install(monkeypatch)
    for layout, rows, kernel in cases:
        monkeypatch.setattr("rm.model.attention.BLOCK", 128 if layout is PACKED else 2)
        micro_batch = MicroBatch(rows)
        batch = collate(groups, micro_batch, layout)
        places = np.concatenate([np.arange(first[i], first[i + 1]) for i in micro_batch.prompts])
        rewards_N = score_batch(set_kernel(model, kernel), batch)
        torch.testing.assert_close(rewards_N, expected[places], atol=1e-5, rtol=1e-5)
        got = gradients(model, step_loss(*concatenated_forward(model, batch)[:2], batch))
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, atol=2e-4, rtol=1e-4, msg=f"{layout} {kernel} {name}")


def test_a_step_does_not_depend_on_its_micro_batches_and_dummies_have_no_influence(groups):
    model = set_kernel(RewardModel(tiny_classifier("llama")), SDPA_BY_TREE)
    whole = collate(groups, MicroBatch(ROWS["one row"]), BY_TREE)
    want = gradients(model, step_loss(*concatenated_forward(model, whole)[:2], whole))
    for layout, budget, processes in ((BY_TREE, 60, 2), (PADDED, 1, 4)):
        plans = plan_micro_batches(np.arange(5), groups.costs(layout), layout, budget, processes)
        assert sum(mb.is_dummy for plan in plans for mb in plan) > 0
        batches = [collate(groups, mb, layout) for plan in plans for mb in plan]
        got = gradients(model, sum(step_loss(*concatenated_forward(model, b)[:2], b) for b in batches))
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, atol=2e-4, rtol=1e-4, msg=name)
    dummy = collate(groups, MicroBatch([[2]], is_dummy=True), BY_TREE)
    got = gradients(model, step_loss(*concatenated_forward(model, dummy)[:2], dummy))
    assert all((gradient == 0).all() for gradient in got.values())


def test_eager_attention_takes_the_additive_mask(groups):
    model = RewardModel(tiny_classifier("llama"))
    batch = collate(groups, MicroBatch(ROWS["three rows"]), PACKED)
    expected = score_batch(set_kernel(model, "sdpa"), batch)
    torch.testing.assert_close(score_batch(set_kernel(model, "eager"), batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_run_concatenated(kind, groups):
    classifier = tiny_classifier(kind)
    batch = collate(groups, MicroBatch([[i] for i in range(5)]), PADDED)
    got = score_batch(RewardModel(classifier), batch)
    torch.testing.assert_close(got, plain_rewards(classifier, groups), atol=1e-5, rtol=1e-5)


def test_the_first_of_several_outputs_is_the_reward(groups):
    model = RewardModel(tiny_classifier("llama", num_labels=3))
    batch = collate(groups, MicroBatch(ROWS["one row"]), PACKED)
    outputs_NK = forward_batch(set_kernel(model, "sdpa"), batch)
    assert outputs_NK.shape == (16, 3) and outputs_NK.dtype == torch.float32
    assert torch.equal(score_batch(model, batch), outputs_NK[:, 0])
    chosen_C, rejected_C, _ = concatenated_forward(model, batch)
    assert torch.equal(chosen_C, outputs_NK[batch.chosen_C, 0]) and rejected_C.shape == (10,)


def test_mask_by_hand():
    """Tree 0 is [p p | a | b b], then one padding token; also under a sliding window of 2 positions."""
    trees = [preference_data([[[3, 4, 5], [3, 4, 6, 7]]]).trees([0])[0], preference_data([[[3] * 6]]).trees([0])[0]]
    batch = collate_trees(trees, MicroBatch([[0], [1]]), PACKED)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]

    def mask(kind: str, **options) -> list[list[int]]:
        config = tiny_classifier(kind, attn_implementation="sdpa", **options).config
        mask_L_L = attention_inputs(config, batch, torch.float32)["attention_mask"][0, 0]
        assert mask_L_L.shape == (64, 64) and not mask_L_L[6:, :5].any()  # the row is rounded up
        return mask_L_L[:6, :6].int().tolist()

    assert mask("llama") == expected
    expected[2][0] = expected[3][0] = 0  # position 2 - position 0 = 2 is outside a window of 2
    expected[4][0] = expected[4][1] = 0
    assert mask("mistral", sliding_window=2) == expected


@pytest.mark.parametrize(("block", "shapes"), [
    (128, [(n, n) for n in (9, 17)]),
    (6, [(6, 6), (3, 3), (5, 5), (1, 6), (6, 11), (2, 13), (3, 8)]),
])  # fmt: skip
def test_attention_by_tree_is_float32_and_per_piece(monkeypatch, block, shapes):
    """A prefix attends to itself, an answer to the prefix and itself; small trees are computed as a whole."""
    model, seen = set_kernel(RewardModel(tiny_classifier("llama")), SDPA_BY_TREE), []
    start = list(range(3, 8))
    data = preference_data([[[3] * 6, [4] * 3], [[*start, 9], [*start, *[8] * 8], [*start, *[10] * 3]]])

    def spy(query, key, value, mask, **options):
        seen.append((query.dtype, query.shape[2], key.shape[2]))
        assert mask.shape[2:] == (query.shape[2], key.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **options)

    monkeypatch.setattr("rm.model.attention.scaled_dot_product_attention", spy)
    monkeypatch.setattr("rm.model.attention.BLOCK", block)
    with torch.autocast("cpu", torch.bfloat16):
        score_batch(model, collate(data, MicroBatch([[0, 1]]), BY_TREE))
    assert seen == [(torch.float32, *shape) for shape in shapes] * 2  # two layers


# ---------------------------------------------------------------- which layout


def test_auto_is_shared_prefix_where_it_is_verified(pairs, groups):
    model = set_kernel(RewardModel(tiny_classifier("llama")), SDPA_BY_TREE)
    for data, count in ((pairs, 4), (groups, 4), (random_pairs(1), 1)):
        layout = choose_layout("auto", model, data, PAD)
        assert layout == replace(BY_TREE, reason=f"verified on {count} prompts")
    assert choose_layout("concatenated", model, pairs, PAD) == replace(UNSHARED, reason="verified on 4 prompts")
    assert choose_layout("concatenated", set_kernel(model, "sdpa"), pairs, PAD) == PADDED
    for kind in CAUSAL:
        for kernel in ("sdpa", "eager", SDPA_BY_TREE):
            model = set_kernel(RewardModel(tiny_classifier(kind)), kernel).train()
            assert choose_layout("auto", model, pairs, PAD).name == "shared_prefix"
            assert model.config._attn_implementation == kernel and model.training
            assert all(p.grad is None for p in model.parameters())
    assert choose_layout("auto", model.requires_grad_(False), pairs, PAD).name == "shared_prefix"


def test_a_model_that_does_not_pass_the_pieces_on_gets_dense_masks(pairs, monkeypatch):
    model = set_kernel(RewardModel(tiny_classifier("llama")), SDPA_BY_TREE)
    backbone = unwrapped(model.classifier).base_model
    forward = type(backbone).forward

    def without_pieces(self, input_ids, attention_mask, position_ids=None, use_cache=False, pieces=None):
        return forward(self, input_ids, attention_mask, position_ids, use_cache=use_cache)

    monkeypatch.setattr(type(backbone), "forward", without_pieces)
    layout = choose_layout("auto", model, pairs, PAD)
    assert layout.name == "shared_prefix" and layout.reason.endswith("LlamaAttention gets no pieces of rows")
    assert not layout.by_tree and model.config._attn_implementation == "sdpa"


def sees_other_answers(batch, row, query, key, window=None):
    return (batch.tree_RL[row, query] == batch.tree_RL[row, key]) & (key <= query)


def sees_other_trees(batch, row, query, key, window=None):
    in_branch = (batch.branch_RL[row, key] == 0) | (batch.branch_RL[row, key] == batch.branch_RL[row, query])
    return in_branch & (key <= query)


def misses_the_first_token(batch, row, query, key, window=None):
    is_missed = (batch.branch_RL[row, query] == 2) & (batch.position_RL[row, key] == 0) & (key != query)
    return sees(batch, row, query, key, window) & ~is_missed


def one_position_late(rows, *more):
    batch = _pack(rows, *more)
    return replace(batch, position_RL=batch.position_RL + (batch.branch_RL == 2))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrong", [sees_other_answers, sees_other_trees, misses_the_first_token, one_position_late])
def test_wrong_masks_and_positions_are_noticed(monkeypatch, wrong, autocast):
    """Also with small random weights, where attention is nearly uniform, and under bf16 autocast, which is turned off.

    auto falls back to padded rows; shared_prefix, given by name, is an error.
    """
    monkeypatch.setattr("rm.collate._pack" if wrong is one_position_late else "rm.model.attention.sees", wrong)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "configs" / "tiny_llama", num_labels=1, pad_token_id=PAD)
    classifier = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(classifier.score.weight, std=(config.hidden_size + 1) ** -0.5)
    for kernel in ("sdpa", "eager", SDPA_BY_TREE):
        model = set_kernel(RewardModel(classifier), kernel)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layout = choose_layout("auto", model, random_pairs(40), PAD)
            assert layout.name == "concatenated" and layout.reason.startswith("rewards differ by ")
            with pytest.raises(InputError, match="^layout=shared_prefix: rewards differ by .*; use layout=auto"):
                choose_layout("shared_prefix", model, random_pairs(40), PAD)


WRONG_MASK = """
import rm.model.attention
def sees(batch, row, query, key, window=None):
    return (batch.tree_RL[row, query] == batch.tree_RL[row, key]) & (key <= query)
rm.model.attention.sees = sees
"""


@pytest.mark.parametrize("engine", ["ddp", "fsdp2 in bf16"])
def test_several_processes_notice_a_wrong_mask(zygote, fsdp_zygote, tmp_path, engine):
    """The gradients of the check go through sharded weights, and all processes end."""
    options = ["--dataset_name=toy", *SMALL, "--layout=shared_prefix", "--output_dir=out"]
    options += ["--mixed_precision=bf16"] if "bf16" in engine else []
    start = (zygote if engine == "ddp" else fsdp_zygote).start_many
    runs = start(2, options, tmp_path, fault=WRONG_MASK)
    assert [run.wait() for run in runs] == [2, 2]
    assert "error: layout=shared_prefix: rewards differ by " in runs[0].stderr and "Traceback" not in runs[0].stderr


def test_half_precision_weights_have_a_looser_tolerance(pairs):
    """Their rounding is no difference between the layouts, a wrong mask still is one."""
    model = RewardModel(tiny_classifier("llama").bfloat16())
    batches = [collate(pairs, MicroBatch(rows), layout) for rows, layout in (
        ([list(range(6))], PACKED), ([[i] for i in range(6)], PADDED),
    )]  # fmt: skip
    assert layout_problem(set_kernel(model, "sdpa").eval(), *batches) == ""
    batches[0].branch_RL.fill_(0)
    assert layout_problem(model, *batches).startswith("rewards differ by ")


def test_an_error_of_the_model_is_not_hidden(pairs, monkeypatch):
    model = RewardModel(tiny_classifier("llama"))
    monkeypatch.setattr(model, "forward", lambda **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose_layout("auto", model, pairs, PAD)


@pytest.mark.parametrize(("kind", "kernel", "reason"), [
    ("bert", "eager", "the model is an encoder: every token sees the whole sequence"),
    ("llama", "flash_attention_4", "attn_implementation flash_attention_4 takes no mask for each query"),
])  # fmt: skip
def test_models_that_do_not_support_packed_rows(pairs, kind, kernel, reason):
    model = RewardModel(tiny_classifier(kind))
    model.config._attn_implementation = kernel
    assert choose_layout("auto", model, pairs, PAD) == Layout("concatenated", PAD, reason=reason)
    with pytest.raises(InputError, match=f"^layout=shared_prefix: {reason}; use layout=auto or concatenated$"):
        choose_layout("shared_prefix", model, pairs, PAD)


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("layout", [BY_TREE, UNSHARED, PACKED, PADDED], ids=["by_tree", "unshared", "packed", "padded"])
def test_score_prompts(groups, layout):
    """In the order of the data, whatever the micro-batches; the same bits for trees in memory."""
    classifier = tiny_classifier("qwen3")
    model = set_kernel(RewardModel(classifier), SDPA_BY_TREE if layout.by_tree else "sdpa").train()
    expected = plain_rewards(classifier.eval(), groups).detach().numpy()
    model.train()
    for budget in (1, 40, 1000):
        scored = score_prompts(model, groups, layout, budget)
        assert [(r.dtype, len(r)) for r in scored] == [(np.float64, n) for n in (2, 3, 6, 2, 3)]
        np.testing.assert_allclose(np.concatenate(scored), expected, atol=1e-5)
        trees = TreeList(groups.trees(range(5)))
        assert trees.costs(layout).tolist() == groups.costs(layout).tolist()
        again = score_prompts(model, trees, layout, budget)
        assert np.array_equal(np.concatenate(again), np.concatenate(scored))
    assert model.training and score_prompts(model, TreeList([]), layout, 9) == []


@pytest.mark.parametrize("layout", [BY_TREE, UNSHARED, PACKED, PADDED], ids=["by_tree", "unshared", "packed", "padded"])
def test_score_tokens(groups, layout):
    """The value at a token is the reward of the sequence that ends there; the last one is the reward."""
    model = set_kernel(RewardModel(tiny_classifier("gemma3_text")), SDPA_BY_TREE if layout.by_tree else "sdpa")
    values = score_prompts(model, groups, layout, 100, every_token=True)
    last = []
    for tree, flat in zip(groups.trees(range(5)), values, strict=True):
        ends = np.cumsum(list(map(len, tree.sequences())))
        last += flat[ends - 1].tolist()
        for ids, along in zip(tree.sequences(), np.split(flat, ends[:-1]), strict=True):
            cut = preference_data([[ids[:n].tolist()] for n in range(1, len(ids) + 1)])
            expected = plain_rewards(model.classifier, cut).detach().numpy()
            assert along.dtype == np.float64
            np.testing.assert_allclose(along, expected, atol=1e-5)
    np.testing.assert_allclose(last, np.concatenate(score_prompts(model, groups, layout, 100)), atol=1e-5)
