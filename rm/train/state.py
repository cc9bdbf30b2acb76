"""The state of a training: what a resumed run needs besides weights and optimizer state.

Shape suffixes: C comparisons, K meters.
"""

import difflib
import logging
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rm.collate import Batch
from rm.config.errors import InputError, RunError
from rm.config.options import RewardConfig
from rm.data.dataset import PreferenceData
from rm.data.plan import StepPlan
from rm.evaluate.metrics import find_metric
from rm.evaluate.table import evaluation_metrics, evaluation_table

logger = logging.getLogger(__name__)

SCALER_STEPS = 20  # steps in a row that the loss scaler of fp16 may skip while it searches its scale


class NonFiniteError(RunError):
    """The loss or the gradient is NaN or infinite; the weights were not updated with it."""

    exit_code = 3


class Meter:
    """Sums over comparisons since the last log, on the device; `read` and `state_dict` sync it.

    Each comparison counts with its share, so that a prompt counts once. Label ties (p_chosen = 0.5) have no accuracy.
    """

    NAMES = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # Apple GPUs have no float64
        self.sums = torch.zeros(len(self.NAMES) + 4, dtype=dtype, device=accelerator.device)
        self.before_step = self.sums.clone()

    def begin_step(self) -> None:
        """Remember the sums for `undo_step`."""
        self.before_step.copy_(self.sums)

    def undo_step(self) -> None:
        """Forget what was added since `begin_step`: the step is repeated or skipped."""
        self.sums.copy_(self.before_step)

    def update(self, loss_C: Tensor, chosen_C: Tensor, rejected_C: Tensor, batch: Batch) -> None:
        """Add the comparisons of one micro-batch (share 0 in a dummy micro-batch), and its tokens."""
        margin_C, share_C = (chosen_C - rejected_C).detach(), batch.share_C
        has_label_C = batch.p_chosen_C != 0.5
        accuracy_C = has_label_C * ((margin_C > 0) + 0.5 * (margin_C == 0))  # equal rewards count half
        values_KC = torch.stack([v.detach().float() for v in (loss_C, accuracy_C, margin_C, chosen_C, rejected_C)])
        self.sums[:-4] += (values_KC * share_C).to(self.sums.dtype).sum(1)
        self.sums[-4] += share_C.sum()
        self.sums[-3] += (share_C * has_label_C).sum()
        self.sums[-2] += (share_C > 0).sum()
        self.sums[-1] += batch.input_ids_RL.numel()

    def read(self) -> tuple[dict[str, float], float, float]:
        """(means over the prompts of all processes as `train/…`, comparisons, tokens); resets the sums. Collective."""
        *sums, prompts, labelled, comparisons, tokens = self.accelerator.reduce(self.sums, "sum").tolist()  # syncs
        self.sums.zero_()
        counts = [labelled if name == "accuracy" else prompts for name in self.NAMES]
        means = [s / count if count else math.nan for s, count in zip(sums, counts, strict=True)]
        return {f"train/{name}": mean for name, mean in zip(self.NAMES, means, strict=True)}, comparisons, tokens

    def state_dict(self) -> list[list[float]]:
        """The sums of every process since the last log. Collective."""
        return self.accelerator.gather(self.sums[None]).tolist()

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Restore the sums; all of them on the main process if the number of processes has changed."""
        sums = torch.tensor(state, dtype=torch.float64)
        if len(state) == self.accelerator.num_processes:
            self.sums.copy_(sums[self.accelerator.process_index])
        elif self.accelerator.is_main_process:
            self.sums.copy_(sums.sum(0))


class BestEvaluation:
    """The best evaluation by `metric_for_best_model`, and how many evaluations ago the last improvement was.

    A gain of at most `early_stopping_threshold` is the best, but no improvement. Raises `InputError` if evaluations on
    `eval_set` do not have the metric, or it has no direction.
    """

    def __init__(self, config: RewardConfig, eval_set: PreferenceData):
        self.metric, self.greater_is_better = config.metric_for_best_model, config.greater_is_better
        known = evaluation_metrics(evaluation_table(eval_set), config) if self.metric else {}
        if self.metric and self.metric not in known:
            near = ", ".join(difflib.get_close_matches(self.metric, known, n=5, cutoff=0))
            raise InputError(f"metric_for_best_model={self.metric}: no such metric; the nearest: {near}")
        if self.greater_is_better is None:
            self.greater_is_better = find_metric(self.metric or "eval/loss").higher_is_better
        if self.greater_is_better is None:
            raise InputError(f"metric_for_best_model={self.metric} has no direction; set greater_is_better")
        self.patience, self.threshold = config.early_stopping_patience, config.early_stopping_threshold
        self.step: int | None = None
        self.metrics: dict[str, float] = {}
        self.evaluations_waited = 0
        self.summary: list[Any] | None = None  # metric (or accuracy), its best value, and after which step; to be shown

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """Compare the evaluation after `step`; returns whether it is the best so far. NaN never is."""
        name = self.metric or "eval/accuracy"
        sign = 1 if self.greater_is_better or self.metric is None else -1
        gain = sign * metrics[name] - (sign * self.summary[1] if self.summary else -math.inf)
        if gain > 0:  # False for NaN
            self.summary = [name, metrics[name], step]
        if self.metric is None:
            return False
        self.evaluations_waited = 0 if gain > self.threshold else self.evaluations_waited + 1
        if gain > 0:
            self.step, self.metrics = step, dict(metrics)
        return gain > 0

    @property
    def patience_is_over(self) -> bool:
        return self.patience is not None and self.evaluations_waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("step", "metrics", "evaluations_waited", "summary")}


class TrainState:
    """Counters, means, and the objects with a state.

    step: optimizer steps done, skipped ones included. skipped_steps, skipped_in_a_row: steps without an update.
    seconds: of training since the last log. means: the last logged ones. num_pairs, train_seconds: of logged steps.
    evaluation: {"step", "metrics"} of the last one. metrics_lines: lines of metrics.jsonl that a resumed run keeps.
    """

    def __init__(
        self, config: RewardConfig, accelerator: Accelerator, plan: StepPlan, scheduler: Any, best: BestEvaluation
    ):
        self.step, self.skipped_steps, self.skipped_in_a_row = 0, 0, 0
        self.seconds, self.train_seconds, self.num_pairs = 0.0, 0.0, 0.0
        self.means: dict[str, float] = {}
        self.evaluation: dict[str, Any] = {"step": None, "metrics": {}}
        self.metrics_lines: int | None = None
        self.saved = list(vars(self))  # the attributes so far are saved as they are
        self.meter, self.best, self.scaler = Meter(accelerator), best, accelerator.scaler
        self.config, self.plan, self.scheduler = config, plan, scheduler

    def skip_step(self, problem: str) -> None:
        """Leave the current step out of the means; the loss scaler of fp16 lowers its scale.

        Raises `NonFiniteError` if too many steps in a row were skipped.
        """
        self.meter.undo_step()
        self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
        limit = SCALER_STEPS if self.scaler is not None else self.config.max_nonfinite_steps
        message = f"step {self.step + 1}: {problem}"
        if self.skipped_in_a_row > limit:
            raise NonFiniteError(message)
        if self.scaler is not None:
            self.scaler.update()
        else:
            logger.warning(f"{message}; the step is skipped ({self.skipped_in_a_row} in a row of {limit} allowed)")

    def read_means(self) -> dict[str, float]:
        """Means and speeds since the last call; they are added to the totals. Collective; syncs the device."""
        self.means, num_pairs, num_tokens = self.meter.read()
        self.num_pairs, self.train_seconds = self.num_pairs + num_pairs, self.train_seconds + self.seconds
        speeds = {"pairs_per_second": num_pairs / self.seconds, "tokens_per_second": num_tokens / self.seconds}
        self.seconds = 0.0
        return self.means | {f"speed/{name}": value for name, value in speeds.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON takes it. Collective."""
        parts = {"best": self.best, "meter": self.meter, "schedule": self.scheduler, "scaler": self.scaler}
        state = {name: vars(self)[name] for name in self.saved}
        state |= {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return state | {"micro_batch_tokens": [self.config.micro_batch_tokens, self.plan.micro_batch_tokens]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update({name: state[name] for name in self.saved})
        vars(self.best).update(state["best"])
        self.meter.load_state_dict(state["meter"])
        self.scheduler.load_state_dict(state["schedule"])
        for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        given, current = state["micro_batch_tokens"]
        if given == self.config.micro_batch_tokens:  # else `auto_find_batch_size` starts anew
            self.plan.micro_batch_tokens = current
