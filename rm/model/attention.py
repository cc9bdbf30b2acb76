"""Which token sees which in rows of trees: one rule, as a dense mask or piece by piece.

Kernels (names for `attn_implementation`): `sdpa` and `eager` take dense masks. `sdpa_by_tree` (CPU) and
`varlen_by_tree` (CUDA, half precision) compute the pieces of one row: no squares between answers, no padding.

Shape suffixes: R rows, L tokens in a row; T tokens, H heads, D numbers per head.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm.collate import Batch
from rm.config.errors import InputError
from rm.model.reward_model import unwrapped

BY_TREE = SDPA_BY_TREE, VARLEN = "sdpa_by_tree", "varlen_by_tree"  # beside transformers' own names
FLASH = ("flash_attention_2", "flash_attention_3")  # requests for attention without masks
BLOCK = 128  # tokens of the pieces for `sdpa`: shorter ones compute fewer masked squares, in more calls
Piece = tuple[int, list[int]]  # its tokens, and the pieces whose keys it sees: before it in the sequence, itself last


def attention_pieces(tree_parts: list[list[int]], block: int = 0) -> list[Piece]:
    """The pieces of a row in order: each prefix and each answer of its trees.

    An answer sees its prefix and no other answer, so the squares between answers are not computed. `tree_parts`: for
    each tree the tokens of its prefix and of its answers. With `block` a piece has at most so many tokens: longer parts
    are cut, which leaves out squares after the queries too, and a tree that fits is one piece.
    """
    pieces: list[Piece] = []
    for prefix, *answers in tree_parts:
        total, shared = prefix + sum(answers), []
        for n, length in enumerate([total] if total <= block else [prefix, *answers]):
            seen, step = shared, block or max(length, 1)
            for done in range(0, length, step):
                seen = [*seen, len(pieces)]
                pieces.append((min(step, length - done), seen))
            shared = shared if n else seen
    return pieces


def piece_keys(pieces: list[Piece]) -> list[Tensor]:
    """For each piece the tokens whose keys it reads, int64; the last ones are its own."""
    sizes = [size for size, _ in pieces]
    token_T = torch.arange(sum(sizes)).split(sizes)
    return [torch.cat([token_T[i] for i in seen]) for _, seen in pieces]


def varlen_arguments(pieces: list[Piece], device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """All keys, int64; boundaries of pieces among queries and among keys, int32 [pieces + 1]; the longest of both."""
    keys = piece_keys(pieces)
    sizes = torch.tensor([(0, 0), *((size, len(key_T)) for (size, _), key_T in zip(pieces, keys, strict=True))])
    bounds = sizes.cumsum(0).T.to(torch.int32).contiguous().to(device, non_blocking=True)
    return torch.cat(keys).to(device, non_blocking=True), *bounds, *sizes.amax(0).tolist()


def sees(batch: Batch, row: Tensor, query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """Whether tokens `query` see tokens `key` (indices into the rows `row`, which broadcast): bool.

    Query i sees key j iff both are in the same tree, j <= i in the row, and j is in the prefix or in the branch of i;
    under a sliding window also position i - position j < window. Padding (tree -1) sees padding before it.
    """
    tree_RL, branch_RL, position_RL = batch.tree_RL, batch.branch_RL, batch.position_RL
    seen = (tree_RL[row, query] == tree_RL[row, key]) & (key <= query)
    seen = seen & ((branch_RL[row, key] == 0) | (branch_RL[row, key] == branch_RL[row, query]))
    return seen if window is None else seen & (position_RL[row, query] - position_RL[row, key] < window)


def dense_mask(batch: Batch, window: int | None = None) -> Tensor:
    """What every token of packed rows sees, bool [R, 1, L, L]."""
    row, index = (torch.arange(size, device=batch.input_ids_RL.device) for size in batch.input_ids_RL.shape)
    return sees(batch, row[:, None, None, None], index[:, None], index, window)


def attention_inputs(config: PreTrainedConfig, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    """Positions and masks of `batch` for a model with `config` and weights of `dtype`.

    Padded rows: attention_mask, 0/1 [R, L]. Packed rows, one mask or one per layer type: bool (`sdpa`) or additive
    (`eager`) [R, 1, L, L]. One row by tree: additive masks of all pieces, [1, 1, 1, sum of queries x keys], or empty.
    """
    if not batch.is_packed:
        return {"attention_mask": batch.attention_mask_RL}
    text, kernel, device = config.get_text_config(), config._attn_implementation, batch.input_ids_RL.device
    inputs: dict[str, Any] = {"position_ids": batch.position_RL}
    if by_tree := kernel in BY_TREE and batch.tree_parts is not None:
        inputs["pieces"] = attention_pieces(batch.tree_parts, 0 if kernel == VARLEN else BLOCK)
        inputs |= {"varlen": varlen_arguments(inputs["pieces"], device)} if kernel == VARLEN else {}

    def mask(window: int | None) -> Tensor:
        if "varlen" in inputs:
            return torch.empty(1, 1, 1, 0, device=device)
        if by_tree:
            row, parts = torch.zeros(1, dtype=torch.long, device=device), []
            for keys, (size, _) in zip(piece_keys(inputs["pieces"]), inputs["pieces"], strict=True):
                parts.append(sees(batch, row, keys[-size:, None].to(device), keys.to(device), window).flatten())
        seen = torch.cat(parts)[None, None, None] if by_tree else dense_mask(batch, window)
        if not by_tree and kernel != "eager":
            return seen
        additive = torch.zeros_like(seen, dtype=torch.float32 if by_tree else dtype)
        return additive.masked_fill_(~seen, torch.finfo(additive.dtype).min)

    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])  # without types it is for all layers
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return inputs | {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1]}


def packing_problem(model: nn.Module) -> str:
    """Why a model does not support packed rows; empty: it may."""
    reward_model = unwrapped(model)
    config, backbone = reward_model.config, unwrapped(reward_model.classifier).base_model
    kernel, kinds = config._attn_implementation, getattr(config.get_text_config(), "layer_types", None) or ()
    if not reward_model.is_causal:
        return "the model is an encoder: every token sees the whole sequence"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(backbone).__name__} takes no position_ids"
    if kernel not in ("sdpa", "eager", *BY_TREE):
        return f"attn_implementation {kernel} takes no mask for each query"
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    return f"layers of type {', '.join(sorted(unknown))} take no attention mask" if unknown else ""


# ---------------------------------------------------------------- the kernels
def attend_by_tree(module, query, key, value, attention_mask, pieces=None, varlen=None, **options):
    """Attention of the only row piece by piece; without `pieces` transformers' `sdpa`. Accepts any mix of dtypes.

    `varlen_attn` where it runs. Otherwise `sdpa` for each piece, in float32 also under bf16: on CPUs the backward pass
    of the kernel is slower in bf16. Raises `InputError` for a model that does not pass the pieces on.
    """
    sizes = [size for size, _ in pieces or ()]
    areas = [size * sum(sizes[i] for i in seen) for size, seen in pieces or ()]
    if attention_mask is not None and attention_mask.shape[3] not in ({0, sum(areas)} if pieces else {key.shape[2]}):
        raise InputError(f"{type(module).__name__} gets no pieces of rows")
    query, key = query.to(value.dtype), key.to(value.dtype)
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if varlen is not None and runs_varlen(value):
        return attend_varlen(query, key, value, *varlen, **options)
    masks = attention_mask.float().split(areas, dim=3) if attention_mask.shape[3] else [None] * len(sizes)
    window = options.get("sliding_window") or query.shape[2]  # for pieces without masks
    # `enable_gqa`: for a mask, transformers would copy keys and values for every query head
    options = {"scale": options.get("scaling"), "dropout_p": options.get("dropout", 0.0), "enable_gqa": True}
    outputs, (queries, *rows) = [], [states.float().split(sizes, dim=2) for states in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        for (size, seen), mask, own in zip(pieces, masks, queries, strict=True):
            keys, values = (torch.cat([parts[i] for i in seen], dim=2) for parts in rows)
            if mask is None:
                mask = torch.ones(size, keys.shape[2], dtype=torch.bool, device=query.device)
                before = keys.shape[2] - size
                mask = mask.tril(before).triu(before - window + 1)
            mask = mask.view(1, 1, size, keys.shape[2])
            outputs.append(scaled_dot_product_attention(own, keys, values, mask, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), None


def runs_varlen(value: Tensor) -> bool:
    """Half precision on CUDA. A run may also compute in float32, since code turns autocast off."""
    return value.is_cuda and value.dtype in (torch.float16, torch.bfloat16)


def attend_varlen(query, key, value, key_T, *sizes, scaling=None, sliding_window=None, dropout=0.0, **options):
    """One call of `varlen_attn` for all pieces, causal with bottom-right alignment: [1, H, T, D] to [1, T, H, D].
    Raises `InputError` for what it does not have."""
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    unsupported += ["dropout: set disable_dropout=true"] if dropout else []
    if unsupported or (size := query.shape[3]) != value.shape[3] or size % 8 or size > 256:
        raise InputError(f"{VARLEN} has no {', '.join(unsupported) or f'heads of {size} numbers'}")
    query_THD, key_THD, value_THD = (states[0].transpose(0, 1) for states in (query, key, value))
    key_THD, value_THD = (states.index_select(0, key_T) for states in (key_THD, value_THD))
    options = {"scale": scaling, "window_size": (sliding_window - 1 if sliding_window else -1, 0), "enable_gqa": True}
    return varlen_attn(query_THD, key_THD, value_THD, *sizes, **options)[None], None


for name in BY_TREE:  # not compiled: the loop differs from batch to batch
    AttentionInterface.register(name, torch.compiler.disable(attend_by_tree))
    AttentionMaskInterface.register(name, sdpa_mask)  # for rows without trees


def use_tree_kernel(model: PreTrainedModel, chosen: str | None) -> None:
    """Use a kernel by tree. On a CPU: `sdpa_by_tree` in place of `sdpa`, if no kernel or one of `FLASH` was `chosen`.
    On CUDA: `varlen_by_tree`, if one of `FLASH` was chosen."""
    if not torch.accelerator.is_available():
        if model.config._attn_implementation == "sdpa" and chosen in (None, *FLASH):
            model.set_attn_implementation(SDPA_BY_TREE)
    elif chosen in FLASH and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        model.set_attn_implementation(VARLEN)


def kernel_problem(model: PreTrainedModel, run: Callable[[], Any], batch: Batch) -> str:
    """Why the kernel of the model, one of `BY_TREE`, must not compute the row `batch`; empty: it may. Collective.

    `run` passes the batch through the model; queries, keys and values of one layer per sliding window are recorded. On
    them, output and gradients (worst token) must be as close to float64 as twice the error of `sdpa` in that dtype.
    """
    kernel, calls = model.config._attn_implementation, {}

    def record(module, query, key, value, mask, **options):  # computes nothing that could fail in a collective
        calls.setdefault(options.get("sliding_window"), (module, (query, key, value), mask, options))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    def results(attend: Callable, dtype: torch.dtype, module, states, mask, options) -> list[Tensor]:
        leaves = [state.detach().to(dtype).requires_grad_() for state in states]
        with torch.enable_grad(), torch.autocast(mask.device.type, enabled=False):
            output = attend(module, *leaves, mask, **options)[0]
            gradients = torch.autograd.grad(output, leaves, output.detach())
        return [output.detach(), *(gradient.transpose(1, 2) for gradient in gradients)]

    AttentionInterface.register(kernel, record)
    try:
        with torch.no_grad():  # DDP would expect a backward pass
            run()
    finally:
        AttentionInterface.register(kernel, torch.compiler.disable(attend_by_tree))
    for window, (module, states, mask, options) in calls.items():
        if kernel == VARLEN and not runs_varlen(states[2]):
            return f"{VARLEN} needs half precision on CUDA"
        if kernel == VARLEN:  # the rows are short
            window = options["sliding_window"] = window and min(window, 8)
        dtype, dense = states[2].dtype, (module, states, dense_mask(batch, window), options)
        try:
            found = results(attend_by_tree, dtype, module, states, mask, options)
        except InputError as error:
            return str(error)
        exact, plain = (results(sdpa_attention_forward, each, *dense) for each in (torch.float64, dtype))
        for true, *both in zip(exact, found, plain, strict=True):
            error, allowed = ((tensor - true).flatten(2).norm(dim=2).amax().item() for tensor in both)
            if not error <= 2 * allowed + 1e-6 * true.flatten(2).norm(dim=2).amax().item():
                return f"{kernel} differs from float64 by {error:.2g} in one layer, sdpa by {allowed:.2g}"
    return "" if calls else f"{type(model).__name__} has attention of its own"
