"""Checkpoints that survive a crash at any moment.

A checkpoint is a folder `step-N` of `model.safetensors` (the trained weights), `optimizer.safetensors` and
`optimizer.json` (its tensors, and the rest), `state.json` (see `TrainState`), and `manifest.json` with the size and
sha256 of the others. It is read only if every file agrees with the manifest. Under FSDP2 the folder `shards`, to which
each process writes its own tensors, replaces the two files of tensors. Under DeepSpeed a folder in its own format (with
pickles, for the same number of processes) replaces the first three.
"""

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

from rm.config.errors import InputError, RunError
from rm.config.files import damage, discard_folder, naming, new_folder, publish_folder
from rm.train.processes import on_main_process
from rm.train.run_dir import Run
from rm.train.sharding import WRAPPERS, save_shards
from rm.train.state import TrainState

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process loads a checkpoint

SHARDS = "shards"  # the folder of a checkpoint with the files of all processes


class Checkpoints:
    """Saves and loads the checkpoints of a run. All methods are collective."""

    def __init__(self, run: Run, accelerator: Accelerator, model: nn.Module, optimizer: Any, state: TrainState):
        self.run, self.accelerator, self.model, self.state = run, accelerator, model, state
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        self.is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def resume(self) -> None:
        """Load the checkpoint that the run resumes from, if there is one. Raises `InputError` if it does not fit."""
        if self.run.checkpoint is None:
            return
        processes = self.run.checkpoint_state["deepspeed_processes"]
        if processes != (self.accelerator.num_processes if self.is_deepspeed else None):
            how = f"with {processes} processes under DeepSpeed" if processes else "without DeepSpeed"
            raise InputError(f"{self.run.checkpoint} was written {how}; resume it in the same way")
        self._load(self.run.checkpoint, with_optimizer=True)
        self.state.load_state_dict(self.run.checkpoint_state)
        logger.info(f"resumed from {self.run.checkpoint}: {self.state.step} steps are done")

    def save(self) -> None:
        """Write the checkpoint of the current step, then remove the oldest beyond `save_total_limit`.

        Raises `RunError` on every process if it cannot be written; the earlier ones are intact.
        """
        final = self.run.folder / "checkpoints" / f"step-{self.state.step}"
        state = self.state.state_dict() | {"content": self.run.content, "config": self.run.record}
        state |= {"format": 2, "deepspeed_processes": self.accelerator.num_processes if self.is_deepspeed else None}
        folder, digests = on_main_process(self.accelerator, lambda: new_folder(final)), {}
        if self.is_deepspeed:
            self.model.save_checkpoint(str(folder), "deepspeed", save_latest=False, exclude_frozen_parameters=True)
            self.accelerator.wait_for_everyone()
        else:
            weights, moments, rest = self._tensors()
            if isinstance(self.model, FSDPModule):
                with naming(final, folder):
                    digests = save_shards(folder / SHARDS, {**weights, **moments})

        def publish() -> None:
            with naming(final, folder):
                if not self.is_deepspeed:
                    (folder / "optimizer.json").write_text(json.dumps(rest), encoding="utf-8")
                    for name, tensors in () if digests else (("model", weights), ("optimizer", moments)):
                        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
                        save_file(tensors, folder / f"{name}.safetensors")
                (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
                publish_folder(folder, self.run.file(f"checkpoints/{final.name}"), digests)
                limit, kept = self.run.config.save_total_limit, self.state.best.step
                for step, old in self.run.checkpoints()[:-limit] if limit else ():
                    if step != kept:
                        discard_folder(old)

        on_main_process(self.accelerator, publish)
        if self.run.hub:
            self.run.hub.push_checkpoint(final)  # in the background

    def load_best(self) -> None:
        """Load the weights of the best evaluation, unless it is the last one or its checkpoint is damaged."""
        best = self.state.best
        if best.step in (None, self.state.step):
            return
        folder = self.run.folder / "checkpoints" / f"step-{best.step}"
        if problem := on_main_process(self.accelerator, lambda: damage(folder, "state.json")):
            logger.warning(f"{folder}, the best evaluation, is damaged ({problem}): the last weights are saved instead")
            return
        self._load(folder, with_optimizer=False)
        self.state.evaluation = {"step": best.step, "metrics": best.metrics}
        logger.info(f"the best evaluation, after step {best.step}, is saved ({best.metric} {best.summary[1]:.4f})")

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(trained weights by name, tensors of the optimizer by "weight/name", the rest of its state); no copies."""
        parameters, moments, rest = trained_parameters(self.model), {}, {}
        names = {p: name for name, p in parameters.items()}
        for p, entries in self.optimizer.state.items():
            for name, value in entries.items():
                (moments if isinstance(value, Tensor) else rest)[f"{names[p]}/{name}"] = value
        groups = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups if moments or rest]
        return {name: p.detach() for name, p in parameters.items()}, moments, {"state": rest, "groups": groups}

    def _load(self, path: Path, with_optimizer: bool) -> None:
        """Load weights and optimizer state, which any number of processes has written. Each process reads its part."""
        if self.is_deepspeed:
            self.model.load_checkpoint(str(path), tag="deepspeed", load_module_strict=False)
            return
        rest, parameters = json.loads((path / "optimizer.json").read_text("utf-8")), trained_parameters(self.model)
        if with_optimizer and rest["groups"]:
            get_optimizer_state_dict(self.model, self.optimizer)  # makes a step without gradients to fill its state
        reader = HuggingFaceStorageReader(str(path / SHARDS if (path / SHARDS).is_dir() else path))
        stored = reader.read_metadata().state_dict_metadata
        weights, moments, _ = self._tensors()
        if missing := sorted(weights.keys() - stored):
            raise RunError(f"{path} lacks {len(missing)} weights of this model, among them {missing[0]}")
        if with_optimizer:
            weights |= {name: moment for name, moment in moments.items() if name in stored}
            for key, value in rest["state"].items():
                weight, _, name = key.rpartition("/")
                self.optimizer.state[parameters[weight]][name] = value
        dcp.load(weights, storage_reader=reader, no_dist=not isinstance(self.model, FSDPModule))  # in place


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights by their names without prefixes of the engine; of a weight with two names, one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost weights stay unsharded after a forward pass
    return {re.sub(WRAPPERS, "", name): p for name, p in model.named_parameters() if p.requires_grad}
