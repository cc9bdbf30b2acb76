"""Which token sees which in rows of trees: one rule, as a dense mask or tree by tree.

Shape suffixes: R rows, L tokens in a row, T tokens in a tree.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm.collate import Batch
from rm.config.errors import InputError
from rm.model.reward_model import unwrapped

SDPA_BY_TREE = "sdpa_by_tree"  # a name for `attn_implementation`, beside transformers' own


def sees(batch: Batch, row: Tensor, query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """Whether tokens `query` see tokens `key` (indices into the rows `row`, which broadcast): bool.

    Query i sees key j iff both are in the same tree, j <= i in the row, and j is in the prefix or in the branch of i;
    under a sliding window also position i - position j < window. Padding (tree -1) sees padding before it.
    """
    tree_RL, branch_RL, position_RL = batch.tree_RL, batch.branch_RL, batch.position_RL
    seen = (tree_RL[row, query] == tree_RL[row, key]) & (key <= query)
    seen = seen & ((branch_RL[row, key] == 0) | (branch_RL[row, key] == branch_RL[row, query]))
    return seen if window is None else seen & (position_RL[row, query] - position_RL[row, key] < window)


def attention_mask(config: PreTrainedConfig, batch: Batch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The mask of `batch` for a model with `config` and weights of `dtype`: one tensor, or one per layer type.

    Padded rows: 0/1 [R, L]. Packed rows: bool (`sdpa`) or additive (`eager`) [R, 1, L, L], or the additive masks [T, T]
    of all trees (`sdpa_by_tree`), float32 [1, 1, 1, sum of T x T].
    """
    if not batch.is_packed:
        return batch.attention_mask_RL
    text, kernel = config.get_text_config(), config._attn_implementation
    (num_rows, length), device = batch.input_ids_RL.shape, batch.input_ids_RL.device
    row, index = torch.arange(num_rows, device=device), torch.arange(length, device=device)

    def mask(window: int | None) -> Tensor:
        if by_tree := kernel == SDPA_BY_TREE and batch.tree_lengths is not None:
            trees = [sees(batch, row, tree[:, None], tree, window) for tree in index.split(batch.tree_lengths)]
            seen = torch.cat([seen.flatten() for seen in trees])[None, None, None]
        else:
            seen = sees(batch, row[:, None, None, None], index[:, None], index, window)
        if not by_tree and kernel != "eager":
            return seen
        additive = torch.zeros_like(seen, dtype=torch.float32 if by_tree else dtype)
        return additive.masked_fill_(~seen, torch.finfo(additive.dtype).min)

    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])  # without types it is for all layers
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]


def packing_problem(model: nn.Module) -> str:
    """Why a model does not support packed rows; empty: it may."""
    reward_model = unwrapped(model)
    config, backbone = reward_model.config, unwrapped(reward_model.classifier).base_model
    kernel, kinds = config._attn_implementation, getattr(config.get_text_config(), "layer_types", None) or ()
    if not reward_model.is_causal:
        return "the model is an encoder: every token sees the whole sequence"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(backbone).__name__} takes no position_ids"
    if kernel not in ("sdpa", "eager", SDPA_BY_TREE):
        return f"attn_implementation {kernel} takes no mask for each query"
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    return f"layers of type {', '.join(sorted(unknown))} take no attention mask" if unknown else ""


def attend_by_tree(module, query, key, value, attention_mask, tree_lengths: list[int] | None = None, **options):
    """transformers' `sdpa` for each tree of the only row: attention between trees is not computed.

    Without `tree_lengths` this is `sdpa`. Computes in float32 also under bf16: on CPUs the backward pass of the kernel
    takes 1.8 times as long in bf16. Raises `InputError` for a model that does not pass the trees on.
    """
    num_keys = key.shape[2] if tree_lengths is None else sum(length * length for length in tree_lengths)
    if attention_mask is not None and attention_mask.shape[3] != num_keys:
        raise InputError(f"{type(module).__name__} gets no tree_lengths (attn_implementation=sdpa needs none)")
    if tree_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(states.float().split(tree_lengths, dim=2) for states in (query, key, value)), strict=True)
    masks = attention_mask.split([length * length for length in tree_lengths], dim=3)
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        for length, mask, (q, k, v) in zip(tree_lengths, masks, parts, strict=True):
            outputs.append(sdpa_attention_forward(module, q, k, v, mask.view(1, 1, length, length), **options)[0])
    return torch.cat(outputs, dim=1).to(query.dtype), None


# not compiled: the loop differs from batch to batch
AttentionInterface.register(SDPA_BY_TREE, torch.compiler.disable(attend_by_tree))
AttentionMaskInterface.register(SDPA_BY_TREE, sdpa_mask)  # for rows without trees


def use_cpu_kernel(model: PreTrainedModel, chosen: str | None) -> None:
    """Without an accelerator, replace `sdpa` by `sdpa_by_tree`, unless the user has `chosen` a kernel."""
    if not torch.accelerator.is_available() and model.config._attn_implementation == "sdpa" and chosen is None:
        model.set_attn_implementation(SDPA_BY_TREE)
