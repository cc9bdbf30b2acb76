"""The forward pass: rewards of all answers of a batch, and the concatenated chosen+rejected forward pass.

Shape suffixes: N answers, C comparisons, K outputs of the head, R rows, L tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn

from rm.collate import Batch, collate_trees
from rm.config.errors import InputError
from rm.data.plan import Layout, MicroBatch
from rm.model.attention import BY_TREE, attention_inputs, kernel_problem, packing_problem
from rm.model.reward_model import unwrapped

NUM_VERIFIED = 4  # prompts on which the layout is verified


def score_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Rewards of all answers, float32 [N], prompt by prompt: the first output of the head.

    `model`: a `RewardModel`, prepared or not.
    """
    return forward_batch(model, batch)[:, 0]


def forward_batch(model: nn.Module, batch: Batch) -> Tensor:
    """All outputs of the head at the end of every sequence, float32 [N, K]."""
    reward_model = unwrapped(model)
    inputs = attention_inputs(reward_model.config, batch, unwrapped(reward_model.classifier).dtype)
    return model(input_ids=batch.input_ids_RL, end_row=batch.end_row_N, end_index=batch.end_index_N, **inputs)


def concatenated_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of all comparisons from one forward pass, (chosen_C, rejected_C), and of all answers, rewards_N; float32.

    The rows hold all sequences (`concatenated`), or trees in which the prompt is computed once and each answer once
    (`shared_prefix`). Both give the same rewards and the same gradients.
    """
    rewards_N = score_batch(model, batch)
    return rewards_N[batch.chosen_C], rewards_N[batch.rejected_C], rewards_N


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Remove the autocast that Accelerate adds to `forward`: its rounding would hide or imitate a difference.

    Half-precision weights and the casts of FSDP or DeepSpeed stay as they are.
    """
    reward_model = unwrapped(model)
    forward = reward_model.forward
    reward_model.forward = getattr(reward_model, "_original_forward", forward)
    try:
        yield
    finally:
        reward_model.forward = forward


# ---------------------------------------------------------------- which layout
@torch.compiler.set_stance("force_eager")  # a result for the layers is valid for compiled layers too
def choose_layout(name: str, model: nn.Module, data: Any, pad_token_id: int) -> Layout:
    """The layout for `model`: "auto" is `shared_prefix` where a model supports it. Collective.

    Verified on a few short prompts of `data` (with `costs(layout)` and `trees(indices)`): the kernel, otherwise dense
    masks replace it (`kernel_problem`); and that rows of trees equal padded rows (`layout_problem`). `name` is the
    option `layout`. Raises `InputError` if it is "shared_prefix" and the model does not support that.
    """
    padded = Layout("concatenated", pad_token_id)
    packed = Layout("shared_prefix" if name == "auto" else name, pad_token_id, by_tree=True)
    classifier = unwrapped(unwrapped(model).classifier)
    dense, kernel = "sdpa" if classifier._supports_sdpa else "eager", classifier.config._attn_implementation
    problem = packing_problem(model)
    if not problem:
        order = np.argsort(data.costs(packed), kind="stable")
        indices = order[len(order) // 100 :][:NUM_VERIFIED].tolist()  # short ones: their activations are stored
        trees, device = data.trees(indices), next(model.parameters()).device
        row = collate_trees(trees, MicroBatch([indices]), packed).to(device)
        was_training, precision = model.training, torch.backends.fp32_precision
        model.eval()
        torch.backends.fp32_precision = "ieee"  # not TF32
        wrong = ""
        if kernel in BY_TREE:
            wrong = kernel_problem(classifier, lambda: score_batch(model, row), row)  # collective
        if is_verified := kernel in BY_TREE or name != "concatenated":
            rows = collate_trees(trees, MicroBatch([[i] for i in indices]), padded).to(device)
            classifier.set_attn_implementation(dense)
            problem = layout_problem(model, row, rows)  # collective
        if dist.is_initialized():  # all or none
            found = zip(*gather_object([(wrong, problem)]), strict=True)  # collective
            wrong, problem = (next(filter(None, each), "") for each in found)
        kernel, note = (dense, f"; dense masks: {wrong}") if wrong else (kernel, "")
        reason = f"verified on {len(indices)} prompts" if is_verified else packed.reason
        packed = replace(packed, by_tree=kernel in BY_TREE, reason=reason + note)
        classifier.set_attn_implementation(kernel)
        model.train(was_training)
        torch.backends.fp32_precision = precision
    if not problem:
        return packed
    if name == "shared_prefix":
        raise InputError(f"layout=shared_prefix: {problem}; use layout=auto or concatenated")
    return padded if name == "concatenated" else replace(padded, reason=problem)


def layout_problem(model: nn.Module, packed: Batch, padded: Batch) -> str:
    """How rewards or gradients differ between two batches of the same prompts; empty: they agree. Collective.

    The gradient is that of one factor for each number of an embedding: a sum over all tokens, however often a layout
    has them, through all layers. It leaves the gradients of weights, and their engine, alone. They agree to 1e-3 of the
    spread or norm (at least 0.1). Weights or engine in half precision: rewards to 5e-2 of the largest (at least 1),
    gradients to 0.2 of the norm.
    """
    found, dtypes = [], {p.dtype for p in model.parameters()}
    table = unwrapped(unwrapped(model).classifier).get_input_embeddings()
    for batch in (packed, padded):
        factor_D = torch.ones(table.embedding_dim, device=batch.input_ids_RL.device, requires_grad=True)

        def scale(module, inputs, output, factor_D=factor_D):
            dtypes.add(output.dtype)
            return output * factor_D.to(output.dtype)

        handle = table.register_forward_hook(scale)
        with torch.enable_grad(), without_autocast(model), torch.autocast(factor_D.device.type, enabled=False):
            rewards_N = score_batch(getattr(model, "module", model), batch)  # DDP would expect a backward pass
            weighted = rewards_N @ torch.linspace(1, 2, len(rewards_N), device=rewards_N.device)
            weighted = weighted + 0 * factor_D.sum()  # if all weights are frozen, the gradient is zero
            (gradient_D,) = torch.autograd.grad(weighted, factor_D, allow_unused=True, materialize_grads=True)
        handle.remove()
        found.append((rewards_N.detach(), gradient_D))
    (rewards_N, gradient_D), (expected_N, expected_D) = found
    largest, spread, norm = expected_N.abs().max().item(), expected_N.std(correction=0).item(), expected_D.norm().item()
    reward, gradient = (rewards_N - expected_N).abs().max().item(), (gradient_D - expected_D).norm().item()
    allowed = 1e-3 * max(spread, 0.1), 1e-3 * max(norm, 0.1)
    if dtypes != {torch.float32}:
        allowed = 5e-2 * max(largest, 1), 0.2 * norm
    if reward <= allowed[0] and gradient <= allowed[1]:  # false for NaN
        return ""
    return f"rewards differ by {reward:.2g} between the layouts, gradients by {gradient:.2g} of {norm:.2g}"
