"""train_rm.py under FSDP2 without a GPU, with the state that `accelerate launch` makes on GPUs."""

import os
import sys

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import train_rm
from rm.train import processes


def sharding_accelerator(**given) -> Accelerator:
    """Accelerate shards on accelerators only: its state is set as it would be there. Options are variables FSDP_…"""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    accelerator, state = Accelerator(**given), AcceleratorState()
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
    # both: an `AcceleratedOptimizer` reads the type again from the second one
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def run() -> int:
    processes.Accelerator = sharding_accelerator
    return train_rm.run()


if __name__ == "__main__":
    sys.exit(run())
