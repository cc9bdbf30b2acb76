"""FSDP2: weights, gradients and optimizer state in shards on all processes."""

import re
from collections.abc import Iterator
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

from rm.config.files import digest
from rm.model.reward_model import RewardModel, find_head, unwrapped

WRAPPERS = r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\."  # prefixes that engines add to the names of weights
PART_BYTES = 5e9  # of one file of the final model
FILE_BYTES = 500e6  # of one file of a checkpoint, which is in memory twice while it is written


def shard_model(model: RewardModel, accelerator: Accelerator) -> None:
    """Under FSDP2, replace the weights of `model` by shards; otherwise do nothing. Collective.

    Groups that are gathered together, in the type of mixed precision: each layer, the input embeddings, the rest; and
    the head in float32, for which Accelerate has no policy. Trained weights are then stored, and gradients reduced, in
    float32. With `fsdp_cpu_ram_efficient_loading` the weights of the main process are broadcast one by one.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    weights, shards = model.state_dict() if plugin.cpu_ram_efficient_loading else {}, {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if half is not None and p.requires_grad else p.dtype
            device = "meta" if weights else p.device  # not the buffers: every process has computed them
            setattr(module, name, nn.Parameter(p.detach().to(device, dtype), requires_grad=p.requires_grad))
    accelerator._models.append(model)  # `Accelerator.clip_grad_norm_` searches it here
    options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    fully_shard(find_head(model.classifier), mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32), **options)
    names = plugin.transformer_cls_names_to_wrap or model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for module in (*layers, unwrapped(model.classifier).get_input_embeddings()):
        fully_shard(module, mp_policy=policy, **options)
    fully_shard(model, mp_policy=policy, offload_policy=plugin.cpu_offload)
    for name, shard in model.state_dict().items() if weights else ():
        whole = weights.pop(name)  # of other processes than the main one without content
        empty = torch.empty_like(whole, device=accelerator.device, dtype=shard.dtype)
        dist.broadcast(whole := whole.to(empty) if accelerator.is_main_process else empty, src=0)
        if isinstance(shard, DTensor):
            whole = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        shards[name] = whole.cpu() if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else whole
    if shards:
        model.load_state_dict(shards, assign=True)


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write files of safetensors per process to `folder`, flushed to the disk; returns the digests of all by name.

    Raises the error of the first process that failed, on every process. Collective.
    """
    starts = accumulate((tensor.nbytes / dist.get_world_size() for tensor in tensors.values()), initial=0)
    files = {name: 1 + int(start // FILE_BYTES) for name, start in zip(tensors, starts, strict=False)}
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), files, save_distributed=True))
    except dcp.api.CheckpointException as error:
        raise min(error.failures.items())[1][0] from None
    mine = folder.glob(f"shard-{dist.get_rank() + 1:05}-*")
    return dict(gather_object([(f"{folder.name}/{path.name}", digest(path)) for path in mine]))  # collective


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """All weights by name, whole, in parts. Each step of the iteration is collective.

    Without shards there is one part, and no copies. Under FSDP2 and DeepSpeed (there in float32) the main process gets
    one tensor after the other on its CPU, in parts of at most `PART_BYTES`; an adapter in one part, without its frozen
    base.
    """
    module, is_sharded = getattr(model, "module", model), isinstance(model, FSDPModule)
    tensors = {re.sub(WRAPPERS, "", name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    if not (is_sharded or hasattr(model, "zero_optimization_stage")):
        yield {name: tensor.detach() for name, tensor in tensors.items()}
        return
    tuner = module.classifier.base_model if hasattr(module.classifier, "peft_config") else None
    kept = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    part, size = {}, 0
    for name, tensor in tensors.items():
        is_base = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and id(tensor) not in kept
        if tuner is not None and is_base and tuner.prefix not in name:
            continue
        whole = tensor.full_tensor() if is_sharded and isinstance(tensor, DTensor) else tensor
        if not is_sharded:
            from deepspeed.runtime.zero import GatheredParameters
            from deepspeed.utils import safe_get_full_fp32_param

            with GatheredParameters([tensor]):
                whole = safe_get_full_fp32_param(tensor) if tensor.requires_grad else tensor.clone()
        if dist.get_rank() > 0:
            continue
        if size and size + whole.nbytes > PART_BYTES and tuner is None:
            yield part
            part, size = {}, 0
        part[name], size = whole.detach().cpu(), size + whole.nbytes
    yield part
