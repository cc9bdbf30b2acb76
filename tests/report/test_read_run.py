"""Tests of reading the files of a run: of edited files, only what has a wrong type is left out."""

import json

import pytest

from rm.report.page import report_html
from rm.report.read_run import Run

RESULTS = {
    "summary": {"eval/loss": 0.5},
    "config": {"seed": 1},
    "intervals": {"eval/loss": [0.4, 0.6]},
    "packages": {"torch": "2"},
    "layout": "concatenated",
}
PART = {"source": "x.jsonl", "format": "text", "fingerprint": "f", "kept": 3, "sets": {"a": {"kept": 2}}}


@pytest.fixture
def read(tmp_path):
    """read(results=…, data=…, config=…): the `Run` of these values of results.json, data_report.json, config.yaml."""

    def read(results=RESULTS, data=None, config: str | None = None) -> Run:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
        for name, value in (("results", results), ("data_report", {"test": PART} if data is None else data)):
            (tmp_path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        run = Run(tmp_path, "run")
        assert "eval/loss" in report_html([tmp_path]) or not run.results.summary  # the page is made
        return run

    return read


def test_unedited(read):
    run = read()
    assert run.notes == [] and run.intervals == {"eval/loss": (0.4, 0.6)} and run.config == {"seed": 1}
    assert run.data == {"test": PART} and run.sets == ["a"]


@pytest.mark.parametrize(
    "change, left_out",
    [
        ({"packages": 3}, "packages"),
        ({"git_diff": ["a"]}, "git_diff"),
        ({"intervals": {"eval/loss": [0.4, 0.6], "eval/margin": [1]}}, "intervals.eval/margin"),
        ({"layout": None}, "layout"),
    ],
)
def test_of_results_only_the_wrong_value_is_left_out(read, change, left_out):
    run = read(RESULTS | change)
    assert run.notes[0].startswith(f"Left out: {left_out} of results.json (")
    assert run.final == {"eval/loss": 0.5} and run.intervals == {"eval/loss": (0.4, 0.6)} and run.config == {"seed": 1}


@pytest.mark.parametrize(
    "change, left_out, kept",
    [
        ({"kept": "many"}, "test.kept", PART | {"kept": None}),
        ({"source": 7}, "test.source", PART | {"source": None}),
        ({"sets": [1]}, "test.sets", PART | {"sets": None}),
        ({"sets": {"a": {"kept": []}, "b": {}}}, "test.sets.a.kept", PART | {"sets": {"a": {}, "b": {}}}),
    ],
)  # fmt: skip
def test_of_the_audit_only_the_wrong_value_is_left_out(read, change, left_out, kept):
    run = read(data={"test": PART | change})
    assert len(run.notes) == 1 and run.notes[0].startswith(f"Left out: {left_out} of data_report.json (")
    assert run.data == {"test": {name: value for name, value in kept.items() if value is not None}}


@pytest.mark.parametrize("text", ["[1, 2]", "seed", "a: &x [1]\nb: *x", "a: 1\na: 2", "a: [", "[" * 10_000, "[" * 100])
def test_files_that_are_unusable_as_a_whole(read, text):
    run = read(results="{}", data="[" * 10_000, config=text)
    names = [note.split(" (")[0] for note in run.notes]
    assert names == ["Left out: config.yaml", "Left out: data_report.json"] and run.config == {} == run.data
