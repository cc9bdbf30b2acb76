"""Which evaluation was the best so far, and whether it is time to stop."""

from __future__ import annotations

import math
from typing import Any

NO_DIRECTION = (  # metrics that tell what a model is like, or what the data are
    "temperature prompt_share reward_length_spearman margin_length_spearman null_length_accuracy null_prompt_loss "
    "accuracy_ceiling reward_chosen reward_rejected reward_mean reward_std reward_min reward_max pairs prompts"
).split()


class BestEvaluation:
    """The best evaluation by one metric, and how many have come since the last real improvement.

    Args:
        metric: its name, such as eval/accuracy; None: nothing is ever the best.
        greater_is_better: None: by the name, see `is_greater_better`.
        patience: so many evaluations in a row without an improvement by more than `threshold` are enough; None: never.
    """

    def __init__(
        self,
        metric: str | None,
        greater_is_better: bool | None = None,
        *,
        patience: int | None = None,
        threshold: float = 0.0,
    ):
        self.metric, self.patience, self.threshold = metric, patience, threshold
        self.greater_is_better = is_greater_better(metric, greater_is_better)
        self.step: int | None = None
        self.metrics: dict[str, float] = {}
        self.evaluations_waited = 0

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """Take in the evaluation after `step`; whether it is the best so far. NaN never is."""
        if self.metric is None:
            return False
        sign = 1 if self.greater_is_better else -1
        gain = sign * metrics[self.metric] - sign * self.metrics.get(self.metric, -sign * math.inf)  # NaN > 0 is False
        self.evaluations_waited = 0 if gain > self.threshold else self.evaluations_waited + 1
        if gain > 0:
            self.step, self.metrics = step, dict(metrics)
        return gain > 0

    @property
    def patience_is_over(self) -> bool:
        return self.patience is not None and self.evaluations_waited >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, for `load_state`."""
        return {"step": self.step, "metrics": self.metrics, "evaluations_waited": self.evaluations_waited}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.metrics = state["step"], state["metrics"]
        self.evaluations_waited = state["evaluations_waited"]


def is_greater_better(metric: str | None, greater_is_better: bool | None) -> bool:
    """Whether more of a metric is better: as was said, or else unless it is a loss or an error.

    Raises:
        ValueError: nothing was said, and neither more nor less of this metric makes a better model.
    """
    if greater_is_better is not None:
        return greater_is_better
    last = (metric or "loss").rpartition("/")[2]
    if last in NO_DIRECTION:
        raise ValueError(f"metric_for_best_model={metric}: more of it is not better, nor less; give greater_is_better")
    return not (last.endswith("loss") or last in ("brier", "ece", "ties"))
