"""Train a reward model on preference data: the whole program, top to bottom.

accelerate launch train_rm.py                                       # the quickstart: no network, under a minute
accelerate launch train_rm.py --config configs/hh_rlhf_gpt2.yaml --learning_rate=1e-5
python train_rm.py --help                                           # every option

Shape suffixes: C comparisons.
"""

import errno
import logging
import math
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial

from rm.config.cli import answer_early, parse_config

if __name__ == "__main__":
    answer_early(sys.argv[1:])  # --help or a wrong option: before the seconds of imports

import numpy as np
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rm.collate import collate
from rm.config.errors import RunError
from rm.config.files import GO_ON, DiskError
from rm.config.options import FOLLOW_EVALUATIONS
from rm.config.redact import redact_arguments, safe_line
from rm.data.audit import audit_table, data_report
from rm.data.dataset import PreferenceData
from rm.data.mixture import load_data
from rm.data.plan import StepPlan
from rm.data.tokenizer import load_tokenizer
from rm.evaluate.evaluator import Evaluator, evaluation_line
from rm.forward import choose_layout, concatenated_forward
from rm.log.trackers import RunLog, print_safely, run_and_exit
from rm.loss import pairwise_loss, plackett_luce_loss
from rm.model.load import check_positions, load_reward_model
from rm.train.checkpoint import Checkpoints
from rm.train.finish import complete_run, finish_run
from rm.train.optimizer import make_optimizer, make_scheduler
from rm.train.processes import GradientAccumulation, Stopped, StopSignal, any_process, make_accelerator, seed_everything
from rm.train.run_dir import Run
from rm.train.sharding import shard_model
from rm.train.state import BestEvaluation, TrainState

logger = logging.getLogger("train_rm")
RESUME = "--resume_from_checkpoint=latest"


