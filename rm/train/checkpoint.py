"""Checkpoints that survive a crash at any moment, and the full state of a model under any engine.

A checkpoint is a folder `step-N`: `model.safetensors` (the trained weights), `optimizer.safetensors` and
`optimizer.json` (its tensors, and the rest), `state.json` (the step and whatever the loop wants back), and, written
last, `manifest.json` with the size and sha256 of the others. There is no pickle in it, and no random state: all that is
random is a function of (seed, step, process). It is written beside its place, flushed to the disk and renamed, so that
a `step-N` is whole or not there; and read only if every file is as the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError
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

from rm.config.files import GO_ON, fsync, fsync_folder
from rm.model.quantization import is_quantised
from rm.train.processes import on_main_process
from rm.train.zero import gather_state, is_zero, scatter_state

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json")
WRAPPERS = r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\."  # what engines put into the names of weights


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none that is whole can be read; one line that names the folder and the fix."""


# ---------------------------------------------------------------------------------------------- files


def digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Have `write(folder)` fill a folder, add the manifest, and put it at `final` in one move. Raises OSError."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        files = sorted(partial.iterdir())
        (partial / MANIFEST).write_text(json.dumps({path.name: digest(path) for path in files}, indent=2))
        fsync_folder(partial)
        partial.rename(final)
        fsync(final.parent)
        fsync(final.parent.parent)
    except BaseException:  # also Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint into `folder`, whole or not at all."""

    def write(partial: Path) -> None:
        for name in FILES:
            shutil.copyfile(checkpoint / name, partial / name)

    write_folder(folder / checkpoint.name, write)


