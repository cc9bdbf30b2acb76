"""The end of a run: first the final model and results.json, then what is made from the run directory alone."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from rm.config.errors import RunError
from rm.config.files import GO_ON, finite, read_json
from rm.config.redact import redact
from rm.data.dataset import PreferenceData
from rm.evaluate.evaluator import Evaluator
from rm.evaluate.terminal import final_table
from rm.log.terminal import print_safely
from rm.model.adapters import adapter_settings
from rm.model.precision import is_half_precision
from rm.model.reward_model import unwrapped
from rm.model.saved import reward_scale, sample_of
from rm.report import write_report
from rm.report.card import model_card
from rm.train.checkpoint import full_weights
from rm.train.export import ExportError, save_model, verify_export
from rm.train.processes import on_main_process
from rm.train.run_dir import Run
from rm.train.state import TrainState

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "accelerate", "transformers", "datasets", "peft", "wandb", "tokenizers")


def finish_run(
    run: Run, evaluator: Evaluator, state: TrainState, train_set: PreferenceData, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Save the model, `export_check.json` for its check, and results.json. Collective.

    Raises `ExportError` if the model cannot be written.
    """
    accelerator, model, config = evaluator.accelerator, evaluator.model, run.config
    details = evaluator.details(state.evaluation["step"])  # collective
    sample = sample_of(len(train_set), config.num_normalization_samples, config.seed)
    rewards = evaluator.score(train_set, sample)  # collective
    scale = reward_scale(np.concatenate(rewards)) if rewards else None
    is_half = is_half_precision(model, accelerator.mixed_precision, config.tf32)
    check = evaluator.export_check() | {"tolerance": 5e-2 if is_half else 1e-3}  # collective
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    weights = accelerator.get_state_dict(model) if uses_deepspeed else full_weights(model)  # collective
    summary = state.means | state.evaluation["metrics"] | {"train/steps": state.step}
    if state.best.step is not None:
        summary["train/best_step"] = state.best.step
    summary["speed/train_seconds"] = round(state.train_seconds, 2)
    summary["speed/pairs_per_second"] = round(state.num_pairs / max(state.train_seconds, 1e-9), 2)
    summary["speed/peak_memory_gb"] = round(peak_memory_gb(accelerator.device), 3)

    def save() -> None:
        shutil.rmtree(export := run.folder / ".export", ignore_errors=True)
        try:
            save_model(unwrapped(model), weights, tokenizer, export, config, scale)
            sizes = run.publish(export)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(export, ignore_errors=True)
            cause = str(error).splitlines()[0]
            raise ExportError(f"the model cannot be written to {run.folder} ({cause}); {GO_ON}") from error
        run.write_json("export_check.json", {"files": sizes} | check)
        seconds = round(time.perf_counter() - run.started, 2)
        run.results = {
            "summary": finite(summary) | {"speed/total_seconds": seconds, "output_dir": str(run.folder)},
            "config": run.record,
            "adapter": adapter_settings(unwrapped(model).classifier),
            "layout": f"{evaluator.layout.name} ({evaluator.layout.reason})",
            "normalization": scale,
            "data": read_json(run.folder / "data_report.json"),
            **details,
            **provenance(),
        }
        run.write_json("results.json", run.results)

    on_main_process(accelerator, save)
    unwrapped(model).undo_liger()  # its kernels replace functions of transformers, with which the export is checked
    evaluator.log.close(run.results and run.results["summary"])


def complete_run(run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Write model card and report, check the saved model, push it to the hub, then write `finished.json`. Collective.

    Returns the summary, which is also the last line on stdout. A finished run is only pushed. Raises `ExportError` at
    the end if the check fails.
    """
    config, folder = run.config, run.folder

    def check_export() -> dict[str, Any]:
        expected = read_json(folder / "export_check.json")
        sequences, rewards = expected["sequences"], list(map(float, expected["rewards"]))
        try:
            return {"passed": True} | verify_export(folder, sequences, rewards, expected["tolerance"], config)
        except RunError as error:
            return {"passed": False, "problem": str(error)}

    def complete() -> tuple[dict[str, Any], dict[str, Any]]:
        is_finished, summary = run.is_finished, run.results["summary"]
        if is_finished:
            logger.info(f"the run in {folder} is finished: nothing to {'train' if run.hub else 'do'}")
            check = read_json(folder / "finished.json")["export_check"]
        else:
            run.write_text("README.md", model_card(run.results, name=run.name, repo_id=run.hub and run.hub.repo_id))
            write_report(run.file("report.html").parent)
            if (folder / "report.html").is_file():
                logger.info(f"report: {folder / 'report.html'}")
            check = check_export()
        pushed = summary.get("hub", {})
        must_push = run.hub and not (pushed.get("pushed") and pushed["repo"] == run.hub.repo_id)
        if must_push:
            summary["hub"] = run.hub.push_run(folder)
            run.write_json("results.json", run.results)
        if must_push or not is_finished:
            run.write_finished(check)
        return summary, check

    summary, check = on_main_process(accelerator, complete)
    if accelerator.is_main_process:
        print_safely(final_table(summary, run.results["intervals"]), json.dumps(summary))
    time.sleep(
        0.1
    )  # the thread of gloo needs the GIL to release the last collective, or the end deadlocks (torch 2.13)
    accelerator.end_training()
    if not check["passed"]:
        raise ExportError(f"{check['problem']}; the model and all results are in {folder}")
    return summary


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10^9 bytes: of the GPU if there is one, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this code; None outside a checkout or without git."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 20, "check": True}
    try:
        return subprocess.run(["git", *arguments], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, Any]:
    """Command (redacted by `run`), commit and uncommitted changes, package versions and machine."""
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": redact(git("diff", "HEAD")),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine,
    }
