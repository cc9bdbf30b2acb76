"""The loss: Bradley-Terry with margin, centering and label smoothing. Pure and unreduced; B is pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin_B: Tensor | None = None,
    *,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each pair's label under the Bradley-Terry model.

    Args:
        chosen_B, rejected_B: rewards, float [B].
        margin_B: log-odds by which chosen should win at least, float [B] (Touvron et al. 2023, Llama 2, eq. 2).
        center_rewards_coefficient: weight of (r_chosen + r_rejected)^2 (Eisenstein et al. 2023, section 3; 0.01 is
            what TRL recommends). None: off.
        label_smoothing: probability that the label is wrong (Wang et al. 2024, "Secrets of RLHF part II"). 0: off.

    Returns:
        The loss of each pair in nats, float [B]. With the defaults it is TRL's `RewardTrainer` loss before its mean.

    Raises:
        ValueError: a shape is not [B]; broadcasting a margin of [B] against rewards of [B, 1] would give [B, B].
    """
    for name, value in (("rejected", rejected_B), ("margin", margin_B)):
        if value is not None and value.shape != chosen_B.shape or chosen_B.ndim != 1:
            got = tuple(chosen_B.shape) if value is None else (tuple(chosen_B.shape), tuple(value.shape))
            raise ValueError(f"chosen and {name} must both have shape [B], got {got}")

    # -log sigmoid(r_c - r_r - m)
    logits_B = chosen_B - rejected_B
    if margin_B is not None:
        logits_B = logits_B - margin_B
    loss_B = -F.logsigmoid(logits_B)

    # (1 - s) · -log sigmoid(z) + s · -log sigmoid(-z)  =  -log sigmoid(z) + s · z
    if label_smoothing:
        loss_B = loss_B + label_smoothing * logits_B

    # + c · (r_c + r_r)²
    if center_rewards_coefficient is not None:
        loss_B = loss_B + center_rewards_coefficient * (chosen_B + rejected_B) ** 2
    return loss_B
