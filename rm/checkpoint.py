"""Full state under any engine, and checkpoints: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

logger = logging.getLogger(__name__)

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a prepared model on the CPU, without the engine's prefixes. Collective; empty off the main process
    where the engine shards."""
    return get_model_state_dict(model, options=FULL)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    is_main_process: bool,
    save_total_limit: int | None = None,
) -> Path:
    """Write `folder/step-N` with the trainable weights, the optimizer state and the step. Collective.

    Random state and sampler state are functions of (seed, step) and so are not in it. Older checkpoints beyond
    `save_total_limit` are removed after the new one is in place.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainable = {name.removeprefix("module.") for name in trainable}
    weights = {k: v for k, v in full_state_dict(model).items() if k in trainable}
    moments = get_optimizer_state_dict(model, optimizer, options=FULL)
    final = folder / f"step-{step}"
    if is_main_process:
        partial = folder / f".step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        torch.save({"weights": weights, "optimizer": moments}, partial / "state.pt")
        (partial / "checkpoint.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if save_total_limit is not None:
            for _, old in list_checkpoints(folder)[:-save_total_limit]:
                shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the finished checkpoints in `folder`, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return sorted((step, path) for step, path in found if (path / "checkpoint.json").is_file())


def find_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint folder that `name` means: a path, or "latest" in `folder`. Raises ValueError if there is none."""
    if name == "latest":
        found = list_checkpoints(folder)
        if not found:
            raise ValueError(f"resume_from_checkpoint=latest: there is no checkpoint in {folder}")
        return found[-1][1]
    if not (Path(name) / "checkpoint.json").is_file():
        raise ValueError(f"resume_from_checkpoint={name}: this is not a checkpoint folder (it has no checkpoint.json)")
    return Path(name)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's weights and optimizer state into a prepared model; returns its step. Collective.

    Tensors only: the file is read with `weights_only=True`, so that nothing in it is executed.
    """
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    set_model_state_dict(model, state["weights"], options=StateDictOptions(full_state_dict=True, strict=False))
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
    return json.loads((path / "checkpoint.json").read_text())["step"]
