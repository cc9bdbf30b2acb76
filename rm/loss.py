"""The losses: Bradley-Terry for comparisons, Plackett-Luce for rankings. Pure functions without reduction over a batch.

Shape suffixes: C comparisons, N answers (of all prompts), P prompts.
"""

import torch
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


def plackett_luce_loss(
    rewards_N: Tensor,
    score_N: Tensor,
    num_answers_P: Tensor,
    *,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    """Negative log-likelihood of each prompt's ranking under the Plackett-Luce model, as a mean over its choices.

    An answer is chosen among itself and all answers with a lower score: -log softmax of the rewards of these answers.
    An answer with the lowest score makes no choice. Answers with equal scores are not compared with each other, so a
    ranking without ties is the model of Plackett (1975), and two answers give the Bradley-Terry loss. The mean over
    choices (not the sum) gives every prompt the same weight, however many answers it has.

    Args:
        rewards_N, score_N: rewards, and scores of the data (higher is better), float [N], prompt by prompt.
        num_answers_P: answers of each prompt, int64 [P]; its sum is N.
        center_rewards_coefficient: weight of (2 x mean reward of the prompt)^2, which for two answers is the term of
            `pairwise_loss`. None: off.

    Returns:
        The loss of each prompt in nats, float [P].

    Raises:
        ValueError: rewards and scores do not both have shape [N].
    """
    if rewards_N.ndim != 1 or score_N.shape != rewards_N.shape:
        raise ValueError(f"rewards and scores must both have shape [N], got {rewards_N.shape} and {score_N.shape}")
    num_prompts, num_answers = len(num_answers_P), len(rewards_N)
    prompts_P = torch.arange(num_prompts, device=rewards_N.device)
    prompt_N = prompts_P.repeat_interleave(num_answers_P, output_size=num_answers)  # output_size: does not sync

    # -log softmax(r)_i over {i} and all j of the prompt with score_j < score_i
    is_lower_NN = (prompt_N == prompt_N[:, None]) & (score_N < score_N[:, None])
    is_candidate_NN = is_lower_NN | torch.eye(num_answers, dtype=torch.bool, device=rewards_N.device)
    candidates_NN = rewards_N.expand(num_answers, -1).masked_fill(~is_candidate_NN, -torch.inf)
    loss_N = candidates_NN.logsumexp(1) - rewards_N
    is_choice_N = is_lower_NN.any(1).to(loss_N.dtype)

    def sum_P(values_N: Tensor) -> Tensor:
        return torch.zeros(num_prompts, dtype=loss_N.dtype, device=loss_N.device).index_add(0, prompt_N, values_N)

    loss_P = sum_P(loss_N) / sum_P(is_choice_N).clamp(min=1)
    if center_rewards_coefficient is not None:
        loss_P = loss_P + center_rewards_coefficient * (2 * sum_P(rewards_N) / num_answers_P) ** 2
    return loss_P
