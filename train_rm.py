"""Train a reward model on pairs (chosen, rejected): the whole program, top to bottom.

accelerate launch train_rm.py                                       # the quickstart: no network, under a minute
accelerate launch train_rm.py --config configs/hh_rlhf_gpt2.yaml --learning_rate=1e-5
python train_rm.py --help                                           # every option
"""

from __future__ import annotations

import difflib
import errno
import json
import logging
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object, set_seed
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rm.collate import COLUMNS, collate
from rm.config.cli import parse_config
from rm.config.errors import InputError
from rm.config.files import GO_ON, DiskError, finite, write_text
from rm.config.options import LORA_OPTIONS, RewardConfig, changed_options
from rm.config.redact import redact, redact_arguments, safe_line
from rm.data.audit import audit_table, data_report
from rm.data.mixture import load_pairs, name_sets
from rm.data.plan import StepPlan
from rm.evaluate.evaluator import evaluate_rewards, mistake_records, pair_lengths, pairs_metrics, warn_of_nonfinite
from rm.evaluate.slices import breakdowns
from rm.evaluate.table import pair_table, read_table, with_rewards, worst, write_table
from rm.evaluate.token_rewards import trace_pairs
from rm.forward import concatenated_forward, resolve_layout, without_autocast
from rm.log.trackers import RunLog, prepare_trackers
from rm.loss import pairwise_loss
from rm.model.adapters import adapter_settings, load_trainable
from rm.model.attention import block_size
from rm.model.load import load_tokenizer
from rm.model.normalization import reward_scale, sample_of
from rm.model.precision import cast_weights, set_tf32
from rm.model.quantization import QUANTIZATION_OPTIONS, quantization_config
from rm.model.reward_model import RewardModel, check_positions, compile_layers, use_liger_kernels
from rm.report.card import hub_name, model_card, names_in
from rm.report.charts import log_charts, log_histograms
from rm.report.hub import Hub, open_repo
from rm.report.page import write_report
from rm.train.best import BestEvaluation
from rm.train.checkpoint import (
    CheckpointError,
    damage,
    digest,
    full_state_dict,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from rm.train.export import ExportError, save_model, verify_export
from rm.train.meter import Meter
from rm.train.oom import (
    BatchSizeFinder,
    any_process,
    average_gradients,
    can_repeat_steps,
    peak_memory_gb,
    settle_buckets,
)
from rm.train.optimizer import FOLLOW_A_METRIC, make_optimizer, make_scheduler, parameter_groups
from rm.train.processes import StopSignal, is_orphan, on_main_process, processes_asked_for
from rm.train.provenance import model_fingerprint, provenance
from rm.train.run_dir import claim_output_dir, find_start, open_output_dir, refuse_other_content, refuse_own_origin
from rm.visualize_samples import visualize_samples, write_records

logger = logging.getLogger("train_rm")


PATIENCE = timedelta(hours=2)  # of a process for the main one, while that tokenizes or writes a checkpoint
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NUM_MISTAKES = 20  # pairs in mistakes.jsonl
SCALER_STEPS = 20  # steps in a row that fp16's loss scaler may skip while it looks for its scale


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the weights were not touched by it."""


class Stopped(Exception):
    """A signal asked the run to stop; the checkpoint is written."""


def make_accelerator(mixed_precision: str | None, max_grad_norm: float) -> Accelerator:
    """The accelerator; refuses to run fewer processes than the launcher was asked for."""
    try:
        # without `cpu=True`, Accelerate runs every process of a torchrun on CPUs as a training of its own
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # fp16 without a GPU
        raise InputError(f"mixed_precision={mixed_precision}: {error}") from None
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it clips by itself, and wants a batch size that it ignores
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": max_grad_norm}
        unset_hf_deepspeed_config()  # or transformers makes shards under ZeRO-3, which have no shape and take no head
        if plugin.zero_stage == 0:
            raise InputError("zero_stage: 0 gives no gradient norm; use 1, 2 or 3, or plain multi-GPU")
    asked, present = processes_asked_for(), accelerator.num_processes
    if present < asked:
        raise InputError(f"{asked} processes were asked for, but {present} take part; on CPUs use torchrun")
    return accelerator


def refuse_what_cannot_act(config: RewardConfig, accelerator: Accelerator) -> None:
    """Raise `InputError` for options that this engine or device cannot do."""
    engine, on_cpu = accelerator.distributed_type, accelerator.device.type == "cpu"
    shards = engine in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    for name in ("load_in_4bit", "load_in_8bit", "eval_dtype"):
        if shards and (value := getattr(config, name)):
            raise InputError(f"{name}={value}: cannot act under {engine.value}; use DDP or one process")
    autocast = {"bfloat16": "bf16", "float16": "fp16"}.get(config.eval_dtype)
    if autocast and accelerator.mixed_precision not in ("no", autocast):
        mixed = f"mixed_precision={accelerator.mixed_precision}"
        raise InputError(f"eval_dtype={config.eval_dtype}: does not go with {mixed}; use the same type, or none")
    if config.auto_find_batch_size and not can_repeat_steps(engine):
        raise InputError(f"auto_find_batch_size=True: cannot act under {engine.value}; set micro_batch_tokens instead")
    if engine == DistributedType.DEEPSPEED and not config.optim.startswith("adamw"):
        raise InputError(f"optim={config.optim}: under DeepSpeed only AdamW's state can be saved; use adamw_torch")
    for name in ("activation_offloading", "use_liger_kernel"):
        if on_cpu and getattr(config, name):
            raise InputError(f"{name}=True: it cannot act without a GPU; leave it out")
    if on_cpu and config.attn_implementation == "flex_attention":
        raise InputError("attn_implementation=flex_attention: it has no backward pass on a CPU; use sdpa")


def sync_on_last(accelerator: Accelerator, model: torch.nn.Module, i: int, count: int, never: bool = False):
    """Context for micro-batch `i` of `count`: gradients cross the wire on the last one only, or `never`."""
    accelerator.gradient_state._set_sync_gradients(i == count - 1)  # DeepSpeed and the fp16 scaler look here
    return nullcontext() if i == count - 1 and not never else accelerator.no_sync(model)


def seed_everything(seed: int, step: int, process_index: int) -> None:
    """Make everything random in step `step` a function of (seed, step, process): there is no state to save."""
    set_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1)[0]))


def skip_step(meter: Meter, scaler: torch.amp.GradScaler | None) -> None:
    """Leave a step out: nothing reaches the weights or the means; fp16's loss scaler lowers its scale."""
    meter.undo_step()
    if scaler is not None:
        scaler.update()


def in_steps(every: float, total_steps: int) -> int:
    """`logging_steps` and the like as a number of steps: below 1 it is a fraction of all steps."""
    return math.ceil(every * total_steps) if every < 1 else int(every)


def main(argv: list[str]) -> dict:
    """Run the program; returns the summary that is also the last line on stdout."""
    started, stop = time.perf_counter(), StopSignal()
    if is_orphan():
        raise Stopped("accelerate launch, which started this process, is gone")

    # ------------------------------------------------------------------------------ configuration
    config = parse_config(argv)
    try:
        report_to = prepare_trackers(config.report_to)
    except ValueError as error:
        raise InputError(str(error)) from None
    accelerator = make_accelerator(config.mixed_precision, config.max_grad_norm)
    refuse_what_cannot_act(config, accelerator)
    set_tf32(config.tf32)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_names = name_sets("dataset_name", redact(config.dataset_name), config.dataset_config)
    open_dir = partial(
        open_output_dir,
        config.output_dir,
        config.run_name,
        names=(redact(config.model_name_or_path), "+".join(set_names)[:80]),
        may_hold_run=bool(config.overwrite_output_dir or config.resume_from_checkpoint),
    )
    output_dir, run_name = on_main_process(accelerator, open_dir)  # collective: clocks differ
    refuse_own_origin(output_dir, config.model_name_or_path)
    record = redact(config.resolved(accelerator.num_processes, accelerator.mixed_precision))
    record = json.loads(json.dumps(record, default=str))  # as it will be read back
    find = partial(find_start, config.resume_from_checkpoint, output_dir, record, changed_options)
    resume_from, finished = on_main_process(accelerator, find)
    hub = None
    if config.push_to_hub:
        access = {"token": config.hub_token, "revision": config.hub_revision}
        open_it = partial(open_repo, config.hub_model_id or run_name, private=config.hub_private_repo, **access)
        repo_id = on_main_process(accelerator, open_it)
        hub = Hub(repo_id, **access, strategy=config.hub_strategy) if accelerator.is_main_process else None
    if finished is not None:
        logger.info(f"the run in {output_dir} is finished: nothing to {'train' if hub else 'do'}")
        if accelerator.is_main_process:
            finished = hub.push_run(output_dir, finished) if hub else finished
            print(json.dumps(finished), flush=True)
        accelerator.end_training()
        return finished
    is_half = accelerator.mixed_precision != "no" or config.dtype != "float32"
    is_half |= config.load_in_4bit or config.load_in_8bit or bool(config.tf32)
    if config.full_determinism:
        transformers.enable_full_determinism(config.seed)
    seed_everything(config.seed, 0, accelerator.process_index)

    # ------------------------------------------------------------------------------ data
    tokenizer = load_tokenizer(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
    )
    with accelerator.main_process_first():  # the other processes read the main process's cache
        train_pairs, eval_pairs = load_pairs(tokenizer, **config.data_options())
    train_set = train_pairs.dataset.with_format("numpy", columns=COLUMNS)
    if accelerator.is_main_process:
        Console().print(audit_table(train_pairs, eval_pairs))

    # ------------------------------------------------------------------------------ model
    quantization = quantization_config(**{name: getattr(config, name) for name in QUANTIZATION_OPTIONS})
    classifier = load_trainable(
        config.model_name_or_path,
        tokenizer,
        use_peft=config.use_peft,
        lora={name: getattr(config, name) for name in LORA_OPTIONS},
        given=config.changed(LORA_OPTIONS),
        peft_config=config.peft_config,
        seed=config.seed,
        revision=config.model_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        disable_dropout=config.disable_dropout,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs,
        quantization_config=quantization,
    )
    model = RewardModel(
        classifier,
        activation_offloading=config.activation_offloading,
        neftune_noise_alpha=config.neftune_noise_alpha,
    )
    undo_liger = use_liger_kernels(model, config.liger_kernel_config) if config.use_liger_kernel else None
    check_positions(model, max(train_pairs.audit["max_tokens"], eval_pairs.audit["max_tokens"]))
    if config.torch_compile:
        logger.info(f"torch_compile: one graph for {compile_layers(model)} layers, made in the first steps")
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {num_trainable:,} trained")
    # whatever the options call them, a resumed run must have the same pairs and start from the same weights
    content = {"dataset_name": train_pairs.fingerprint, "eval_dataset_name": eval_pairs.fingerprint}
    content["model_name_or_path"] = model_fingerprint(model) if accelerator.is_main_process else ""
    content["peft_config"] = digest(Path(config.peft_config))["sha256"] if config.peft_config else ""
    groups = parameter_groups(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        head_learning_rate=config.head_learning_rate,
    )
    optimizer = make_optimizer(
        groups,
        optim=config.optim,
        optim_args=config.optim_args,
        learning_rate=config.learning_rate,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    lengths = pair_lengths(train_pairs.dataset)
    layout, reason = resolve_layout(
        config.layout,
        model,
        train_set,
        lengths.short_ones(),
        tokenizer.pad_token_id,
        accelerator.device,
        tolerance=5e-2 if is_half else 1e-4,
    )
    if "concatenated" in gather_object([layout]) and layout != "concatenated":  # collective: all or none
        layout, reason = "concatenated", "another process could not"
    logger.info(f"layout: {layout} ({reason})")

    eval_table = pair_table(eval_pairs)
    to_metrics = partial(
        pairs_metrics,
        center_rewards_coefficient=config.center_rewards_coefficient,
        label_smoothing=config.label_smoothing_factor,
    )
    known = to_metrics(eval_table)
    if config.metric_for_best_model not in (None, *known):
        near = difflib.get_close_matches(config.metric_for_best_model, known, n=5, cutoff=0)
        near = f"no such metric; the nearest of {len(known)}: {', '.join(near)}"
        raise InputError(f"metric_for_best_model={config.metric_for_best_model}: {near}")

    # ------------------------------------------------------------------------------ plan
    plan = StepPlan(
        lengths,
        train_batch_size=config.global_batch_size(accelerator.num_processes),
        layout=layout,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        block_size=block_size(model),
    )
    total_steps = plan.total_steps(config.num_train_epochs, config.max_steps)
    logger.info(
        f"plan: {total_steps} steps of {plan.train_batch_size} pairs ({plan.steps_per_epoch} an epoch) on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {config.micro_batch_tokens} tokens a forward pass"
    )
    logging_steps, eval_steps, save_steps = (
        in_steps(every, total_steps) for every in (config.logging_steps, config.eval_steps, config.save_steps)
    )
    meter = Meter(accelerator.device)
    try:
        best = BestEvaluation(
            config.metric_for_best_model,
            config.greater_is_better,
            patience=config.early_stopping_patience,
            threshold=config.early_stopping_threshold,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    done = {"step": 0, "metrics_lines": None, "means": {}, "pairs": 0.0, "seconds": 0.0, "seconds_since_log": 0.0}
    done |= {"evaluated": {"step": None, "metrics": {}}, "schedule": None, "skipped": 0, "skipped_in_a_row": 0}
    if resume_from is not None:
        done |= on_main_process(accelerator, partial(read_state, resume_from))
        on_main_process(accelerator, partial(refuse_other_content, done["content"], content, resume_from))
        load_checkpoint(resume_from, model, optimizer, accelerator)  # collective
        best.load_state(done["best"])
        meter.load_state(done["meter"], accelerator.process_index, accelerator.num_processes)
        if done["config"]["micro_batch_tokens"] == config.micro_batch_tokens:
            plan.micro_batch_tokens = done["micro_batch_tokens"]  # halved, perhaps, by auto_find_batch_size
        if accelerator.scaler is not None and done["scaler"]:
            accelerator.scaler.load_state_dict(done["scaler"])
        logger.info(f"resumed from {resume_from}: {done['step']} steps are done")
    step, saved_step, means, evaluated = done["step"], done["step"], done["means"], done["evaluated"]
    total_pairs, train_seconds = done["pairs"], done["seconds"]
    skipped, skipped_in_a_row = done["skipped"], done["skipped_in_a_row"]
    scheduler = make_scheduler(
        config.lr_scheduler_type,
        optimizer,
        total_steps=total_steps,
        warmup_ratio=config.warmup_ratio,
        warmup_steps=config.warmup_steps,
        kwargs=config.lr_scheduler_kwargs,
        greater_is_better=best.greater_is_better,
        steps_done=step,
        state=done["schedule"],
    )
    follows_metric = config.lr_scheduler_type in FOLLOW_A_METRIC
    report = data_report(train_pairs, eval_pairs)
    config_yaml = replace(config, mixed_precision=accelerator.mixed_precision).to_yaml()  # perhaps the launcher's
    on_main_process(accelerator, partial(claim_output_dir, output_dir, config_yaml, report, resume_from, best.step))
    run_log = RunLog(
        accelerator,
        output_dir,
        project=config.project,
        run_name=run_name,
        group=output_dir.resolve().name,
        config=record,
        report_to=report_to,
        resume_lines=done["metrics_lines"],
    )

    passes = {  # of forward passes without gradients
        "layout": layout,
        "micro_batch_tokens": config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }
    score = partial(evaluate_rewards, model, accelerator, **passes)  # rewards of tokenized pairs, [n, 2]; collective
    trace = partial(trace_pairs, model, accelerator, **passes)  # rewards along the answers of some pairs; collective

    def evaluate(step: int) -> dict[str, float]:
        """Score the held-out pairs, log the metrics, show the samples. Collective."""
        shown = eval_pairs.first_of_each(config.num_print_samples)
        with cast_weights(model, config.eval_dtype):
            rewards = score(eval_pairs.dataset)
            traces = trace(eval_pairs, shown)
        table = with_rewards(eval_table, rewards)
        metrics = to_metrics(table)
        if accelerator.is_main_process:
            write_table(table, output_dir / "eval" / f"step-{step}.parquet")
            run_log.log(metrics, step)
            warn_of_nonfinite(eval_pairs, table)
            log_histograms(run_log, table, step)
            with bar.external_write_mode():
                visualize_samples(
                    [eval_pairs.texts(i) for i in shown],
                    rewards[shown, 0],
                    rewards[shown, 1],
                    ids=eval_pairs.ids(shown),
                    sets=[eval_pairs.set_of(i) for i in shown] if eval_pairs.are_several else None,
                    step=step,
                    output_dir=output_dir,
                    run_log=run_log,
                    margins=table["data_margin"].to_numpy()[shown] if table["data_margin"].any() else None,
                    traces=traces,
                    num_print_samples=len(shown),
                )
        return metrics

    def checkpoint(step: int, metrics_lines: int | None = None) -> None:
        """Save all that a resumed run needs to go on as if it had never stopped; of metrics.jsonl all lines, or so
        many. Collective."""
        num_lines = run_log.sync()
        state = {
            "step": step,
            "metrics_lines": num_lines if metrics_lines is None else metrics_lines,
            "means": means,
            "pairs": total_pairs,
            "seconds": train_seconds,
            "seconds_since_log": paused - clock,
            "skipped": skipped,
            "skipped_in_a_row": skipped_in_a_row,
            "best": best.state(),
            "evaluated": evaluated,
            "schedule": scheduler.state_dict() if follows_metric else None,
            "meter": meter.state(accelerator.gather),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "content": content,
            "config": record,
        }
        limits = {"save_total_limit": config.save_total_limit, "keep_step": best.step}
        folder = save_checkpoint(output_dir / "checkpoints", model, optimizer, state, accelerator, **limits)
        if hub:
            hub.push_checkpoint(folder)  # in the background

    def load_best() -> None:
        """Take the weights of the best evaluation. Collective."""
        folder = output_dir / "checkpoints" / f"step-{best.step}"
        if problem := on_main_process(accelerator, partial(damage, folder)):
            if saved_step != step:
                checkpoint(step, metrics_lines)  # so that nothing is lost
            again = f"load_best_model_at_end=false metric_for_best_model={best.metric}"
            problem = f"the best evaluation's checkpoint, {folder}, is damaged ({problem})"
            raise CheckpointError(f"{problem}; resume with {again} to save the last weights")
        load_checkpoint(folder, model, None, accelerator)
        value = f"{best.metric} {best.metrics[best.metric]:.4f}"
        logger.info(f"the best evaluation came after step {best.step} ({value}): its weights are saved")

    def stop_here(step: int) -> None:
        """End the run after a checkpoint. Collective."""
        run_log.close()
        if hub:
            hub.close()
        accelerator.wait_for_everyone()  # or torchrun ends the main process when the first of the others has gone
        again = f"--resume_from_checkpoint=latest --output_dir={output_dir}"
        raise Stopped(f"stopped after step {step}; go on with {again}")

    def check_skipped_step(step: int, grad_norm: float) -> None:
        """Name the pairs of a step whose numbers are not finite; NonFiniteError after too many in a row. Collective."""
        has_scaler = accelerator.mixed_precision == "fp16"
        limit = SCALER_STEPS if has_scaler else config.max_nonfinite_steps
        if has_scaler and skipped_in_a_row <= limit:
            return  # it looks for its scale
        indices = plan.indices(step)
        bad = ~np.isfinite(score(train_pairs.dataset.select(indices))).all(axis=1)
        ids = train_pairs.ids(indices[bad | ~bad.any()])
        what = f"the rewards of {bad.sum()} pairs are" if bad.any() else f"the gradient (norm {grad_norm}) is"
        message = f"step {step + 1}: {what} not finite; its pairs: {', '.join(ids)}"
        if skipped_in_a_row > limit:
            raise NonFiniteError(message)
        logger.warning(f"{message}; the step is left out ({skipped_in_a_row} in a row of {limit} allowed)")

    # ------------------------------------------------------------------------------ training
    finder = BatchSizeFinder(accelerator, plan, meter, optimizer, enabled=config.auto_find_batch_size)
    hidden = {} if accelerator.is_main_process else {"disable": True}  # not False: that would undo TQDM_DISABLE
    bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, **hidden)
    bar.update(step)
    model.train()
    if accelerator.num_processes > 1 and not finder.sync_after:
        shortest = collate(train_set, plan.step(0)[0][-1], layout, tokenizer.pad_token_id).to(accelerator.device)
        settle_buckets(accelerator, model, shortest)  # collective
    stop.listen()
    if config.eval_on_start and step == 0:
        evaluate(step)  # collective
    clock = time.perf_counter() - done["seconds_since_log"]
    while step < total_steps and not best.patience_is_over:
        # -------------------------------------------------------------- fetch
        micro_batches, num_pairs = plan.step(step)  # this process's share; num_pairs counts every process's
        seed_everything(config.seed, step, accelerator.process_index)
        meter.begin_step()

        with finder.attempt():
            for i, micro_batch in enumerate(micro_batches):
                batch = collate(train_set, micro_batch, layout, tokenizer.pad_token_id).to(accelerator.device)
                with sync_on_last(accelerator, model, i, len(micro_batches), never=finder.sync_after):
                    # ------------------------------------------------------ forward, loss, backward
                    chosen_B, rejected_B = concatenated_forward(model, batch)
                    loss_B = pairwise_loss(
                        chosen_B,
                        rejected_B,
                        batch.margin_B,
                        center_rewards_coefficient=config.center_rewards_coefficient,
                        label_smoothing=config.label_smoothing_factor,
                    )
                    # a sum over pairs by the step's global count: the same gradient however the step was cut up
                    # (x processes, since DDP and FSDP average over them)
                    accelerator.backward((loss_B * batch.weight_B).sum() * accelerator.num_processes / num_pairs)
                meter.update(loss_B, chosen_B, rejected_B, batch.weight_B, batch.input_ids_RL.numel())
        if finder.must_repeat(step):  # out of memory: the same step in smaller micro-batches
            continue
        if finder.sync_after:
            average_gradients(model, accelerator.num_processes)  # collective

        # -------------------------------------------------------------- clip and step
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)  # collective
        grad_norm = float(grad_norm)  # syncs the device here
        is_finite = math.isfinite(grad_norm) and meter.is_finite()
        stopping, is_skipped = any_process(accelerator, stop.received, not is_finite)  # collective: all do the same
        skipped, skipped_in_a_row = skipped + is_skipped, (skipped_in_a_row + 1) * is_skipped
        if is_skipped:
            check_skipped_step(step, grad_norm)  # collective
            skip_step(meter, accelerator.scaler)
        else:
            optimizer.step()
        learning_rate, head_learning_rate = optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
        if not follows_metric:
            scheduler.step()
        optimizer.zero_grad()
        step += 1
        bar.update()

        # -------------------------------------------------------------- evaluate
        paused, is_best = time.perf_counter(), False
        if eval_steps and step % eval_steps == 0 and step < total_steps:
            evaluated = {"step": step, "metrics": evaluate(step)}  # collective
            (stopping,) = any_process(accelerator, stopping or stop.received)  # it may have taken long
            is_best = best.update(**evaluated)
            if follows_metric:
                scheduler.step(evaluated["metrics"][config.metric_for_best_model or "eval/loss"])
        is_last = step == total_steps or best.patience_is_over
        clock += time.perf_counter() - paused  # speeds are of training alone

        # -------------------------------------------------------------- log
        if step % logging_steps == 0 or is_last:
            means, pairs, tokens = meter.read(lambda sums: accelerator.reduce(sums, "sum"))  # collective
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            total_pairs, train_seconds = total_pairs + pairs, train_seconds + seconds
            speed = {"speed/pairs_per_second": pairs / seconds, "speed/tokens_per_second": tokens / seconds}
            optim = {"optim/learning_rate": learning_rate, "optim/grad_norm": grad_norm, "optim/skipped_steps": skipped}
            if config.head_learning_rate is not None:
                optim["optim/head_learning_rate"] = head_learning_rate
            run_log.log(means | optim | {"train/epoch": step / plan.steps_per_epoch} | speed, step)
            bar.set_postfix_str(
                f"loss {means['train/loss']:.3f}, accuracy {means['train/accuracy']:.3f}, {pairs / seconds:.1f} pairs/s"
            )

        # -------------------------------------------------------------- save
        paused = time.perf_counter()
        if stopping or is_best or (save_steps and (step % save_steps == 0 or is_last)):
            checkpoint(step)  # collective
            saved_step = step
        clock += time.perf_counter() - paused
        if stopping:
            stop_here(step)
    bar.close()

    # ------------------------------------------------------------------------------ final evaluation, save
    metrics_lines, paused = run_log.num_lines, time.perf_counter()
    if best.patience_is_over:
        waited = f"{best.evaluations_waited} evaluations without a better {best.metric} than at step {best.step}"
        logger.info(f"stopped early after step {step} of {total_steps}: {waited}")
    final = evaluated["metrics"] if evaluated["step"] == step else evaluate(step)  # collective
    if any_process(accelerator, stop.received)[0]:  # there may be no time to save
        if saved_step != step:
            checkpoint(step, metrics_lines)  # as before this evaluation, which is done again
        stop_here(step)
    if evaluated["step"] != step:
        best.update(step, final)
    evaluated_step = step
    if config.load_best_model_at_end and best.step not in (None, step):
        load_best()  # collective
        final, evaluated_step = best.metrics, best.step
    sample = sample_of(len(train_pairs.dataset), config.num_normalization_samples, config.seed)
    kept = output_dir / "eval" / f"step-{evaluated_step}.parquet"
    table = on_main_process(accelerator, partial(read_table, kept))  # None: in a run that an older version began
    mistakes = [] if table is None else worst(table, NUM_MISTAKES)
    with cast_weights(model, config.eval_dtype):
        scale = reward_scale(score(train_pairs.dataset.select(sample))) if len(sample) else None  # collective
        traces = trace(eval_pairs, mistakes)  # collective
    if scale is not None:
        said = "rewards of {reward_answers:,} training answers: mean {reward_mean:.3f}, std {reward_std:.3f}"
        logger.info(said.format(**scale))
    with without_autocast(model):  # as transformers will serve it
        check = eval_pairs.dataset.select(range(min(8, len(eval_pairs.dataset))))
        check_rewards = score(check)  # collective
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    weights = accelerator.get_state_dict(model) if uses_deepspeed else full_state_dict(model)  # collective
    summary = means | final
    summary["train/steps"] = step
    if best.step is not None:
        summary["train/best_step"] = best.step
    summary["speed/train_seconds"] = round(train_seconds, 2)
    summary["speed/pairs_per_second"] = round(total_pairs / max(train_seconds, 1e-9), 2)
    summary["speed/peak_memory_gb"] = round(peak_memory_gb(accelerator.device), 3)
    summary = {name: finite(value) for name, value in summary.items()}  # JSON has no NaN
    if undo_liger is not None:
        undo_liger()  # what is saved is checked on a CPU
    if accelerator.is_main_process:
        save_model(
            getattr(model, "module", model),
            weights,
            tokenizer,
            output_dir,
            merge_adapter=config.merge_adapter,
            scale=scale,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            quantization_config=quantization,
        )
        verify_export(
            output_dir,
            [pair[f"input_ids_{side}"] for pair in check for side in ("chosen", "rejected")],
            check_rewards.flatten(),
            tolerance=5e-2 if is_half else 1e-3,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            quantization_config=quantization,
        )
        summary |= {"speed/total_seconds": round(time.perf_counter() - started, 2), "output_dir": str(output_dir)}
        if table is not None:
            records = mistake_records(eval_pairs, table, mistakes, step=evaluated_step, traces=traces)
            write_records(output_dir / "mistakes.jsonl", records)
        results = {
            "summary": summary,
            "intervals": {} if table is None else finite(to_metrics(table, intervals=True)),
            "breakdowns": {} if table is None else finite(breakdowns(table)),
            "config": record,
            "adapter": redact(adapter_settings(getattr(model, "module", model).classifier)),
            "layout": f"{layout} ({reason})",
            "normalization": scale,
            "data": report,
            **provenance(),
        }
        datasets = filter(hub_name, names_in(config.dataset_name) + names_in(config.eval_dataset_name))
        card = model_card(
            results,
            name=run_name,
            base_model=hub_name((results["adapter"] or {}).get("base_model_name_or_path") or config.model_name_or_path),
            datasets=list(dict.fromkeys(datasets)),
            license=config.license,
            repo_id=hub and hub.repo_id,
        )
        write_text(output_dir / "README.md", card)
        write_text(output_dir / "results.json", json.dumps(results, indent=2))
        run_log.summary(summary)
        write_report(output_dir)
        logger.info(f"report: {output_dir / 'report.html'}")
        log_charts(run_log, output_dir, evaluated_step)
    run_log.close()
    is_main_process = accelerator.is_main_process
    accelerator.end_training()
    stop.restore()  # all is saved
    if is_main_process:
        summary = hub.push_run(output_dir, summary) if hub else summary
        print(json.dumps(summary), flush=True)
    return summary


def print_last(message: str) -> None:
    """Print to stderr, below the progress bar that an error has left half drawn."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(safe_line(message), file=sys.stderr, flush=True)


def run() -> int:
    """`main` with its errors as exit codes: 2 wrong configuration or data, 3 non-finite numbers, 143 stopped by
    SIGTERM after a checkpoint, 1 anything else."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    transformers.logging.set_verbosity_error()  # its reports say of a new head what we log in one line
    transformers.logging.disable_progress_bar()
    argv = sys.argv[1:]
    sys.argv[1:] = redact_arguments(argv)  # which results.json and W&B record
    try:
        with logging_redirect_tqdm():
            main(argv)
        return 0
    except Stopped as stopped:
        print_last(str(stopped))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # a shell sees 143; sweep agents take an exit code above 0 for a failure
        return 143
    except (InputError, NonFiniteError, ExportError) as error:
        print_last(f"error: {error}")
        return 2 if isinstance(error, InputError) else 3 if isinstance(error, NonFiniteError) else 1
    except KeyboardInterrupt:
        print_last("interrupted; nothing had to be saved")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except (CheckpointError, MemoryError) as error:
        print_last(f"error: {error}")
        return 1
    except OSError as error:
        if not isinstance(error, DiskError) and error.errno not in FULL_DISK:
            raise
        print_last(f"error: {error.filename or 'a file of the run'} cannot be written ({error.strerror}); {GO_ON}")
        return 1
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        fix = "give a smaller micro_batch_tokens (no result depends on it), or auto_find_batch_size=true"
        print_last(f"error: out of memory; {fix} ({str(error).splitlines()[0][:200]})")
        return 1


if __name__ == "__main__":
    sys.exit(run())
