"""FSDP2: weights, gradients and optimizer state in shards on all processes."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rm.config.files import digest
from rm.model.reward_model import RewardModel, find_head, unwrapped

WRAPPERS = r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\."  # prefixes that engines add to the names of weights
PART_BYTES = 5e9  # of one file of the final model
FILE_BYTES = 500e6  # of one file of a checkpoint, which is in memory twice while it is written


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """(model, optimizer) as Accelerate prepares them; under FSDP2 the model is sharded already. Collective."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    accelerator._models.append(model)  # `clip_grad_norm_` searches it here
    return model, accelerator.prepare_optimizer(optimizer)


def shard_model(model: RewardModel, accelerator: Accelerator) -> None:
    """Under FSDP2, replace the weights of `model` by shards; otherwise do nothing. Collective.

    Groups that are gathered together: each layer, the input embeddings, the head, and the rest. Under mixed precision
    they are gathered in that type, trained weights are stored in float32, and gradients are reduced in float32. The
    head always computes in float32. Accelerate has one policy for all modules, hence not `Accelerator.prepare`.

    With `fsdp_cpu_ram_efficient_loading` only the main process needs weights: they are broadcast one by one.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    is_lazy, shards = plugin.cpu_ram_efficient_loading, {}
    weights = model.state_dict() if is_lazy else {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if half is not None and p.requires_grad else p.dtype
            device = "meta" if is_lazy else p.device  # not the buffers: they are computed
            setattr(module, name, nn.Parameter(p.detach().to(device, dtype), requires_grad=p.requires_grad))

    options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    fully_shard(find_head(model.classifier), mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32), **options)
    names = plugin.transformer_cls_names_to_wrap or model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for module in (*layers, unwrapped(model.classifier).get_input_embeddings()):
        fully_shard(module, mp_policy=policy, **options)
    fully_shard(model, mp_policy=policy, offload_policy=plugin.cpu_offload)
    for name, shard in model.state_dict().items() if is_lazy else ():
        whole = weights.pop(name)  # of other processes than the main one without content
        empty = torch.empty_like(whole, device=accelerator.device, dtype=shard.dtype)
        whole = whole.to(empty) if accelerator.is_main_process else empty
        dist.broadcast(whole, src=0)
        if isinstance(shard, DTensor):
            whole = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        is_offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        shards[name] = whole.cpu() if is_offloaded else whole
    if is_lazy:
        model.load_state_dict(shards, assign=True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write a file of safetensors per process to `folder`, flushed to the disk. Collective.

    Returns size and sha256 of all of them by "folder/file". Raises the error of the first process that failed, on every
    process.
    """
    starts = accumulate((tensor.nbytes / dist.get_world_size() for tensor in tensors.values()), initial=0)
    files = {name: 1 + int(start // FILE_BYTES) for name, start in zip(tensors, starts, strict=False)}
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), files, save_distributed=True))
    except dcp.api.CheckpointException as error:
        raise min(error.failures.items())[1][0] from None
    mine = folder.glob(f"shard-{dist.get_rank() + 1:05}-*")
    found = gather_object([(f"{folder.name}/{path.name}", digest(path)) for path in mine])  # collective
    return dict(found)


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """All weights by name, whole. One process and DDP: one part. Otherwise in parts of about `PART_BYTES` on the CPU of
    the main process, gathered one tensor at a time; an adapter in one part without its frozen base. Collective.

    DeepSpeed: the float32 weights of its optimizer.
    """
    module, is_deepspeed = getattr(model, "module", model), hasattr(model, "zero_optimization_stage")
    if not (is_deepspeed or is_sharded(model)):
        yield {re.sub(WRAPPERS, "", name): tensor for name, tensor in module.state_dict().items()}
        return
    if is_deepspeed:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param
    tensors, adapter = module.state_dict(keep_vars=True), getattr(module.classifier, "base_model", None)
    is_adapter = hasattr(module.classifier, "peft_config")
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    part, size = {}, 0
    for name, tensor in tensors.items():
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if is_adapter and is_frozen and id(tensor) not in tables and adapter.prefix not in name:
            continue
        if isinstance(tensor, DTensor):
            whole = tensor.detach().full_tensor()
        elif is_deepspeed and tensor.requires_grad:
            whole = safe_get_full_fp32_param(tensor)
        else:  # a buffer, or a frozen weight of DeepSpeed
            with GatheredParameters([tensor]) if is_deepspeed else nullcontext():
                whole = tensor.detach().clone()
        if dist.get_rank() > 0:
            continue
        if size and size + whole.nbytes > PART_BYTES and not is_adapter:
            yield part
            part, size = {}, 0
        part[re.sub(WRAPPERS, "", name)] = whole.cpu()
        size += whole.nbytes
    yield part