def main(argv: list[str]) -> dict:
    """Train a reward model; returns the summary, which is also printed as the last line on stdout."""
    # ------------------------------------------------------------------------------ options, run directory
    config, stop = parse_config(argv), StopSignal()
    accelerator = make_accelerator(config)  # rejects what this launcher, engine or device does not support
    run = Run(config, accelerator)  # collective: locks the directory, finds the checkpoint to resume from
    if run.results is not None:  # training is done: only what describes the run may be missing
        return complete_run(run, accelerator)  # collective
    seed_everything(config.seed, 0, accelerator.process_index)

    # ------------------------------------------------------------------------------ data, model, optimizer
    tokenizer = load_tokenizer(config)
    with accelerator.local_main_process_first():  # collective: it tokenizes, the others read its cache
        train_set, eval_set = load_data(tokenizer, config)
    if accelerator.is_main_process:
        print_safely(audit_table(train_set, eval_set))
    for data in (train_set, eval_set) if config.loss_type == "plackett_luce" else ():
        data.check_rankings()
    best = BestEvaluation(config, eval_set)  # rejects a metric that the evaluation does not have
    check_positions(config, max(train_set.audit["max_tokens"], eval_set.audit["max_tokens"]))
    model = load_reward_model(tokenizer, config)
    run.check_content(model, train_set, eval_set)  # collective: a resumed run has the same data and base model
    shard_model(model, accelerator)  # collective; under FSDP2 only, before the optimizer gets the weights
    optimizer = make_optimizer(model, config)
    if accelerator.is_fsdp2:
        optimizer = accelerator.prepare_optimizer(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    layout = choose_layout(config.layout, model, train_set, tokenizer.pad_token_id)  # collective
    logger.info(f"layout: {layout.name} ({layout.reason})")
    losses = {"bradley_terry": pairwise_loss, "plackett_luce": plackett_luce_loss}
    loss_fn = partial(losses[config.loss_type], **config.loss_options)

    # ------------------------------------------------------------------------------ plan, state
    batch_size = config.global_batch_size(accelerator.num_processes)
    plan = StepPlan(train_set, layout, config, batch_size, accelerator.process_index, accelerator.num_processes)
    total_steps = plan.total_steps(config.num_train_epochs, config.max_steps)
    logger.info(
        f"plan: {total_steps} steps of {batch_size} prompts ({plan.steps_per_epoch} per epoch) on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {config.micro_batch_tokens} tokens per forward pass"
    )
    logging_steps = in_steps(config.logging_steps, total_steps)
    eval_steps, save_steps = (in_steps(every, total_steps) for every in (config.eval_steps, config.save_steps))
    scheduler = make_scheduler(optimizer, total_steps, config, best.greater_is_better)
    follows_metric = config.lr_scheduler_type in FOLLOW_EVALUATIONS
    state = TrainState(config, accelerator, plan, scheduler, best)
    checkpoints = Checkpoints(run, accelerator, model, optimizer, state)
    checkpoints.resume()  # collective
    config = replace(config, mixed_precision=accelerator.mixed_precision)  # which the launcher may have set
    run.claim(config.to_yaml(), data_report(train_set, eval_set))  # collective: removes what an earlier run left
    log = RunLog(config, run.folder, run.name, run.record, state.metrics_lines, accelerator.is_main_process)
    evaluator = Evaluator(eval_set, model, accelerator, layout, config, run, log)

    # ------------------------------------------------------------------------------ training
    accumulation = GradientAccumulation(accelerator, model, plan, state.meter, config.auto_find_batch_size)
    accumulation.settle_buckets(collate(train_set, plan.step(0)[0][-1], layout))  # collective
    is_shown = accelerator.is_main_process and sys.stderr.isatty()
    bar = tqdm(total=total_steps, initial=state.step, unit="step", **({} if is_shown else {"disable": True}))
    model.train()
    stop.listen()
    if config.eval_on_start and state.step == 0:
        logger.info(evaluation_line(0, evaluator(0)))  # collective
    while state.step < total_steps and not best.patience_is_over:
        # -------------------------------------------------------------- fetch
        step_started = time.perf_counter()
        micro_batches, num_prompts = plan.step(state.step)  # of this process; prompts of all processes
        seed_everything(config.seed, state.step, accelerator.process_index)
        with accumulation.attempt(state.step):
            for i, micro_batch in enumerate(micro_batches):
                batch = collate(train_set, micro_batch, layout).to(accelerator.device)
                with accumulation.sync_on_last(i, len(micro_batches)):
                    # ------------------------------------------------------ forward
                    chosen_C, rejected_C, rewards_N = concatenated_forward(model, batch)
                    # ------------------------------------------------------ loss
                    if config.loss_type == "plackett_luce":  # of a prompt; the shares of its comparisons add up to 1
                        loss_C = loss_fn(rewards_N, batch.score_N, batch.num_answers_P)[batch.prompt_C]
                    else:
                        loss_C = batch.weight_C * loss_fn(chosen_C, rejected_C, batch.margin_C, batch.p_chosen_C)
                    # ------------------------------------------------------ backward
                    # each prompt counts once: share is 1 / its comparisons; the sum / the global number of prompts is
                    # the same gradient however the step is split (x processes, since DDP and FSDP average over them)
                    accelerator.backward((loss_C * batch.share_C).sum() * accelerator.num_processes / num_prompts)
                state.meter.update(loss_C, chosen_C, rejected_C, batch)
        if accumulation.ran_out:  # of memory: the same step in smaller micro-batches
            continue

        # -------------------------------------------------------------- clip and step
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)  # collective
        is_finite = math.isfinite(grad_norm) and bool(state.meter.sums.isfinite().all())  # syncs the device
        stopping, is_skipped = any_process(accelerator, stop.received, not is_finite)  # collective: all do the same
        if is_skipped:
            state.skip_step(name_nonfinite(grad_norm, evaluator, train_set, plan.prompts(state.step)))  # collective
        else:
            optimizer.step()
            state.skipped_in_a_row = 0
        rates = [group["lr"] for group in optimizer.param_groups]  # the last one is that of the head
        if not follows_metric:
            scheduler.step()
        optimizer.zero_grad()
        state.step, state.seconds = state.step + 1, state.seconds + time.perf_counter() - step_started
        bar.update()

        # -------------------------------------------------------------- evaluate
        is_best, is_last = False, state.step == total_steps
        if is_last or (eval_steps and state.step % eval_steps == 0):
            metrics = evaluator(state.step)  # collective
            state.evaluation, is_best = {"step": state.step, "metrics": metrics}, best.update(state.step, metrics)
            logger.info(evaluation_line(state.step, metrics, best.summary))
            if follows_metric:
                scheduler.step(metrics[config.metric_for_best_model or "eval/loss"])
            (stopping,) = any_process(accelerator, stopping or stop.received)  # collective: it may have taken long
            is_last = is_last or best.patience_is_over

        # -------------------------------------------------------------- log
        if is_last or state.step % logging_steps == 0:
            means = state.read_means()  # collective, syncs the device
            means |= {"optim/learning_rate": rates[0], "optim/grad_norm": float(grad_norm)}
            means |= {} if config.head_learning_rate is None else {"optim/head_learning_rate": rates[-1]}
            means |= {"optim/skipped_steps": state.skipped_steps, "train/epoch": state.step / plan.steps_per_epoch}
            log.log(means, state.step)
            show_means(means, state.step, bar)
        state.metrics_lines = log.num_lines

        # -------------------------------------------------------------- save
        is_due = save_steps and (is_last or state.step % save_steps == 0)
        if stopping or is_due or (is_best and not is_last):
            log.sync()
            checkpoints.save()  # collective
        if stopping:
            log.close()
            run.close()  # collective
            raise Stopped(f"stopped after step {state.step}; resume with {RESUME} --output_dir={run.folder}")
    bar.close()

    # ------------------------------------------------------------------------------ finish
    if best.patience_is_over:
        waited = f"{best.evaluations_waited} evaluations without a better {best.metric} than at step {best.step}"
        logger.info(f"stopped early after step {state.step} of {total_steps}: {waited}")
    if config.load_best_model_at_end:
        checkpoints.load_best()  # collective
    finish_run(run, evaluator, state, train_set)  # collective: the final model and results.json
    summary = complete_run(run, accelerator)  # collective: model card, report, export check, hub
    stop.restore()
    return summary


