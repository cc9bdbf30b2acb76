"""The loss: Bradley-Terry with margin, soft labels, label smoothing, centering. Pure and unreduced; C comparisons."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(
    chosen_C: Tensor,
    rejected_C: Tensor,
    margin_C: Tensor | None = None,
    p_chosen_C: Tensor | None = None,
    *,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each comparison's label under the Bradley-Terry model.

    Args:
        chosen_C, rejected_C: rewards, float [C].
        margin_C: log-odds by which chosen should win at least, float [C] (Touvron et al. 2023, Llama 2, eq. 2).
        p_chosen_C: probability that chosen is better (a soft label), float [C] in [0, 1]. None: 1.
        center_rewards_coefficient: weight of (r_chosen + r_rejected)^2 (Eisenstein et al. 2023, section 3; TRL
            recommends 0.01). None: off.
        label_smoothing: probability that a label is flipped (Wang et al. 2024, "Secrets of RLHF part II"). 0: off.

    Returns:
        The loss of each comparison in nats, float [C]. With the defaults it is TRL's `RewardTrainer` loss before its
        mean.

    Raises:
        ValueError: a shape is not [C]; broadcasting a margin of [C] against rewards of [C, 1] would give [C, C].
    """
    for name, value in (("rejected", rejected_C), ("margin", margin_C), ("p_chosen", p_chosen_C)):
        if value is not None and value.shape != chosen_C.shape or chosen_C.ndim != 1:
            got = tuple(chosen_C.shape) if value is None else (tuple(chosen_C.shape), tuple(value.shape))
            raise ValueError(f"chosen and {name} must both have shape [C], got {got}")

    # -log sigmoid(r_c - r_r - m)
    logits_C = chosen_C - rejected_C
    if margin_C is not None:
        logits_C = logits_C - margin_C
    loss_C = -F.logsigmoid(logits_C)

    # p' · -log sigmoid(z) + (1 - p') · -log sigmoid(-z)  =  -log sigmoid(z) + (1 - p') · z
    # with p' = (1 - s) p + s (1 - p)
    if p_chosen_C is not None:
        loss_C = loss_C + (label_smoothing * p_chosen_C + (1 - label_smoothing) * (1 - p_chosen_C)) * logits_C
    elif label_smoothing:
        loss_C = loss_C + label_smoothing * logits_C

    # + c · (r_c + r_r)²
    if center_rewards_coefficient is not None:
        loss_C = loss_C + center_rewards_coefficient * (chosen_C + rejected_C) ** 2
    return loss_C
