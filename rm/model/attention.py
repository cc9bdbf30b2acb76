"""Which token sees which in rows of trees: one rule, as a dense mask or piece by piece.

Shape suffixes: R rows, L tokens in a row.
"""

import inspect
import itertools

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm.collate import Batch
from rm.config.errors import InputError
from rm.model.reward_model import unwrapped

SDPA_BY_TREE = "sdpa_by_tree"  # a name for `attn_implementation`, beside transformers' own
SMALL_TREE = 128  # tokens of a tree whose masked square is faster than a call for each piece
Piece = tuple[int, int, int, int]  # start and length of queries, start and length of the prefix that they see too


def attention_pieces(tree_parts: list[list[int]]) -> list[Piece]:
    """The pieces of a row: each prefix and each answer of its trees, or a small tree as a whole.

    An answer sees its prefix and no other answer, so the squares between answers are not computed. `tree_parts`: for
    each tree the tokens of its prefix and of its answers.
    """
    pieces, start = [], 0
    for prefix, *answers in tree_parts:
        total = prefix + sum(answers)
        if total <= SMALL_TREE:
            pieces.append((start, total, start, 0))
        else:
            pieces += [(start, prefix, start, 0)] if prefix else []
            starts = itertools.accumulate(answers[:-1], initial=start + prefix)
            pieces += [(first, length, start, prefix) for first, length in zip(starts, answers, strict=True)]
        start += total
    return pieces


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

    Padded rows: 0/1 [R, L]. Packed rows: bool (`sdpa`) or additive (`eager`) [R, 1, L, L], or the additive masks of all
    pieces (`sdpa_by_tree`), float32 [1, 1, 1, sum of queries x keys].
    """
    if not batch.is_packed:
        return batch.attention_mask_RL
    text, kernel = config.get_text_config(), config._attn_implementation
    (num_rows, length), device = batch.input_ids_RL.shape, batch.input_ids_RL.device
    row, index = torch.arange(num_rows, device=device), torch.arange(length, device=device)

    def mask(window: int | None) -> Tensor:
        if by_tree := kernel == SDPA_BY_TREE and batch.tree_parts is not None:
            parts = []
            for start, size, prefix_start, prefix_size in attention_pieces(batch.tree_parts):
                queries = index[start : start + size]
                keys = torch.cat([index[prefix_start : prefix_start + prefix_size], queries])
                parts.append(sees(batch, row, queries[:, None], keys, window).flatten())
            seen = torch.cat(parts)[None, None, None]
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


def attend_by_tree(module, query, key, value, attention_mask, pieces: list[Piece] | None = None, **options):
    """transformers' `sdpa` for each piece of the only row (`attention_pieces`); without `pieces` this is `sdpa`.

    Computes in float32 also under bf16: on CPUs the backward pass of the kernel is slower in bf16. Raises `InputError`
    for a model that does not pass the pieces on.
    """
    sizes = [size * (prefix_size + size) for _, size, _, prefix_size in pieces or ()]
    if attention_mask is not None and attention_mask.shape[3] != (key.shape[2] if pieces is None else sum(sizes)):
        raise InputError(f"{type(module).__name__} gets no pieces of rows (attn_implementation=sdpa needs none)")
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    outputs, (query_row, *rows) = [], [states.float() for states in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        for piece, mask in zip(pieces, attention_mask.split(sizes, dim=3), strict=True):
            start, size, prefix_start, prefix_size = piece
            own = [row.narrow(2, start, size) for row in rows]
            if prefix_size:
                own = [
                    torch.cat([row.narrow(2, prefix_start, prefix_size), part], 2)
                    for row, part in zip(rows, own, strict=True)
                ]
            mask = mask.view(1, 1, size, prefix_size + size).to(query_row.dtype)  # FSDP casts it to half precision
            outputs.append(sdpa_attention_forward(module, query_row.narrow(2, start, size), *own, mask, **options)[0])
    return torch.cat(outputs, dim=1).to(query.dtype), None


# not compiled: the loop differs from batch to batch
AttentionInterface.register(SDPA_BY_TREE, torch.compiler.disable(attend_by_tree))
AttentionMaskInterface.register(SDPA_BY_TREE, sdpa_mask)  # for rows without trees


def use_cpu_kernel(model: PreTrainedModel, chosen: str | None) -> None:
    """Without an accelerator, replace `sdpa` by `sdpa_by_tree`, unless the user has `chosen` a kernel."""
    if not torch.accelerator.is_available() and model.config._attn_implementation == "sdpa" and chosen is None:
        model.set_attn_implementation(SDPA_BY_TREE)