def in_steps(every: float, total_steps: int) -> int:
    """`logging_steps` and the like as a number of steps: below 1 it is a fraction of all steps."""
    return math.ceil(every * total_steps) if every < 1 else int(every)


def name_nonfinite(grad_norm: float, evaluator: Evaluator, train_set: PreferenceData, indices: np.ndarray) -> str:
    """What is not finite in a step, and the prompts with such rewards, or all of them. Collective."""
    bad = np.array([not np.isfinite(rewards).all() for rewards in evaluator.score(train_set, indices)])
    what = f"the rewards of {bad.sum()} prompts are" if bad.any() else f"the gradient (norm {float(grad_norm)}) is"
    return f"{what} not finite; its prompts: {', '.join(train_set.ids(indices[bad | ~bad.any()]))}"


def show_means(means: dict[str, float], step: int, bar: tqdm) -> None:
    """Show training metrics beside the progress bar, or without a terminal as a line."""
    text = f"loss {means['train/loss']:.3f}, accuracy {means['train/accuracy']:.3f}"
    text += f", {means['speed/pairs_per_second']:.1f} pairs/s"
    bar.set_postfix_str(text)
    if bar.disable:
        logger.info(f"step {step}/{bar.total}: {text}")


def run() -> int:
    """`main` with its errors as one line on stderr and an exit code: 2 wrong input, 3 numbers that are not finite, 143
    stopped by a signal after a checkpoint, 130 interrupted before the first step, 1 anything else."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    transformers.logging.set_verbosity_error()  # its report on a new head is one line of ours
    transformers.logging.disable_progress_bar()
    argv, code = sys.argv[1:], 1
    sys.argv[1:] = redact_arguments(argv)  # which results.json and W&B record
    try:
        with logging_redirect_tqdm():
            main(argv)
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted; nothing had to be saved", -signal.SIGINT
    except Stopped as error:
        message, code = str(error), -signal.SIGTERM
    except RunError as error:
        message, code = f"error: {error}", error.exit_code
    except OSError as error:
        if not (isinstance(error, DiskError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)):
            raise
        message = f"error: {error.filename or 'a file of the run'} cannot be written ({error.strerror}); {GO_ON}"
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        fix = "set a smaller micro_batch_tokens (it changes no result), or auto_find_batch_size=true"
        message = f"error: out of memory; {fix} ({str(error).splitlines()[0][:200]})"
    for bar in list(getattr(tqdm, "_instances", ())):  # which the error has left half drawn
        bar.close()
    print(safe_line(message), file=sys.stderr, flush=True)
    if code < 0:  # end by the signal: a launcher then sees 128 + its number, and a sweep agent no failure
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    run_and_exit(run)
