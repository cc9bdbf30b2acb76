"""The scores of RewardBench 1 and 2 by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from tables import by_margins, table

from rm.evaluate.rewardbench import PUBLISHED_PAIRS, SECTIONS, rewardbench_metrics
from rm.evaluate.statistics import wilson_interval


def subsets(**margins: list[float]) -> dict[str, pd.DataFrame]:
    """Pairs of the named subsets (`_` for `-`) with these reward differences."""
    return {name.replace("_", "-"): by_margins(values) for name, values in margins.items()}


def test_sections_have_the_published_weights():
    """rewardbench.constants of version 0.1.4."""
    sizes = {name: sum(weights.values()) for name, weights in SECTIONS.items()}
    assert sizes == {"chat": 358, "chat_hard": 456, "safety": 740, "reasoning": 984 * 2}
    assert sum(PUBLISHED_PAIRS.values()) == 2985 and len(PUBLISHED_PAIRS) == 23


def test_reasoning_by_hand():
    """math-prm weighs 984, each language 164; equal rewards are wrong. Without all subsets there is no whole score."""
    code = {f"hep_{name}": [1.0] for name in ("cpp", "go", "java", "js", "python")}
    parts = subsets(math_prm=[1, -1, 0, 2], **code, hep_rust=[0, 0])
    want = (984 * 2 / 4 + 5 * 164 * 1 + 164 * 0) / (984 + 6 * 164)
    assert rewardbench_metrics(parts) == {"rewardbench/reasoning": pytest.approx(want), "rewardbench/pairs": 11}


def whole(right: dict[str, float]) -> dict[str, pd.DataFrame]:
    """Four pairs of each subset, of which a section's share is right; each has a prompt of its own."""
    parts = {}
    for section, weights in SECTIONS.items():
        for name in weights:
            parts[name] = by_margins([1] * round(4 * right[section]) + [-1] * round(4 - 4 * right[section]))
            parts[name]["prompt"] += 4 * len(parts)
    return parts


def test_the_score_is_the_mean_of_the_sections():
    right = {"chat": 1.0, "chat_hard": 0.25, "safety": 0.5, "reasoning": 0.75}
    metrics, intervals = rewardbench_metrics(whole(right)), rewardbench_metrics(whole(right), intervals=True)
    assert {f"rewardbench/{name}": pytest.approx(value) for name, value in right.items()}.items() <= metrics.items()
    assert metrics["rewardbench/score"] == pytest.approx(0.625) and metrics["rewardbench/pairs"] == 92
    low, high = intervals["rewardbench/score"]
    assert 0.45 < low < 0.625 < high < 0.8
    assert intervals["rewardbench/chat"] == wilson_interval(1.0, 20)  # all are right


def test_other_data_are_not_rewardbench():
    assert rewardbench_metrics(subsets(brief=[1.0], detailed=[1.0])) == rewardbench_metrics({}) == {}
    assert rewardbench_metrics(whole(dict.fromkeys(SECTIONS, 1.0)) | subsets(brief=[1.0])) == {}


# ---------------------------------------------------------------- RewardBench 2


def groups(*prompts: tuple[str, str, list[float], list[float]]) -> dict[str, pd.DataFrame]:
    """Subsets of comparisons of each right answer with each wrong one: (id, subset, rewards of both)."""
    rows = []
    for row, (name, subset, right, wrong) in enumerate(prompts):
        known = {"id": name, "subset": subset, "row": row, "prompt": row, "share": 1 / (len(right) * len(wrong))}
        rows += [known | {"reward_chosen": r, "reward_rejected": w} for r in right for w in wrong]
    frame = table(np.zeros((len(rows), 2))).assign(**pd.DataFrame(rows))
    return dict(list(frame.groupby("subset")))


def scores(*prompts) -> dict[str, float]:
    return {name.removeprefix("rewardbench2/"): v for name, v in rewardbench_metrics(groups(*prompts)).items()}


