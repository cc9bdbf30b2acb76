"""Tests of rm/report/charts.py: the pictures arrive at W&B and TensorBoard with the numbers of the per-pair table."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import wandb_files
from test_report import make_run, table
from test_tracking import clean_wandb, end_wandb, run_log  # noqa: F401

from rm.evaluate.statistics import accuracy_interval
from rm.report.charts import charts, log_charts, log_histograms
from rm.report.page import write_report


def test_histograms(tmp_path):
    pairs = table(50)
    pairs.loc[0, "reward_chosen"] = np.nan  # a histogram has no place for it
    log = run_log(tmp_path, "wandb", "tensorboard")
    log_histograms(log, pairs, 7)
    log_histograms(log, pairs.iloc[:0], 8)  # nothing to show
    log.close()
    end_wandb()
    lines = [line for line in wandb_files.history(wandb_files.run_dir(tmp_path)) if "distribution/margin._type" in line]
    assert [line["train/step"] for line in lines] == [7]
    for name, count in (("reward_chosen", 49), ("reward_rejected", 50), ("margin", 49)):
        assert sum(lines[0][f"distribution/{name}.values"]) == count
    ends = [lines[0]["distribution/reward_rejected.bins"][i] for i in (0, -1)]
    assert ends == pytest.approx([pairs.reward_rejected.min(), pairs.reward_rejected.max()])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = min((path.parent for path in tmp_path.rglob("events.out.tfevents*")), key=lambda path: len(path.parts))
    read = EventAccumulator(str(events), size_guidance={"histograms": 0}).Reload()
    (drawn,) = read.Histograms("distribution/margin")
    assert drawn.step == 7 and drawn.histogram_value.num == 49


def test_charts_and_report(tmp_path):
    pairs = table(60, subset=["a", "b", "b"] * 20, set=["x", "y"] * 30)
    folder = make_run(tmp_path / "run", pairs)
    write_report(folder)
    log = run_log(tmp_path, "wandb")
    log_charts(log, folder, 20)
    log.close()
    end_wandb()
    run = wandb_files.run_dir(tmp_path)
    ((line, columns, rows),) = wandb_files.tables(run, "charts/accuracy_by_subset_table")
    part = pairs[(pairs["subset"] == "a") & (pairs["set"] == "x")]
    margin = (part.reward_chosen - part.reward_rejected).to_numpy()
    ends = accuracy_interval(margin, part.prompt.to_numpy())
    assert line["train/step"] == 20 and columns == ["bin", "accuracy", "accuracy_low", "accuracy_high", "pairs"]
    assert rows[0][0] == "x/a" and rows[0][1:] == pytest.approx([(margin > 0).mean(), *ends, 10])
    (_, _, points) = wandb_files.tables(run, "charts/reward_by_length_table")[0]
    first = pairs.loc[pairs.reward_chosen == points[0][1]].iloc[0]
    assert len(points) == 120 and points[0] == [first.length_chosen - 3, first.reward_chosen, "chosen"]
    kinds = {
        json.loads(item.value_json)["panel_config"]["panelDefId"]
        for record in wandb_files.records(run)
        for item in record.config.update
        if "visualize" in item.nested_key
    }
    assert kinds == {"wandb/bar/v0", "wandb/lineseries/v0", "wandb/scatter/v0"}
    (page,) = [line for line in wandb_files.history(run) if "report._type" in line]
    raw = (run / "files" / page["report.path"]).read_bytes()
    assert raw == (folder / "report.html").read_bytes() and hashlib.sha256(raw).hexdigest() == page["report.sha256"]


def test_nothing_to_draw_is_no_error(tmp_path, caplog):
    assert charts(None) == {} and charts(table(2).assign(reward_chosen=np.inf)) == {}
    log = run_log(tmp_path, "wandb")
    log_charts(log, make_run(tmp_path / "run"), 20)
    log_charts(log, Path("nowhere"), 20)  # fails on W&B's thread
    log.close()
    assert "charts failed (ReadError" in caplog.text
