"""Which token sees which in rows of trees: one rule, as a dense mask, as FlexAttention's blocks, or tree by tree.

Shape suffixes: R rows, L tokens in a row, T tokens in a tree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm.collate import Batch

SDPA_BY_TREE = "sdpa_by_tree"  # a name for `attn_implementation`, beside transformers' own


def shared_prefix_rule(
    tree_RL: Tensor, branch_RL: Tensor, position_RL: Tensor, window: int | None = None
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Which key each query sees, as FlexAttention's `mask_mod(row, head, query, key)`: bool, for index tensors.

    Query i sees key j iff they are of the same tree, j <= i in the row, and j is in the prefix or in i's own branch;
    under a sliding window also position i - position j < window. Padding (tree -1) sees padding before it.
    """

    def sees(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        seen = (tree_RL[row, query] == tree_RL[row, key]) & (key <= query)
        seen = seen & ((branch_RL[row, key] == 0) | (branch_RL[row, key] == branch_RL[row, query]))
        if window is not None:
            seen = seen & (position_RL[row, query] - position_RL[row, key] < window)
        return seen

    return sees


def dense_mask(rule: Callable, num_rows: int, length: int, device: torch.device) -> Tensor:
    """The rule for every query and key, bool [R, 1, L, L]."""
    row, index = torch.arange(num_rows, device=device), torch.arange(length, device=device)
    return rule(row[:, None, None], None, index[None, :, None], index[None, None, :])[:, None]


def tree_masks(rule: Callable, tree_lengths: list[int], device: torch.device) -> Tensor:
    """The additive masks [T, T] of a row's trees one after the other, float32 [1, 1, 1, sum of T x T]."""
    row, start, masks = torch.zeros((), dtype=torch.long, device=device), 0, []
    for length in tree_lengths:
        index = torch.arange(start, start + length, device=device)
        masks.append(rule(row, None, index[:, None], index[None, :]).flatten())
        start += length
    return additive(torch.cat(masks)[None, None, None], torch.float32)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, the lowest number of `dtype` elsewhere: to be added to attention scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def attend_by_tree(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_lengths: list[int] | None = None,
    **options,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, once for each tree of the row `tree_lengths`, so that nothing between trees is computed.

    `attention_mask` is then that of `tree_masks`; without `tree_lengths` this is `sdpa`. In float32 also under bf16:
    on a CPU the kernel's backward pass takes 1.8 times as long in bf16.
    """
    if tree_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(states.float().split(tree_lengths, dim=2) for states in (query, key, value)), strict=True)
    masks = attention_mask.split([length * length for length in tree_lengths], dim=3)
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        for length, mask, (q, k, v) in zip(tree_lengths, masks, parts, strict=True):
            outputs.append(sdpa_attention_forward(module, q, k, v, mask.view(1, 1, length, length), **options)[0])
    return torch.cat(outputs, dim=1).to(query.dtype), None


# compiled layers call it as it is: its loop differs from batch to batch
AttentionInterface.register(SDPA_BY_TREE, torch.compiler.disable(attend_by_tree))
AttentionMaskInterface.register(SDPA_BY_TREE, sdpa_mask)  # for rows that are no trees


def block_size(model: nn.Module) -> int | None:
    """Tokens in a block of the mask that the model's attention kernel skips if it is empty, so that long rows cost no
    more than short ones; None for a kernel that computes the whole square of a row."""
    kernel = getattr(model, "module", model).config._attn_implementation
    return {"flex_attention": 128, SDPA_BY_TREE: 1}.get(kernel)


def attention_mask(
    config: PreTrainedConfig, batch: Batch, dtype: torch.dtype
) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """The mask that a model with `config` takes for `batch`: one, or one per layer type.

    Dense (`sdpa`: bool, `eager`: additive), blocks (`flex_attention`), or the trees' own (`sdpa_by_tree`). Raises
    ValueError if the model has layers or an attention kernel that such a mask cannot steer.
    """
    if not batch.is_packed:
        return batch.attention_mask_RL
    text, kernel = config.get_text_config(), config._attn_implementation
    if kernel not in ("sdpa", "eager", "flex_attention", SDPA_BY_TREE):
        raise ValueError(f"attn_implementation {kernel} takes no mask for each query")
    (num_rows, length), device = batch.input_ids_RL.shape, batch.input_ids_RL.device

    def mask(window: int | None) -> Tensor | BlockMask:
        rule = shared_prefix_rule(batch.tree_RL, batch.branch_RL, batch.position_RL, window)
        if kernel == "flex_attention":
            return create_block_mask(rule, num_rows, None, length, length, device, _compile=device.type == "cuda")
        if kernel == SDPA_BY_TREE and batch.tree_lengths:
            return tree_masks(rule, batch.tree_lengths, device)
        seen = dense_mask(rule, num_rows, length, device)
        return additive(seen, dtype) if kernel == "eager" else seen

    window = getattr(text, "sliding_window", None)
    layer_types = set(getattr(text, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} take no attention mask")
    if not layer_types:  # one kind of layer; `sliding_window`, if any, holds for all of them
        return mask(window if getattr(text, "use_sliding_window", True) else None)
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in layer_types}
    return masks if len(masks) > 1 else masks.popitem()[1]
