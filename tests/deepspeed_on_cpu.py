"""train_rm.py under DeepSpeed without a GPU, which Accelerate turns off for `cpu=True`."""

import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

import train_rm
from rm.train import processes


def deepspeed_accelerator(**given) -> Accelerator:
    accelerator = Accelerator(**given)
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator


def run() -> int:
    """The stage is ACCELERATE_DEEPSPEED_ZERO_STAGE, 2 if that is not set."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")
    os.environ |= {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "none" for what in ("OPTIMIZER", "PARAM")}
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    PartialState(cpu=True)  # makes the gloo group
    torch.accelerator.is_available = lambda: True  # so that `cpu=True` is not passed
    processes.Accelerator = deepspeed_accelerator
    return train_rm.run()


if __name__ == "__main__":
    sys.exit(run())
