"""What metrics read: the columns of an evaluation table, its answers, its losses. C comparisons, N answers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from rm.config.options import LossOptions
from rm.loss import pairwise_loss, plackett_luce_loss


@dataclass(frozen=True)
class Rows:
    """An evaluation table as float64 arrays."""

    table: pd.DataFrame
    options: LossOptions

    def __getitem__(self, column: str) -> np.ndarray:
        return self.table[column].to_numpy(np.float64)

    @cached_property
    def rewards(self) -> np.ndarray:
        """Rewards of the chosen and the rejected answers [2, C]; raises `FloatingPointError` if one is not finite."""
        rewards = np.stack([self["reward_chosen"], self["reward_rejected"]])
        if not np.isfinite(rewards).all():
            raise FloatingPointError("a reward is NaN or infinite, and so are metrics of the rewards")
        return rewards

    @cached_property
    def margin(self) -> np.ndarray:
        """reward_chosen - reward_rejected [C]; the margin in the data is `self["margin"]`."""
        return self.rewards[0] - self.rewards[1]

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of all answers without the common prefix, first the chosen ones [2C]."""
        return np.concatenate([self[f"length_{side}"] - self["prefix_length"] for side in ("chosen", "rejected")])

    @cached_property
    def answers(self) -> pd.DataFrame:
        """Each compared answer once, prompt by prompt [N]: `index`, `reward`, `prompt`, and `score` if there is one.
        Raises as `rewards` does."""
        sides, _ = [], self.rewards
        for side in ("chosen", "rejected"):
            names = {side: "answer", f"reward_{side}": "reward", f"score_{side}": "score"}
            names = {name: new for name, new in names.items() if name in self.table}
            sides.append(self.table[["index", "prompt", *names]].rename(columns=names))
        answers = pd.concat(sides).drop_duplicates(["index", "answer"])
        return answers.sort_values(["index", "answer"], ignore_index=True)

    @cached_property
    def has_highest_reward(self) -> pd.Series:
        """Which of `answers` have the highest reward of their prompt."""
        return self.answers["reward"] == self.answers.groupby("index")["reward"].transform("max")

    def of_prompts(self, values: pd.Series) -> np.ndarray:
        """Values of prompts by their `index` for each comparison [C]: since shares add up to 1, prompts count once."""
        return values.reindex(self.table["index"]).to_numpy(np.float64)

    def losses(self, all_equal: bool = False) -> np.ndarray:
        """Training loss of each comparison [C], times its weight; or what it would be if all rewards were equal."""
        options = self.options.loss_options
        if self.options.loss_type == "plackett_luce":
            counts = self.answers.groupby("index").size()
            columns = ((1 - all_equal) * self.answers["reward"], self.answers["score"], counts)
            loss_P = plackett_luce_loss(*(torch.tensor(column.to_numpy()) for column in columns), **options)
            return self.of_prompts(pd.Series(loss_P.numpy(), counts.index))
        rewards = np.zeros((2, len(self.table))) if all_equal else self.rewards
        columns = map(torch.tensor, (*rewards, self["margin"], self["p_chosen"]))
        return self["weight"] * pairwise_loss(*columns, **options).numpy()

    def decided(self, w: np.ndarray) -> np.ndarray:
        """The weights with 0 for label ties (p_chosen = 0.5)."""
        return np.where(self["p_chosen"] == 0.5, 0, w)
