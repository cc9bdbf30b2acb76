"""DeepSpeed ZeRO: trained weights and optimizer state as whole tensors, named as torch's distributed checkpoints do.

DeepSpeed's own checkpoints are pickles, in pieces that only the same number of processes can read. Its `safe_get_…` and
`safe_set_…` functions give whole tensors; where they fall short, private names are used. Run with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional as F

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def is_zero(model: nn.Module) -> bool:
    """Whether a prepared model is a DeepSpeed engine."""
    return hasattr(model, "zero_optimization_stage")


def gather_state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained weights in float32, as the optimizer has them, and the optimizer's state dict; on the CPU of the main
    process, empty on the others. Collective, one tensor at a time."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero, is_sharded, weights, state = engine.optimizer, engine.zero_optimization_stage() == 3, {}, {}
    stepped = list(zero.optimizer.state.values())
    if not is_sharded and stepped:
        _link_moments(zero)
    for name, p in _trained(engine):
        weight = safe_get_full_fp32_param(p)
        moments = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS} if stepped else {}
        if engine.global_rank == 0:
            weights[name] = weight.cpu()
            step = {"step": torch.tensor(float(stepped[0]["step"]))} if stepped else {}
            state[name] = step | {key: tensor.cpu() for key, tensor in moments.items()}
    if not stepped:
        return weights, {}
    names = {p: name for name, p in _trained(engine)}
    groups: list[dict[str, Any]] = [{"params": []} for _ in zero.param_groups]
    if is_sharded:
        members = [(zero.sub_group_to_group_id[i], group) for i, group in enumerate(zero.fp16_groups)]
    else:
        members = enumerate(zero.bit16_groups)
    for i, params in members:
        groups[i]["params"] += [names[p] for p in params]
    return weights, {"state": state, "param_groups": groups}


@torch.no_grad()
def scatter_state(engine: Any, weights: dict[str, Tensor], moments: dict[str, Any]) -> None:
    """Put what `gather_state` gave, whole on the main process, into an engine that has not stepped yet. Collective."""
    import deepspeed
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    zero, is_sharded = engine.optimizer, engine.zero_optimization_stage() == 3
    set_weight = safe_set_local_fp32_param if is_sharded else safe_set_full_fp32_param
    set_moment = safe_set_local_optimizer_state if is_sharded else safe_set_full_optimizer_state
    state = moments.get("state", {})
    (step,) = broadcast_object_list([next((float(entry["step"]) for entry in state.values()), None)])
    if step is not None:
        _make_room(zero, step, is_sharded)
    for name, p in _trained(engine):
        new = {None: weights.get(name)}
        if step is not None:
            new |= {key: state.get(name, {}).get(key) for key in MOMENTS}
        for key, value in new.items():
            whole = torch.empty(getattr(p, "ds_shape", p.shape), dtype=torch.float32, device=engine.device)
            if engine.global_rank == 0:
                whole.copy_(value)
            dist.broadcast(whole, src=0)
            if key is None:
                with deepspeed.zero.GatheredParameters(p, modifier_rank=0):  # does nothing below ZeRO-3
                    p.copy_(whole)
            if is_sharded:  # DeepSpeed's safe_set_full_… fail where a weight does not divide by the processes
                size, rank = p.ds_tensor.numel(), dist.get_rank(p.ds_process_group)
                padded = F.pad(whole.flatten(), (0, size * dist.get_world_size(p.ds_process_group)))
                whole = padded[rank * size :][:size]
            set_weight(p, whole) if key is None else set_moment(p, whole, key)


def _trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _link_moments(zero: Any) -> None:
    """Let the safe_… functions find the moments under ZeRO-1 and 2: DeepSpeed links those of one group only."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _make_room(zero: Any, step: float, is_sharded: bool) -> None:
    """Moments of zeros for every flat shard, as AdamW would make them in its first step."""
    for flat in zero.fp32_partitioned_groups_flat if is_sharded else zero.single_partition_of_fp32_groups:
        is_torch = isinstance(zero.optimizer, torch.optim.AdamW)  # not so with offload_optimizer_device: cpu
        count = torch.tensor(step, device=flat.device) if is_torch else int(step)
        zero.optimizer.state[flat] = {"step": count} | {key: torch.zeros_like(flat) for key in MOMENTS}
    if not is_sharded:
        _link_moments(zero)
