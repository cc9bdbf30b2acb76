"""Tables and lines on the terminal."""

import io

import numpy as np
import pytest
from rich.console import Console
from tables import CONFIG, table

from rm.evaluate.evaluator import evaluation_line, final_table, metrics_table
from rm.evaluate.table import evaluation_intervals, evaluation_metrics


def shown(*tables, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def evaluated():
    rng = np.random.default_rng(0)
    frame = table(rng.normal(size=(200, 2)) + [0.8, 0], set=["plain", "talk"] * 100, subset="a", true_margin=1.0)
    return evaluation_metrics(frame, CONFIG), evaluation_intervals(frame, CONFIG)


def test_the_line_after_an_evaluation():
    metrics = {"eval/accuracy": 0.842, "eval/accuracy_low": 0.818, "eval/accuracy_high": 0.861, "eval/loss": 0.3511}
    line = "step 200: held-out accuracy 0.842 (95% interval 0.82 to 0.86), loss 0.351"
    assert evaluation_line(200, metrics) == line
    assert evaluation_line(200, metrics, ("eval/accuracy", 0.8451, 150)) == line + "; best 0.845 at step 150"
    assert evaluation_line(200, metrics, ("eval/loss", 0.35, 150)) == line + "; best loss 0.350 at step 150"
    groups = evaluation_line(200, metrics | {"eval/best_of_n_accuracy": 0.625})
    assert groups == line.replace(", loss", ", best-of-N accuracy 0.625, loss")
    sets = {"eval/x/accuracy": 0.9, "eval/x/loss": 0.1, "eval/y/accuracy": 0.8, "eval/y/loss": 0.2}
    sets |= {"eval/brief/accuracy": 1.0}  # a subset
    assert "), x 0.900, y 0.800, loss 0.351" in evaluation_line(200, metrics | sets)


def test_the_final_table(evaluated):
    metrics, intervals = evaluated
    summary = metrics | {"train/steps": 1200, "speed/train_seconds": 61.5, "train/loss": "NaN", "eval/ece": "NaN"}
    text = shown(final_table(summary, intervals))
    lines = [line.split() for line in text.splitlines() if "/" in line]
    assert 10 <= len(lines) <= 14 and max(map(len, text.splitlines())) <= 80
    low, high = intervals["eval/accuracy"]
    assert ["eval/accuracy", f"{metrics['eval/accuracy']:.4g}", f"{low:.4g}", "to", f"{high:.4g}", "fraction"] in lines
    assert {"eval/plain/accuracy", "eval/talk/accuracy"} <= {line[0] for line in lines}
    assert ["eval/prompts", "200", "prompts"] in lines and "best_of_n" not in text
    groups = shown(final_table(summary | {"eval/best_of_n_accuracy": 0.5}, intervals))
    assert ["eval/best_of_n_accuracy", "0.5", "fraction"] in [line.split() for line in groups.splitlines()]
    long = {f"eval/{'a_long_name_of_a_set_' * 3}/accuracy": 0.123456, f"eval/{'a_long_name_of_a_set_' * 3}/loss": 1.0}
    text_of_long = shown(final_table(summary | long, intervals | {next(iter(long)): (0.100001, 0.234567)}))
    assert "0.1235" in text_of_long and "0.1 to 0.2346" in text_of_long  # numbers are whole, the name is not
    assert ["train/steps", "1,200", "steps"] in lines and "nan" in text and "train/loss" not in text


def test_the_table_of_all_metrics(evaluated):
    metrics, intervals = evaluated
    text = shown(metrics_table("Evaluation", metrics, intervals, with_meaning=True), width=200)
    assert "mean of the training loss" in text and "accuracy_low" not in text
    (row,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["eval/talk/a/accuracy"]]
    ends = [f"{metrics[f'eval/talk/a/accuracy_{end}']:.4g}" for end in ("low", "high")]
    assert row[2:5] == [ends[0], "to", ends[1]]