def discard(folder: Path) -> None:
    """Remove a checkpoint, so that at no moment a half of it stands there."""
    shutil.rmtree(going := folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def set_aside(folder: Path) -> None:
    """Rename `step-N` to `step-N.replaced`, which nothing reads."""
    shutil.rmtree(aside := folder.with_name(f"{folder.name}.replaced"), ignore_errors=True)
    folder.rename(aside)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if they are all as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name in sorted({*FILES, *manifest}):
            if name not in manifest:
                return f"{MANIFEST} does not name {name}"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != manifest[name]["size"]:
                return f"{name} has {size} bytes instead of {manifest[name]['size']}"
            if digest(folder / name) != manifest[name]:
                return f"the content of {name} has changed (sha256)"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


# ---------------------------------------------------------------------------------------------- which one


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in `folder`, oldest first; damaged ones are among them."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return sorted((step, path) for step, path in found if path.is_dir())


def find_checkpoint(name: str, folder: Path) -> Path | None:
    """The checkpoint that `name` means: a path, or "latest" for the newest whole one in `folder`, None if it has none.

    Raises:
        CheckpointError: the path is no checkpoint or a damaged one; or all checkpoints in `folder` are damaged.
    """
    if name != "latest":
        if not Path(name).is_dir():
            raise CheckpointError(f"resume_from_checkpoint={name}: there is no such folder")
        if problem := damage(Path(name)):
            raise CheckpointError(f"resume_from_checkpoint={name}: {problem}; `latest` takes the newest that is whole")
        return Path(name)
    found = list_checkpoints(folder)
    for _, path in reversed(found):
        if not (problem := damage(path)):
            return path
        logger.warning(f"{path} is damaged and left out: {problem}")
    if found:
        fix = "bring one back from a backup, or start anew (without resume_from_checkpoint, overwrite_output_dir=true)"
        raise CheckpointError(f"resume_from_checkpoint=latest: all {len(found)} in {folder} are damaged; {fix}")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that `save_checkpoint` was given."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- save and load


def full_state_dict(model: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """All weights of a prepared model on the CPU, without the engine's prefixes. Collective; empty off the main process
    where the engine shards. `trained_only`: without frozen weights."""
    if is_quantised(model):  # whose state dicts hold more than weights, which torch cannot name; nothing shards them
        trained = trained_names(model)
        weights = {re.sub(WRAPPERS, "", name): w.detach().cpu() for name, w in model.state_dict().items()}
        return {name: w for name, w in weights.items() if not trained_only or name in trained}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)


def trained_names(model: nn.Module) -> set[str]:
    """The names of the trained weights, without the engine's prefixes."""
    return {re.sub(WRAPPERS, "", name) for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    accelerator: Accelerator,
    *,
    save_total_limit: int | None = None,
    keep_step: int | None = None,
) -> Path:
    """Write the trained weights, the optimizer and `state` (JSON with a "step") to `folder/step-N`. Collective.

    When the new one is in place, the oldest beyond `save_total_limit` are removed, but not that of `keep_step`.
    Raises `CheckpointError` on every process if it cannot be written; the earlier ones are as they were.
    """
    moments, options = {}, StateDictOptions(full_state_dict=True, cpu_offload=True)
    if is_zero(model):
        weights, moments = gather_state(model)
    else:
        trained = trained_names(model)  # of weights with two names one
        weights = {k: v for k, v in full_state_dict(model, trained_only=True).items() if k in trained}
        if _bare(optimizer).state:  # before its first step it is empty, and torch would fill it by a step
            moments = get_optimizer_state_dict(model, _bare(optimizer), options=options)
    final = folder / f"step-{state['step']}"

    def write(partial: Path) -> None:
        tensors, rest = _split(moments)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "optimizer.safetensors")
        (partial / "optimizer.json").write_text(json.dumps(rest), encoding="utf-8")
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

    def publish() -> None:
        try:
            write_folder(final, write)
            if save_total_limit is not None:
                for step, old in list_checkpoints(folder)[:-save_total_limit]:
                    if step != keep_step:
                        discard(old)
        except (OSError, SafetensorError) as error:
            cause = f"{error}".splitlines()[0]
            raise CheckpointError(
                f"{final} could not be written ({cause}); the earlier ones are intact: {GO_ON}"
            ) from None

    on_main_process(accelerator, publish)
    return final


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, accelerator: Accelerator
) -> None:
    """Put a checkpoint's weights and optimizer state into a prepared model, of any engine and number of processes.

    Without an `optimizer` the weights alone. Collective; the main process reads and the others get it from there.
    Raises `CheckpointError` if the checkpoint lacks a trained weight.
    """
    bare, weights, moments = _bare(optimizer), {}, {}

    def read() -> bool:
        try:
            weights.update(load_file(path / "model.safetensors"))
            rest = json.loads((path / "optimizer.json").read_text(encoding="utf-8"))
            if rest["groups"] and bare is not None:
                moments.update(_join(load_file(path / "optimizer.safetensors"), rest, bare))
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of this program: {error}") from None
        if missing := sorted(trained_names(model) - weights.keys()):
            raise CheckpointError(f"{path} lacks {len(missing)} weights of this model, among them {missing[0]}")
        return bool(moments)

    has_moments = on_main_process(accelerator, read)
    if is_zero(model):
        return scatter_state(model, weights, moments)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass its outermost weights lie about whole
    options = dict(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
    if has_moments:  # first, since torch may make room for the moments by a step
        set_optimizer_state_dict(model, bare, moments, options=StateDictOptions(**options))
    if is_quantised(model):
        return _copy_weights(model, weights, accelerator)
    set_model_state_dict(model, weights, options=StateDictOptions(**options, strict=False))  # frozen ones are not in it


@torch.no_grad()
def _copy_weights(model: nn.Module, weights: dict[str, Tensor], accelerator: Accelerator) -> None:
    """Copy the main process's `weights` into the trained ones of a model that nothing shards. Collective."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            if accelerator.is_main_process:
                p.copy_(weights[re.sub(WRAPPERS, "", name)])
            broadcast(p.data)


def _bare(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    return getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper skips steps at times; here none is one


def _split(moments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as (tensors by "weight/name", the rest for JSON); without hyperparameters."""
    tensors, rest = {}, {}
    for weight, entries in moments.get("state", {}).items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{weight}/{name}"] = value
    return tensors, {"state": rest, "groups": [group["params"] for group in moments.get("param_groups", [])]}


def _join(tensors: dict[str, Tensor], rest: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `_split`; hyperparameters are those that `optimizer` was made with."""
    state: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["state"]}.items():
        weight, _, name = key.rpartition("/")
        state.setdefault(weight, {})[name] = value
    groups = [{**group, "params": names} for group, names in zip(optimizer.param_groups, rest["groups"], strict=True)]
    return {"state": state, "param_groups": groups}