@pytest.mark.parametrize(
    ("right", "wrong", "share"),
    [(3, [1, 2, 0], 1), (1, [3, 2, 0], 0), (3, [3, 3, 1], 1 / 3), (2, [3, 3, 2], 0), (0, [np.nan, 1, 2], np.nan)],
)
def test_the_share_of_the_right_answer(right, wrong, share):
    assert scores(("a", "Math", [right], wrong)) == {"math": pytest.approx(share, nan_ok=True), "prompts": 1}


TIES = (  # gap and spread: tied 1.0 and 1.0, ref 0.25; tied 1.0 and 2.0, ref -1.0
    ("tied:7", "Ties", [3.5, 2.5], [1.5, 1.0]),
    ("ref:7", "Ties", [2.25], [2.0, 1.0]),
    ("tied:8", "Ties", [4.0, 2.0], [1.0]),
    ("ref:8", "Ties", [1.0], [2.0]),
)


def test_ties_by_hand():
    want = 0.3 * 2 / 2 + 0.3 * 1 / 2 + 0.2 * (0 + 0)
    want += 0.01 * (math.tanh(0.25 / 1.0 - 1) + math.tanh(-1.0 / 2.0 - 1)) / 2
    assert scores(*TIES) == {"ties": pytest.approx(want), "prompts": 4}
    closer = ("tied:7", "Ties", [3.5, 3.0], [1.5, 1.0])  # gap 1.5, spread 0.5
    preferred = (1 + 0) / 2
    want = 0.3 * 2 / 2 + 0.3 * 1 / 2 + 0.2 * preferred
    want += 0.01 * (math.tanh(0.25 / 0.5 - 1) + math.tanh(-1.0 / 2.0 - 1)) / 2
    assert scores(closer, *TIES[1:])["ties"] == pytest.approx(want)


def test_ties_that_lack_a_part():
    """Equal right rewards have no ratio; a question asked once counts where it can."""
    same, alone = ("tied:1", "Ties", [3.0, 3.0], [2.0]), ("tied:2", "Ties", [1.0, 0.5], [2.0])
    found = scores(same, ("ref:1", "Ties", [3.0], [2.0]), alone)
    assert found["ties"] == pytest.approx(0.3 * 1 / 2 + 0.3 * 1 + 0.2 + 0.2)


def test_rewardbench_2_by_hand():
    four = [("Factuality", 4, [1, 2, 3]), ("Factuality", 1, [4, 2, 3]), ("Precise IF", 1, [4, 2, 3])]
    four += [("Math", 2, [2, 1, 1]), ("Safety", 3, [0, 0, 0]), ("Focus", 3, [0, 0, 0])]
    rows = [(str(i), subset, [right], wrong) for i, (subset, right, wrong) in enumerate(four)]
    found, intervals = scores(*rows, *TIES), rewardbench_metrics(groups(*rows, *TIES), intervals=True)
    want = {"factuality": 0.5, "precise_if": 0.0, "math": 0.5, "safety": 1.0, "focus": 1.0, "ties": found["ties"]}
    want["score"] = sum(want.values()) / 6
    assert found == pytest.approx(want | {"prompts": 10})
    assert intervals.keys() == {f"rewardbench2/{name}" for name in want}
    for name, value in want.items():
        low, high = intervals[f"rewardbench2/{name}"]
        assert -1e-9 <= low - 1e-9 <= value <= high + 1e-9 <= 1.01, name
    assert intervals["rewardbench2/factuality"] == (0, 1)
    assert "score" not in scores(*rows)
    lacking = ("6", "Math", [5], [1, 2])  # one wrong answer was too long: the prompt is left out
    assert scores(*rows, lacking, *TIES) == found


def test_other_groups_are_not_rewardbench():
    assert scores(("a", "mine", [2], [1, 0, 0])) == {}
    assert scores(("a", "Math", [2], [1])) == {}  # pairs
