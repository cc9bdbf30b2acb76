"""Evaluation tables made by hand."""

import numpy as np
import pandas as pd

from rm.config.options import LossOptions

CONFIG = LossOptions()


def table(rewards, **columns) -> pd.DataFrame:
    """One comparison for each (chosen, rejected) of `rewards`, by default each with a prompt of its own."""
    n, (chosen, rejected) = len(rewards), np.asarray(rewards, dtype=float).T
    plain = {"id": [f"p{i}" for i in range(n)], "set": "toy", "row": np.arange(n), "prompt": np.arange(n)}
    plain |= {"index": np.arange(n), "chosen": 0, "rejected": 1, "number_chosen": 0, "number_rejected": 1}
    plain |= {"length_chosen": 3, "length_rejected": 3, "prefix_length": 1}
    plain |= {"share": 1.0, "margin": 0.0, "weight": 1.0, "p_chosen": 1.0}
    return pd.DataFrame(plain | {"reward_chosen": chosen, "reward_rejected": rejected} | columns, index=range(n))


def by_margins(margins, **columns) -> pd.DataFrame:
    return table([[m, 0.0] for m in margins], **columns)
