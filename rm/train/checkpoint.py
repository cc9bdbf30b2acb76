"""Checkpoints that survive a crash at any moment.

A checkpoint is a folder `step-N` of `model.safetensors` (the trained weights), `optimizer.safetensors` and
`optimizer.json` (its tensors, and the rest), `state.json` (see `TrainState`), and `manifest.json` with the size and
sha256 of the others. It is read only if every file agrees with the manifest. Under DeepSpeed a folder in its own format
(with pickles, for the same number of processes) replaces the first three.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from rm.config.errors import InputError, RunError
from rm.config.files import damage, discard_folder, naming, new_folder, publish_folder
from rm.train.processes import on_main_process
from rm.train.run_dir import Run
from rm.train.state import TrainState

logger = logging.getLogger(__name__)

WRAPPERS = r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\."  # prefixes that engines add to the names of weights
TO_MAIN_PROCESS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


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
        folder = on_main_process(self.accelerator, lambda: new_folder(final))
        if self.is_deepspeed:
            self.model.save_checkpoint(str(folder), "deepspeed", save_latest=False, exclude_frozen_parameters=True)
            self.accelerator.wait_for_everyone()
        else:
            weights, moments = trained_weights(self.model), {}
            if self.optimizer.state:  # it is empty before the first step, and torch would make a step to fill it
                moments = get_optimizer_state_dict(self.model, self.optimizer, options=TO_MAIN_PROCESS)

        def publish() -> None:
            with naming(final, folder):
                if not self.is_deepspeed:
                    tensors, rest = split_moments(moments)
                    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
                    save_file({name: m.contiguous() for name, m in tensors.items()}, folder / "optimizer.safetensors")
                    (folder / "optimizer.json").write_text(json.dumps(rest), encoding="utf-8")
                (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
                publish_folder(folder, self.run.file(f"checkpoints/{final.name}"))
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

    def _load(self, path: Path, with_optimizer: bool) -> None:
        """Load weights and optimizer state; without DeepSpeed the main process reads them."""
        if self.is_deepspeed:
            self.model.load_checkpoint(str(path), tag="deepspeed", load_module_strict=False)
            return
        weights, moments = {}, {}

        def read() -> bool:
            weights.update(load_file(path / "model.safetensors"))
            if missing := sorted(trained_parameters(self.model).keys() - weights.keys()):
                raise RunError(f"{path} lacks {len(missing)} weights of this model, among them {missing[0]}")
            rest = json.loads((path / "optimizer.json").read_text(encoding="utf-8"))
            if rest["groups"] and with_optimizer:
                moments.update(join_moments(load_file(path / "optimizer.safetensors"), rest, self.optimizer))
            return bool(moments)

        has_moments, is_many = on_main_process(self.accelerator, read), self.accelerator.num_processes > 1
        # not strict: the checkpoint has no frozen weights
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_many, strict=False)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost weights stay unsharded after a forward pass
        if has_moments:  # before the weights: torch may make a step to create the optimizer state
            set_optimizer_state_dict(self.model, self.optimizer, moments, options=options)
        set_model_state_dict(self.model, weights, options=options)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights on the CPU, under FSDP on the main process only. Collective."""
    parameters = trained_parameters(model)
    if not isinstance(model, FSDPModule):
        return {name: p.detach().cpu() for name, p in parameters.items()}
    return {name: w for name, w in get_model_state_dict(model, options=TO_MAIN_PROCESS).items() if name in parameters}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights by their names without prefixes of the engine; of a weight with two names, one."""
    return {re.sub(WRAPPERS, "", name): p for name, p in model.named_parameters() if p.requires_grad}


def split_moments(moments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as (tensors by "weight/name", the rest for JSON), without hyperparameters."""
    tensors, rest = {}, {}
    for weight, entries in moments.get("state", {}).items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{weight}/{name}"] = value
    return tensors, {"state": rest, "groups": [group["params"] for group in moments.get("param_groups", [])]}


def join_moments(tensors: dict[str, Tensor], rest: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `split_moments`, with the hyperparameters of `optimizer`."""
    state: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["state"]}.items():
        weight, _, name = key.rpartition("/")
        state.setdefault(weight, {})[name] = value
    groups = [{**group, "params": names} for group, names in zip(optimizer.param_groups, rest["groups"], strict=True)]
    return {"state": state, "param_groups": groups}
