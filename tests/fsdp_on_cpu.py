"""train_rm.py under FSDP2 without a GPU: Accelerate shards on accelerators only, so that its state is set by hand."""

import os
import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import train_rm
from rm.train import processes


def sharding_accelerator(**given) -> Accelerator:
    os.environ["FSDP_VERSION"] = "2"
    accelerator, state = Accelerator(**given), AcceleratorState()
    options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "reshard_after_forward": True}
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin(**options)
    return accelerator


def run() -> int:
    processes.Accelerator = sharding_accelerator
    return train_rm.run()


if __name__ == "__main__":
    sys.exit(run())
