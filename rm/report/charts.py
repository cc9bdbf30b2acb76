"""The pictures of report.html as W&B's own charts: histograms at every evaluation, the rest once, at the end.

A custom chart of W&B shows the table that was logged last, so that one at every evaluation would cost files and show
nothing more; how accuracy moved in a subset is in the metrics.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from rm.evaluate.slices import by_data_margin, by_length_difference, by_margin, by_set, by_subset, reliability
from rm.report.figures import with_finite_rewards
from rm.report.read_run import read_run

MAX_POINTS = 2_000  # of a scatter plot, a random choice by a fixed seed


def log_histograms(run_log: Any, table: pd.DataFrame, step: int) -> None:
    """The distributions of rewards and margins in a per-pair table, to W&B and TensorBoard."""
    chosen, rejected = (table[f"reward_{side}"].to_numpy(dtype=float) for side in ("chosen", "rejected"))
    columns = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected}
    run_log.histograms({f"distribution/{name}": column for name, column in columns.items()}, step)


def log_charts(run_log: Any, output_dir: str | os.PathLike, step: int) -> None:
    """The charts of a run's last per-pair table and its report.html, to W&B. They are made on its thread: what goes
    wrong is a warning."""
    run_log.media("charts", lambda: charts(read_run(output_dir).table()), step)
    run_log.media("report", lambda: report(Path(output_dir) / "report.html"), step)


def charts(table: pd.DataFrame | None) -> dict[str, Any]:
    """W&B charts by name; each has its numbers in a table beside it, with intervals and counts."""
    import wandb

    if table is None or (table := with_finite_rewards(table)).empty:
        return {}
    found = {}
    bins = reliability(table)
    if len(bins):
        names = {"accuracy": "accuracy", "accuracy_low": "95% interval, low", "accuracy_high": "95% interval, high"}
        ys = [bins[name].tolist() for name in names] + [bins["confidence"].tolist()]
        keys, title = [*names.values(), "perfectly calibrated"], "Calibration: accuracy against confidence"
        found["charts/reliability"] = wandb.plot.line_series(
            bins["confidence"].tolist(), ys, keys=keys, title=title, xname="confidence"
        )
    breakdowns = {"subset": by_subset, "margin": by_margin, "data_margin": by_data_margin}
    breakdowns |= {"length_difference": by_length_difference}
    breakdowns |= {"set": by_set} if table["set"].nunique() > 1 else {}
    for name, make in breakdowns.items():
        if len(bins := make(table)):
            columns = ["bin", "accuracy", "accuracy_low", "accuracy_high", "pairs"]
            rows = bins[columns].astype({"bin": str}).to_numpy(dtype=object).tolist()
            title = f"Accuracy by {name.replace('_', ' ')} (95% intervals in its table)"
            numbers = wandb.Table(columns=columns, data=rows)
            found[f"charts/accuracy_by_{name}"] = wandb.plot.bar(numbers, "bin", "accuracy", title=title)
    some = table.sample(min(len(table), MAX_POINTS // 2), random_state=0)
    rows = [
        [int(row[f"length_{side}"] - row["prefix_length"]), float(row[f"reward_{side}"]), side]
        for row in some.to_dict("records")
        for side in ("chosen", "rejected")
    ]
    points = wandb.Table(columns=["length of the answer (tokens)", "reward", "side"], data=rows)
    title = f"Reward against length ({len(some)} pairs)"
    found["charts/reward_by_length"] = wandb.plot.scatter(
        points, "length of the answer (tokens)", "reward", title=title
    )
    return found


def report(path: Path) -> dict[str, Any]:
    """The report as a page inside W&B; it holds texts of the data, as the table of samples does."""
    import wandb

    return {"report": wandb.Html(path, inject=False)} if path.is_file() else {}
