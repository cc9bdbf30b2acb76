"""The end of a run: first the final model and results.json, then what is made from the run directory alone."""

import importlib.metadata
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, pipeline
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rm.config.errors import RunError
from rm.config.files import finite, naming, new_folder, read_json, write_file
from rm.config.options import RewardConfig
from rm.config.redact import redact
from rm.data.dataset import PreferenceData
from rm.evaluate.evaluator import Evaluator, final_table
from rm.log.trackers import print_safely
from rm.model.load import load_saved_classifier, merge_saved_adapter, reward_scale, sample_of, set_scale
from rm.model.reward_model import RewardModel, is_half_precision, unwrapped
from rm.report.hub import model_card
from rm.train.processes import on_main_process
from rm.train.run_dir import Run
from rm.train.sharding import full_weights
from rm.train.state import TrainState

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "accelerate", "transformers", "datasets", "peft", "wandb", "tokenizers")


def finish_run(run: Run, evaluator: Evaluator, state: TrainState, train_set: PreferenceData) -> None:
    """Save the model, `export_check.json` for its check, and results.json. Collective.

    Raises `RunError` if the model cannot be written.
    """
    accelerator, model, config = evaluator.accelerator, evaluator.model, run.config
    details = evaluator.details(state.evaluation["step"])  # collective
    sample = sample_of(len(train_set), config.num_normalization_samples, config.seed)
    rewards = evaluator.score(train_set, sample)  # collective
    scale = reward_scale(np.concatenate(rewards)) if rewards else None
    check = evaluator.export_check()  # collective
    # the rewards of the check were computed without autocast; these engines compute in half precision without it
    is_cast = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    precision = accelerator.mixed_precision if is_cast else "no"
    check["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, config.dtype)
    spread = float(np.std([reward for reward in check["rewards"] if np.isfinite(reward)] or [0.0]))
    is_half = is_half_precision(model, precision, config.tf32)
    check["tolerance"] = 0.1 * max(spread, 0.5) if is_half else 1e-3 * max(spread, 0.1)
    parts = full_weights(model)  # collective, as every step of the iteration
    summary = state.means | state.evaluation["metrics"] | {"train/steps": state.step}
    if state.best.step is not None:
        summary["train/best_step"] = state.best.step
    summary["speed/train_seconds"] = round(state.train_seconds, 2)
    summary["speed/pairs_per_second"] = round(state.num_pairs / state.train_seconds, 2)
    summary["speed/peak_memory_gb"] = round(peak_memory_gb(accelerator.device), 3)

    def save() -> None:
        export = new_folder(run.folder / "model")
        with naming(f"the model in {run.folder}", export):
            try:
                save_model(unwrapped(model), parts, train_set.tokenizer, export, config, scale)
            finally:
                deque(parts, maxlen=0)  # the other processes wait for the rest
            sizes = run.publish(export)
        run.write_json("export_check.json", {"files": sizes} | check)
        saved = [read_json(run.folder / name) for name in sizes if name.endswith("adapter_config.json")]
        # PEFT writes its sets in random order
        adapter = {k: sorted(v, key=str) if isinstance(v, list) else v for file in saved for k, v in file.items()}
        seconds = round(time.perf_counter() - run.started, 2)
        done = finite(summary) | {"speed/total_seconds": seconds, "output_dir": str(run.folder)}
        run.results = {"summary": done, "config": run.record, "adapter": adapter or None}
        run.results |= {"layout": f"{evaluator.layout.name} ({evaluator.layout.reason})", "normalization": scale}
        run.results |= {"data": read_json(run.folder / "data_report.json")} | details | provenance()
        run.write_json("results.json", run.results)

    deque(() if accelerator.is_main_process else parts, maxlen=0)
    on_main_process(accelerator, save)
    unwrapped(model).undo_liger()  # its kernels replace functions of transformers, with which the export is checked
    evaluator.log.close(run.results and run.results["summary"])


def complete_run(run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Write model card and report, check the saved model, push it to the hub, then write `finished.json`. Collective.

    Returns the summary, which is also the last line on stdout. A finished run is only pushed. Raises `RunError` at the
    end if the check fails.
    """

    def complete() -> tuple[dict[str, Any], dict[str, Any]]:
        folder, summary, check = run.folder, run.results["summary"], run.finished_check()
        if is_finished := bool(check):
            logger.info(f"the run in {folder} is finished: nothing to {'train' if run.hub else 'do'}")
        else:
            run.write_text("README.md", model_card(run.results, name=run.name, repo_id=run.hub and run.hub.repo_id))
            write_report(run.file("report.html").parent)
            try:
                expected = read_json(folder / "export_check.json")
                check = {"passed": True} | verify_export(folder, expected, run.config, accelerator.device)
            except RunError as error:
                check = {"passed": False, "problem": str(error)}
            except Exception as error:  # a bug, or a model that transformers cannot run
                logger.exception("the export check crashed")
                check = {"passed": False, "problem": f"the export check crashed ({type(error).__name__})"}
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
    # the thread of gloo needs the GIL to release the last collective, or the end deadlocks (torch 2.13)
    time.sleep(0.1)
    accelerator.end_training()
    if not check["passed"]:
        raise RunError(f"{check['problem']}; the model and all results are in {run.folder}")
    return summary


def write_report(folder: Path) -> None:
    """Write report.html of a run; an error is logged with its traceback, since it must not end the run."""
    from rm.report.page import report_html  # imports matplotlib

    try:
        write_file(folder / "report.html", report_html([folder]))
        logger.info(f"report: {folder / 'report.html'}")
    except Exception:
        logger.exception(f"report.html is not written; to try again: python -m rm.report {folder}")


def save_model(
    model: RewardModel,
    parts: Iterable[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: RewardConfig,
    scale: dict[str, float | int] | None = None,
) -> None:
    """Write model and tokenizer to a new folder for `AutoModelForSequenceClassification.from_pretrained`.

    With `merge_adapter` the merged model goes to `folder` and the adapter to `folder/adapter`.

    Args:
        model: unwrapped; its own tensors are not read, since they may be shards.
        parts: its weights (`full_weights`); several parts become several files with an index.
        scale: mean and standard deviation of rewards, for the model's config; None: none, nor that of the base model.
    """
    is_merged = config.merge_adapter and hasattr(model.classifier, "peft_config")
    first, written = folder / "adapter" if is_merged else folder, []
    set_scale(model.config, scale)
    for part in parts:  # one after the other, so that one is in memory
        part = {name.removeprefix("classifier."): tensor for name, tensor in part.items()}
        model.classifier.save_pretrained(first, state_dict=part)
        if (file := first / SAFE_WEIGHTS_NAME).exists():
            written.append(file.rename(first / f".part-{len(written)}"))
    places, is_many = {}, len(written) > 1
    for i, file in enumerate(written, start=1):
        name = f"model-{i:05}-of-{len(written):05}.safetensors" if is_many else SAFE_WEIGHTS_NAME
        with safe_open(file.rename(first / name), "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), name)
    if is_many:
        (first / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
    tokenizer.save_pretrained(first)
    if is_merged:
        merged = merge_saved_adapter(str(first), tokenizer, config)
        set_scale(merged.config, scale)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # by PEFT; the model card replaces it


@torch.no_grad()
def verify_export(folder: Path, check: dict[str, Any], config: RewardConfig, device="cpu") -> dict[str, float | int]:
    """Score the answers of `check` with the saved model and compare with the rewards of the evaluated model.

    Once as token ids in a padded batch through the model. A whole model is also opened as the model card describes,
    with `pipeline("text-classification", model=folder)`, and scores the texts that it tokenizes to the same ids.
    `check` (export_check.json) has "sequences" of token ids, their "rewards", the "dtype" in which these were computed,
    and the largest "tolerance". The CPU takes the place of a GPU that runs out of memory.

    Returns the largest difference and the numbers of sequences compared. Raises `RunError` above the tolerance.
    """
    config = replace(config, dtype=check.get("dtype", config.dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    model = load_saved_classifier(str(folder), tokenizer, config).eval()
    ids, expected = check["sequences"], np.array(check["rewards"], dtype=np.float64)
    try:
        model.to(device)
    except torch.OutOfMemoryError:
        return verify_export(folder, check, config)

    def compare(what: str, found: np.ndarray, expected: np.ndarray) -> float:
        is_number = np.isfinite(expected)  # NaN in one answer of a packed row can spread to the other
        difference = float(np.abs(found - expected)[is_number].max(initial=0))
        if not difference <= (bound := check["tolerance"]):  # NaN is not
            raise RunError(f"{what} differs from the evaluated model by {difference:.3g}, allowed {bound:.1g}")
        return difference

    padded = tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt").to(device)
    logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    worst = compare(f"the model saved in {folder}", logits.double().cpu().numpy(), expected)
    del model  # the pipeline loads its own
    texts = [tokenizer.decode(s, skip_special_tokens=False) for s in ids]
    tokenized = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the texts have them
    is_whole = not (folder / "adapter_config.json").exists()  # the pipeline opens no adapters
    same = [i for i, found in enumerate(tokenized) if is_whole and found == ids[i]]
    if same:
        options = {"function_to_apply": "none", "device": device, "dtype": config.dtype}
        options["trust_remote_code"] = config.trust_remote_code
        classify = pipeline("text-classification", model=str(folder), **options)
        answers = classify([texts[i] for i in same], batch_size=len(same), top_k=None, add_special_tokens=False)
        name = classify.model.config.id2label[0]
        served = np.asarray([out["score"] for outputs in answers for out in outputs if out["label"] == name])
        worst = max(worst, compare(f"transformers' pipeline on {folder}", served, expected[same]))
    how = f"{len(ids)} sequences reloaded with transformers ({len(same)} of them through its pipeline)"
    logger.info(f"export checked: {how}, rewards agree to {worst:.1g}")
    return {"largest_difference": worst, "sequences": len(ids), "through_pipeline": len(same)}


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
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}
    commit = {"git_commit": git("rev-parse", "HEAD"), "git_diff": redact(git("diff", "HEAD"))}
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"command": sys.argv, **commit, "packages": packages, "machine": machine}
