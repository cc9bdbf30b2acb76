"""The accelerator, and the options that this launcher, engine or device does not support."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.log.trackers import prepare_trackers
from rm.model.precision import set_tf32

PATIENCE = timedelta(hours=2)  # while the main process tokenizes or writes a checkpoint, the others wait
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # engines that communicate in every layer


def make_accelerator(config: RewardConfig) -> Accelerator:
    """The accelerator of the run. Raises `InputError` for options that launcher, engine or device do not support."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and missing:
        fix = f"without {', '.join(missing)}: start the program with torchrun, or unset WORLD_SIZE"
        raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set {fix}")
    prepare_trackers(config.report_to)
    accelerator = create_accelerator(config)
    check_support(config, accelerator)
    set_tf32(config.tf32)
    if config.full_determinism:
        transformers.enable_full_determinism(config.seed)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def create_accelerator(config: RewardConfig) -> Accelerator:
    try:
        # without `cpu=True` Accelerate runs each process of a torchrun on CPUs as a training of its own
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # fp16 without a GPU
        raise InputError(f"mixed_precision={config.mixed_precision}: {error}") from None
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        # DeepSpeed clips gradients itself, and requires a batch size that has no effect here
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": config.max_grad_norm}
        unset_hf_deepspeed_config()  # or transformers loads shards under ZeRO-3, on which no head can be initialized
    return accelerator


def check_support(config: RewardConfig, accelerator: Accelerator) -> None:
    """Raise `InputError` for options that this engine or device does not support."""
    engine, on_cpu = accelerator.distributed_type, accelerator.device.type == "cpu"

    def reject(name: str, reason: str) -> None:
        raise InputError(f"{name}={getattr(config, name)}: {reason}")

    if engine == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 0:
        raise InputError("zero_stage: 0 gives no gradient norm; use 1, 2 or 3, or DDP")
    for name in ("load_in_4bit", "load_in_8bit", "eval_dtype"):
        if engine in SHARDED and getattr(config, name):
            reject(name, f"not supported under {engine.value}; use DDP or one process")
    if config.auto_find_batch_size and engine in SHARDED:
        reject("auto_find_batch_size", f"not supported under {engine.value}; set micro_batch_tokens instead")
    autocast = {"bfloat16": "bf16", "float16": "fp16"}.get(config.eval_dtype or "")
    if autocast and accelerator.mixed_precision not in ("no", autocast):
        reject("eval_dtype", f"differs from mixed_precision={accelerator.mixed_precision}; use the same type, or none")
    for name in ("activation_offloading", "use_liger_kernel"):
        if on_cpu and getattr(config, name):
            reject(name, "has no effect without a GPU; leave it out")
