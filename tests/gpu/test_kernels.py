"""Attention kernels on a GPU: which run, and whether rows of trees equal padded rows in rewards and gradients."""

import numpy as np
import pytest
import torch
from conftest import CAUSAL, PAD, random_pairs, tiny_classifier

from rm.collate import collate
from rm.data.plan import Layout, MicroBatch
from rm.forward import choose_layout, concatenated_forward
from rm.loss import pairwise_loss
from rm.model.attention import SDPA_BY_TREE, VARLEN
from rm.model.reward_model import RewardModel

DATA = random_pairs(12, max_prefix=60, max_suffix=40)
KINDS = [kind for kind in CAUSAL if kind != "opt"]  # whose attention gets float32 masks only
PADDED = Layout("concatenated", PAD)


def model_of(kind: str, kernel: str, device) -> RewardModel:
    heads = {"head_dim": 16} if kind in ("llama", "qwen2", "qwen3", "mistral", "gemma3_text") else {}
    return RewardModel(tiny_classifier(kind, attn_implementation=kernel, **heads)).to(device)


def step(model, layout, device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and the gradient of all weights, float32 on the CPU."""
    rows = [list(range(12))] if layout.by_tree else [[i] for i in range(12)]
    batch = collate(DATA, MicroBatch(rows), layout).to(device)
    model.zero_grad()
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        chosen_C, rejected_C, rewards_N = concatenated_forward(model, batch)
    pairwise_loss(chosen_C, rejected_C).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return rewards_N.detach().cpu(), torch.cat(gradients).float().cpu()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_trees_equal_padded_rows(gpu, kind, kernel, dtype):
    """In half precision the error against float32 is at most three times that of padded rows, or 1% of the largest."""
    exact = step(model_of(kind, "eager", gpu), PADDED, gpu, None)
    padded = step(model_of(kind, "sdpa", gpu), PADDED, gpu, dtype)
    for name in ("shared_prefix", "concatenated"):
        if kernel != VARLEN and name == "concatenated":
            continue
        found = step(model_of(kind, kernel, gpu), Layout(name, PAD, by_tree=kernel == VARLEN), gpu, dtype)
        for true, other, value in zip(exact, padded, found, strict=True):
            allowed = 1e-4 if dtype is None else 0.01
            bound = 3 * (other - true).norm() + allowed * true.norm()
            assert (value - true).norm() <= bound, f"{(value - true).norm()} > {bound} of {true.norm()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_up_check_accepts_varlen_attn(cuda, kind, dtype):
    """It compares causal alignment, windows, grouped-query attention and gradients with float64."""
    model = model_of(kind, VARLEN, cuda)
    for name in ("auto", "concatenated"):
        with torch.autocast("cuda", dtype):
            layout = choose_layout(name, model, DATA, PAD)
        assert layout.by_tree and layout.reason == "verified on 4 prompts", layout.reason
    layout = choose_layout("auto", model, DATA, PAD)  # float32
    assert not layout.by_tree and layout.reason.endswith("varlen_by_tree needs half precision on CUDA")


def test_which_kernels_are_selected(cuda):
    """varlen_attn is FlashAttention; sdpa with a mask is not. Prints the names."""
    from torch.profiler import ProfilerActivity, profile

    for kernel in (VARLEN, "sdpa"):
        model, layout = model_of("llama", kernel, cuda), Layout("shared_prefix", PAD, by_tree=kernel == VARLEN)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
            step(model, layout, cuda, torch.bfloat16)
        names = {event.key for event in record.key_averages()}
        print(kernel, sorted(name for name in names if any(w in name.lower() for w in ("flash", "fmha", "attention"))))
        assert any("flash" in name.lower() for name in names) is (kernel == VARLEN)


@pytest.mark.parametrize("kernel", [VARLEN, "sdpa", "eager", SDPA_BY_TREE])
def test_micro_batches_do_not_wait_for_the_device(gpu, kernel):
    """The loop of train_rm.py over micro-batches: a synchronization raises."""
    from accelerate import Accelerator

    from rm.train.state import Meter

    accelerator = Accelerator(mixed_precision="bf16", cpu=gpu.type == "cpu")
    model = accelerator.prepare(model_of("llama", kernel, gpu).train())
    layout = Layout("shared_prefix", PAD, by_tree=kernel in (VARLEN, SDPA_BY_TREE))
    meter = Meter(accelerator)

    def micro_batch(i: int) -> None:
        rows = [[3 * i, 3 * i + 1, 3 * i + 2]] if layout.by_tree else [[3 * i + j] for j in range(3)]
        batch = collate(DATA, MicroBatch(rows), layout).to(accelerator.device)
        chosen_C, rejected_C, _ = concatenated_forward(model, batch)
        loss_C = batch.weight_C * pairwise_loss(chosen_C, rejected_C, batch.margin_C, batch.p_chosen_C)
        accelerator.backward((loss_C * batch.share_C).sum() / 12)
        meter.update(loss_C, chosen_C, rejected_C, batch)

    meter.begin_step()
    micro_batch(0)  # first calls may allocate and wait
    if gpu.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 4):
            micro_batch(i)
    finally:
        if gpu.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(float(meter.sums.sum()))
