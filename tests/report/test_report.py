"""Tests of report.html: it shows what the files of a run say, whatever they hold, and nothing from outside."""

import json
import math
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT

from rm.config.errors import InputError
from rm.data.audit import MEANING
from rm.report import figures
from rm.report.page import report_html
from rm.report.read_run import Notes, Run
from rm.train.finish import write_report

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}
HOSTILE = "</div></svg></details><script>alert(1)</script>&amp;\x00\x1b[31m\u202e\ud800 $\\frac{1}{0}$ \"'{{ 7*7 }}"
CURVES = {"loss", "accuracy", "margin", "rewards", "learning-rate", "grad-norm", "speed"}
EVALUATION = {"reward-histogram", "margin-histogram", "reliability", "by-margin", "by-length", "length"}


@pytest.fixture
def drawn():
    """Figures are drawn, and runs of `train` have their report; other tests need neither."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures are made, but not drawn, which takes most of the time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures.Figure, "draw_without_rendering", lambda figure: None)
        monkeypatch.setattr(
            figures.FigureCanvasSVG, "print_svg", lambda canvas, file, metadata: file.write("<svg></svg>")
        )


class Page(HTMLParser):
    """A page taken apart; asserts that its elements are closed in order, and that nothing in it is from outside."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.stack, self.ids, self.links, self.tags, self.rows, self.texts = html, [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []
        assert html.startswith("<!DOCTYPE html>") and len(self.ids) == len(set(self.ids))
        assert not {"script", "link", "iframe", "object", "embed", "base", "image"} & set(self.tags)
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links)
        assert "@import" not in html and not re.search(r"url\((?!#)", html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            self.ids += [value] if name == "id" else []
            self.links += [value] if name in ("href", "src", "xlink:href", "action") else []
        self.stack += [tag] if tag not in VOID else []
        self.rows += [[]] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" in self.stack:
            return
        self.texts.append(data)
        if self.stack and self.stack[-1] in ("td", "th") and self.rows:
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ").split())

    def row(self, *start: str) -> list[str]:
        """The first table row that begins with these cells."""
        return next(row for row in self.rows if row[: len(start)] == list(start))


def table(n: int = 24, seed: int = 0, **columns) -> pd.DataFrame:
    """An evaluation table of `n` pairs, two of each prompt."""
    rng = np.random.default_rng(seed)
    values = dict(id=[f"p{i}" for i in range(n)], set="test", row=np.arange(n), prompt=np.arange(n) // 2)
    values |= dict(reward_chosen=rng.normal(0.7, 1, n), reward_rejected=rng.normal(0, 1, n))
    values |= {f"length_{side}": rng.integers(5, 40, n) for side in ("chosen", "rejected")}
    values |= dict(prefix_length=3, share=1.0, margin=0.0, weight=1.0, p_chosen=1.0)
    return pd.DataFrame(values | columns)


def make_run(folder: Path, pairs: pd.DataFrame | None = None, text: str = "hello", steps=(10, 20), **config) -> Path:
    """The files of a finished run in `folder`, small and made by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, options = [], {"model_name_or_path": "tiny", "dataset_name": "toy", "learning_rate": 1e-3} | config
    for step in steps:
        train = {f"train/{name}": 0.5 + step / 100 for name in ("loss", "accuracy", "margin")}
        train |= {"train/reward_chosen": 1.0, "train/reward_rejected": 0.0, "speed/pairs_per_second": 100.0}
        lines.append({"step": step, "time": 1.0} | train | {"optim/learning_rate": 1e-3, "optim/grad_norm": 1 / step})
        metrics = {"eval/loss": 0.6, "eval/accuracy": 0.7, "eval/accuracy_low": 0.6, "eval/accuracy_high": 0.8}
        if pairs is not None:
            (folder / "eval").mkdir(exist_ok=True)
            pairs.to_parquet(folder / "eval" / f"step-{step}.parquet")
            margin = pairs.reward_chosen - pairs.reward_rejected
            metrics |= {"eval/accuracy": float((margin > 0).mean()), "eval/margin": float(margin.mean())}
            metrics |= {
                "eval/prompts": pairs["prompt"].nunique(),
                "eval/comparisons": len(pairs),
                "eval/loss": float(np.log1p(np.exp(-margin)).mean()),
            }
        lines.append({"step": step, "time": 1.0} | metrics)
        (folder / "samples").mkdir(exist_ok=True)
        record = dict(id="p0", step=step, prompt=text, chosen=text, rejected=text, reward_chosen=step / 10)
        record |= dict(reward_rejected=0.25, p_chosen=0.9, margin=step / 10 - 0.25, correct="right")
        (folder / "samples" / f"step-{step}.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "mistakes.jsonl").write_text(json.dumps(record | {"id": "worst"}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    part = {"source": text, "format": "text", "fingerprint": "f" * 64, "total": 1234, "kept": 1200, "identical": 34}
    data = {"train": part, "test": part}
    (folder / "data_report.json").write_text(json.dumps(data))
    results = {"summary": lines[-2] | lines[-1] | {"train/steps": step}, "config": options, "data": data}
    results |= {"command": ["train_rm.py", text], "git_commit": "abc", "git_diff": text, "packages": {"torch": "2"}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def edit(path: Path, change) -> None:
    """Apply `change` to what a JSON file holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ------------------------------------------------------------------------------ one run


def test_report_of_a_real_run(train, drawn):
    _, folder = train("run", "--eval_steps=2")
    page = Page((folder / "report.html").read_text())
    summary = json.loads((folder / "results.json").read_text())["summary"]
    assert CURVES | EVALUATION | {"by-subset", "samples", "mistakes", "data", "config"} <= set(page.ids)
    value, interval = page.row("eval/accuracy")[1:3]
    assert value == f"{summary['eval/accuracy']:.4f}"
    assert interval == f"{summary['eval/accuracy_low']:.4f} to {summary['eval/accuracy_high']:.4f}"
    brief = page.row("brief")
    assert brief[1] == str(summary["eval/brief/comparisons"])
    assert float(brief[2]) == pytest.approx(summary["eval/brief/accuracy"], abs=1e-4)
    assert page.row("kept")[1:3] == ["80", "30"] and page.row("train_batch_size")[1:] == ["16", "null"]
    first = json.loads((folder / "samples" / "step-4.jsonl").read_text().splitlines()[0])
    shown = "".join(page.text.split())  # each token of an answer is an element of its own
    assert "".join(first["prompt"].split()) in shown and "".join(first["chosen"].split()) in shown
    assert not [row for row in page.rows if row[0].startswith("eval/") and row[3:] == ["", ""]]  # all are explained
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_what_is_shown_is_in_the_files(tmp_path):
    pairs = table(true_margin=np.linspace(-1, 1, 24), subset=["a", "b"] * 12)
    folder = make_run(tmp_path / "run", pairs)
    names = ("reward_length_spearman", "margin_length_spearman", "spearman_true_margin")
    more = {f"eval/{name}": value for name, value in zip(names, (0.25, -0.5, 0.75), strict=True)}
    more |= {"eval/longer_answer_baseline_accuracy": 0.52, "eval/accuracy_ceiling": 0.855}
    intervals = {"eval/reward_length_spearman": [0.1, 0.4], "eval/margin": [0.5, 0.625]}
    edit(folder / "results.json", lambda results: results.update(intervals=intervals))
    edit(folder / "results.json", lambda results: results["summary"].update(more))
    page = Page(report_html([folder]))
    margin = (pairs.reward_chosen - pairs.reward_rejected).to_numpy()
    p = f"{(margin > 0).mean():.3f}"
    sentence = f"Held-out accuracy is {p} (95% interval 0.60 to 0.80, 24 comparisons of 12 prompts) "
    assert (
        sentence + "after 20 steps; preferring the longer answer gives 0.520; the best possible is 0.855." in page.text
    )
    assert page.row("eval/margin")[1:3] == [f"{margin.mean():.4f}", "0.5000 to 0.6250"]
    assert f"24 comparisons: {(margin > 0).sum()} right, {(margin < 0).sum()} wrong, 0 ties." in page.text
    assert "rank correlation 0.25 (eval/reward_length_spearman)" in page.text
    assert "rank correlation -0.50 (eval/margin_length_spearman)" in page.text and "true-margin" in page.ids
    assert page.row("10", "+1.000") == ["10", "+1.000", "+0.250", "+0.750"]
    assert page.row("learning_rate") == ["learning_rate", "0.001", "0.0001"]
    assert page.row("identical")[1:] == ["34", "34", MEANING["identical"]]
    assert page.row("a")[1] == page.row("b")[1] == "12" and page.row("git_commit")[1] == "abc"


def test_several_sets(train, tmp_path):
    from runs import mixture

    _, folder = train("run", *mixture(tmp_path), "--eval_steps=2", "--num_print_samples=0")
    page = Page(report_html([folder]))
    assert {"by-set", "set-curves", "set-0-reward-histogram", "set-1-reliability"} <= set(page.ids)
    assert page.row("plain")[1] == "12" and page.row("talk")[1] == "18"
    assert "samples" not in page.ids and "No samples" in page.text


def test_a_run_that_is_not_finished(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = Page(report_html([tmp_path]))
    assert "Held-out accuracy is not known after 0 steps of a run that is not finished." in page.text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "train/loss": 0.7, "train/accuracy": 0.55}\n')
    page = Page(report_html([tmp_path]))
    assert "numbers end at step 1." in page.text and page.row("train/accuracy")[1] == "0.5500"
    assert {"loss", "accuracy"} == CURVES & set(page.ids)
    folder = make_run(tmp_path / "run", table())
    (folder / "results.json").unlink()
    page = Page(report_html([folder]))
    assert "prompts) after 20 steps of a run that is not finished." in page.text
    assert CURVES | EVALUATION <= set(page.ids) and "No list" not in page.text


def test_steps_that_are_past_and_best(tmp_path):
    folder = make_run(tmp_path / "run", table(), steps=(10, 20, 30), load_best_model_at_end=True)
    edit(folder / "results.json", lambda results: results["summary"].update({"train/best_step": 10}))
    assert Run(folder, "run").table_step == 10
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"step": 30' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")  # resumed from a checkpoint
    (folder / "results.json").unlink()
    run = Run(folder, "run")
    assert run.table_step == 20 and [step for step, _ in run.numbered("samples/step-*.jsonl")] == [10, 20]


def test_hostile_texts(tmp_path, drawn):
    pairs = table(subset=["<script>alert(2)</script> $\\frac{", "</svg>\x07\u202e"] * 12)
    folder = make_run(tmp_path / "run", pairs, text=HOSTILE, run_name=HOSTILE)
    page = Page(report_html([folder]))  # which asserts that there is no script element
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text and "$\\frac{1}{0}$" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.html)
    assert "⟨U+202E⟩" in page.text and "by-subset" in page.ids
    write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page.html


def test_a_megabyte_of_text(tmp_path):
    page = Page(report_html([make_run(tmp_path / "run", text="word " * 200_000)]))
    assert len(page.html) < 700_000 and "992,000 more characters" in page.text


def test_token_rewards(tmp_path):
    folder = make_run(tmp_path / "run")
    rewards = {
        f"token_rewards_{side}": [["", 0.5], ["<b>one", 1.5], [" two", "NaN"]] for side in ("chosen", "rejected")
    }
    edit(folder / "samples" / "step-20.jsonl", lambda record: record.update(rewards))
    page = Page(report_html([folder]))
    assert page.html.count('dir="auto"><span') == 2 and "<b>one" in page.text


def test_groups(tmp_path):
    """Their answers in the order of the record, with score or share of comparisons won, reward, rank and inversions."""
    folder, text = make_run(tmp_path / "run"), HOSTILE.replace("\ud800", "")
    values = [(7.5, 1.0, 0.5, 2, True), (None, 0.5, 2.0, 1, False), (None, None, "NaN", None, False)]
    keys = ("score", "win_share", "reward", "rank", "is_inverted")
    answers = [{"text": text} | dict(zip(keys, row, strict=True)) for row in values]
    group = {"id": "p0", "prompt": "p", "answers": answers, "accuracy": 0.25, "correct": "wrong"}
    for step, name in ((10, "samples/step-10"), (20, "samples/step-20"), (20, "mistakes")):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(group | {"step": step}) + "\n")
    edit(folder / "results.json", lambda results: results["summary"].update({"eval/best_of_n_accuracy": 0.625}))
    page = Page(report_html([folder]))
    assert "best-of-N accuracy is 0.625." in page.text and "The same prompts over training" in page.text
    assert page.text.count("p0: wrong , accuracy 0.2500") == 2 and page.text.count("p0: right , margin +1.750") == 1
    assert page.text.count("answer 1: 7.5 reward +0.500, rank 2 inverted") == 2
    assert page.text.count("answer 2: 50% reward +2.000, rank 1") == 2
    assert page.row("step", "1: 7.5") == ["step", "1: 7.5", "2: 50%", "3", "accuracy"]
    assert page.row("10", "+0.500") == ["10", "+0.500", "+2.000", "+nan", "+0.250"]
    rewards = {"token_rewards": [["", 0.5], ["<b>one", 1.5]]}
    group["answers"] = [answer | rewards for answer in answers]
    (folder / "mistakes.jsonl").write_text(
        json.dumps(group | {"step": 20}) + "\n" + json.dumps(group | {"answers": []})
    )
    page = Page(report_html([folder]))
    assert page.html.count('dir="auto"><span') == 3 and "1 unusable line of mistakes.jsonl" in page.text


# ------------------------------------------------------------------------------ damaged and missing files


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "eval", "samples", "mistakes.jsonl"])
def test_missing_files(tmp_path, name):
    folder = make_run(tmp_path / "run", table())
    for path in sorted((folder / name).glob("*")):
        path.unlink()
    (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    page = Page(report_html([folder]))
    assert CURVES <= set(page.ids) and (name == "eval") != (EVALUATION <= set(page.ids))
    notes = {"results.json": "not finished", "samples": "No sample", "mistakes.jsonl": "No list"}
    assert notes.get(name, "") in page.text


def test_files_that_cannot_be_read(tmp_path):
    folder = make_run(tmp_path / "run", table())
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "metrics.jsonl":
            path.write_bytes(b'{"a": [\xff\x00')
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": "x"}\n\xff\nnull\n{"step": 30, "train/lo')
    page = Page(report_html([folder]))
    assert CURVES <= set(page.ids)
    for name in ("results.json", "config.yaml", "data_report.json", "eval/step-20.parquet"):
        assert re.search(f"Left out: [^.]*{name}", page.text), name
    assert "5 unusable lines of metrics.jsonl" in page.text


@pytest.mark.parametrize(
    "file, change, left_out, note",
    [
        (
            "results",
            lambda r: r.update(intervals={"eval/loss": [0.5], "eval/margin": [1, 2]}),
            "",
            "intervals.eval",
        ),
        ("results", lambda r: r["summary"].update({"eval/loss": [1], "eval/accuracy": "much"}), "", "not finite"),
        ("results", lambda r: r.update(packages=3, git_diff=["a"]), "", "packages of results.json"),
        ("data", lambda r: r.update(test=7), "", "Left out: test of data_report.json"),
        ("sample", lambda r: r.update(token_rewards_chosen=[["a"]]), "", "1 unusable line of step-20.jsonl"),
        ("sample", lambda r: r.update(prompt=[1], reward_chosen={}, id=None), "", "1 unusable line of step-20.jsonl"),
        ("table", dict(reward_chosen=1e308, reward_rejected=-1e308), EVALUATION, "its rewards are not finite"),
        ("table", dict(reward_chosen=1e16, reward_rejected=1e16), "reward-histogram", "Left out: the figure"),
        ("table", dict(reward_chosen=1e308), "margin-histogram", "Left out: the figure"),
        ("table", dict(reward_chosen="text"), EVALUATION, "no numbers in column reward_chosen"),
        ("table", dict(true_margin="text"), EVALUATION, "no numbers in column true_margin"),
        ("table", dict(reward_chosen=[math.nan] + [1.0] * 23), "", "1 of 24 rewards that are not finite"),
    ],
)
def test_edited_files(tmp_path, file, change, left_out, note):
    """What cannot be used is left out with a note, and the rest is there."""
    folder = make_run(tmp_path / "run", table())
    if file == "table":
        table(**change).to_parquet(folder / "eval" / "step-20.parquet")
    else:
        names = {"results": "results.json", "data": "data_report.json", "sample": "samples/step-20.jsonl"}
        edit(folder / names[file], change)
    page = Page(report_html([folder]))
    left_out = {left_out} if isinstance(left_out, str) else left_out
    assert note in page.text and CURVES | {"samples", "mistakes", "config"} <= set(page.ids)
    assert (EVALUATION | {"data"}) - set(page.ids) == left_out - {""}


def test_huge_and_nested_numbers(tmp_path, drawn):
    folder = make_run(tmp_path / "run", table())
    text = (folder / "metrics.jsonl").read_text().replace('"train/loss": 0.6', '"train/loss": -1e308')
    text = text.replace('"train/loss": 0.7', '"train/loss": 1e308').replace(
        '"train/margin": 0.6', '"train/margin": "NaN"'
    )
    (folder / "metrics.jsonl").write_text(text)
    (folder / "results.json").write_text("[" * 100_000)
    page = Page(report_html([folder]))
    assert "results.json (ValueError" in page.text and "Left out: 1 that are not finite." in page.text
    assert CURVES - {"loss"} <= set(page.ids)


@pytest.mark.parametrize("rewards", [(0.0, 0.0), (1.0, -1.0)])
def test_one_pair(tmp_path, drawn, rewards):
    pairs = table(1).assign(reward_chosen=rewards[0], reward_rejected=rewards[1])
    assert EVALUATION <= set(Page(report_html([make_run(tmp_path / "run", pairs)])).ids)


def test_a_report_that_fails_loses_no_run(train, drawn, monkeypatch, caplog):
    def fail(folders):
        raise RuntimeError("no ink")

    monkeypatch.setattr("rm.report.page.report_html", fail)
    summary, folder = train("run")
    assert summary["train/steps"] == 4 and not (folder / "report.html").exists()
    assert "report.html is not written; to try again: python -m rm.report" in caplog.text
    assert "RuntimeError: no ink" in caplog.text  # with its traceback


def test_the_loss_of_guessing_is_that_of_the_run(tmp_path):
    """The mean loss of the two choices in a ranking of three answers is (ln 3 + ln 2) / 2 if all rewards are equal."""
    folders = [make_run(tmp_path / name) for name in ("pairs", "ranking", "unknown")]
    for folder, loss in zip(folders, (math.log(2), math.log(6) / 2), strict=False):
        baseline = {"eval/prompt_only_baseline_loss": loss}
        edit(folder / "results.json", lambda results, new=baseline: results["summary"].update(new))
    pairs, ranking, unknown = (Run(folder, "run") for folder in folders)
    assert figures.guessing([ranking]) == [(math.log(6) / 2, "guessing, 0.896")]
    assert figures.guessing([pairs, pairs]) == [(math.log(2), "guessing, 0.693")]
    assert figures.guessing([pairs, ranking]) == figures.guessing([pairs, unknown]) == figures.guessing([unknown]) == []
    loss = {key: references for key, _, _, _, _, _, *references in figures.training(ranking)}["loss"]
    assert loss == [figures.guessing([ranking])]


# ------------------------------------------------------------------------------ several runs


def test_leaderboard(tmp_path):
    one = table().assign(reward_chosen=[1.0] * 18 + [-1.0] * 6, reward_rejected=0.0)
    other = one.assign(reward_chosen=[1.0] * 12 + [-1.0] * 12)
    folders = [make_run(tmp_path / "other", other, learning_rate=0.1 + 0.2), make_run(tmp_path / "one", one)]
    page = Page(report_html(folders))
    headers, first, second = page.rows[:3]
    assert [first[0], second[0]] == ["one", "other"]
    assert first[headers.index("eval/accuracy")] == "0.7500 (0.6000 to 0.8000)"
    assert [row[headers.index("learning_rate")] for row in (first, second)] == ["0.001", "0.3"]
    assert not {"dataset_name", "commit", "test data", "finished"} & set(headers)
    assert "one has the highest eval/accuracy, 0.7500, of 2 runs." in page.text
    assert {"cmp-eval-loss", "cmp-eval-accuracy", "cmp-train-loss"} <= set(page.ids)


def test_the_direction_of_sorting_is_that_of_the_metric(tmp_path):
    folders = []
    for i, loss in enumerate((0.5, 0.25, "NaN", 0.75)):
        folders.append(make_run(tmp_path / f"run-{i}"))
        edit(folders[-1] / "results.json", lambda results, loss=loss: results["summary"].update({"eval/loss": loss}))
    page = Page(report_html(folders, by="eval/loss"))
    assert [row[0] for row in page.rows[1:5]] == ["run-1", "run-0", "run-3", "run-2"]
    assert "run-1 has the lowest eval/loss, 0.2500, of 4 runs." in page.text
    with pytest.raises(InputError, match="--by eval/lost: no run has this metric; the nearest: eval/loss"):
        report_html(folders, by="eval/lost")


def test_runs_on_other_data(tmp_path):
    folders = [make_run(tmp_path / name, table()) for name in ("a/run", "b/run")]
    edit(folders[1] / "data_report.json", lambda data: data["test"].update(fingerprint="0" * 64))
    (folders[0] / "results.json").unlink()
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write("[1]\n")
    page = Page(report_html(folders))
    assert "evaluated on different data" in page.text and "b/run: Left out: 1 unusable line of metrics" in page.text
    headers, *rows = page.rows[:3]
    assert [row[headers.index("test data")] for row in rows] == ["f" * 12, "0" * 12]
    assert [(row[0], row[headers.index("finished")]) for row in rows] == [("a/run", "no, at step 20"), ("b/run", "yes")]


def test_a_hundred_runs(tmp_path):
    folders = [make_run(tmp_path / f"run-{i}", learning_rate=i / 1e4) for i in range(100)]
    page = Page(report_html(folders))
    assert len({row[0] for row in page.rows} & {f"run-{i}" for i in range(100)}) == 100
    assert page.html.count("run-") < 350 and len(page.html) < 1_000_000  # the first ones only are drawn


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_command(tmp_path, monkeypatch, capsys):
    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rm.report", *map(str, arguments)])
        code = 0
        try:
            runpy.run_module("rm.report", run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    folder, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    assert command(folder)[:2] == (0, f"{folder / 'report.html'}\n")
    Page((folder / "report.html").read_text())
    assert command(folder, other, "--output", tmp_path / "cmp.html", "--by=eval/loss")[0] == 0
    assert "2 reward models" in Page((tmp_path / "cmp.html").read_text()).text
    (tmp_path / "empty").mkdir()  # a run that has just started, or did not start
    assert command(folder, tmp_path / "empty", other, "--output", tmp_path / "cmp.html")[0] == 0
    assert "Left out: empty has no metrics.jsonl" in Page((tmp_path / "cmp.html").read_text()).text
    for arguments, words in (
        ([tmp_path / "nowhere"], "is not a directory"),
        ([folder, tmp_path / "nowhere", "--output=x.html"], "is not a directory"),
        ([tmp_path / "empty"], "contains no run"),
        ([folder, other], "give --output"),
        ([folder, "--output", tmp_path], "Is a directory"),
    ):
        code, _, err = command(*arguments)
        assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1


# ------------------------------------------------------------------------------ drawings


def line(*values: float, steps=(1, 2, 3)) -> pd.DataFrame:
    return pd.DataFrame({"value": values, "value_low": math.nan, "value_high": math.nan}, steps)


def drawing(key: str, make, *arguments) -> str:
    (found,) = figures.draw([(key, "A title", make, *arguments)], Notes())
    return found["svg"]


def test_drawings_fit_one_page_and_its_two_colour_schemes(tmp_path, drawn):
    lines = {f"line {i}": line(i, i + 1, i + 2) for i in range(figures.NUM_LOOKS)}
    one, other = (drawing(key, figures.curves, lines, "y", "") for key in ("one", "other"))
    assert one == drawing("one", figures.curves, lines, "y", "")  # the same bytes again
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (one, other)]
    assert not ids[0] & ids[1] and "optimizer step</text>" in one and one.startswith("<svg") and "metadata" not in one
    run, pairs = Run(make_run(tmp_path / "run"), "run"), table(2000, subset="a", true_margin=1.0, margin=1.0)
    drawn = [drawing(key, *plan) for key, _, *plan in figures.evaluation(run, pairs)]
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", "".join([one, *drawn])))
    assert colours == set(figures.PALETTE.values())  # each has a CSS variable
    style = re.findall(
        r"--(\w+): #", (ROOT / "rm/report/report.html.jinja").read_text().split("prefers-color-scheme")[1]
    )
    assert set(figures.PALETTE) <= set(style)


def test_series_are_told_apart_without_colour(drawn):
    svg = drawing("k", figures.curves, {f"line {i}": line(i, i + 1, i + 2) for i in range(3)}, "y", "")
    dashes = re.findall(r"stroke-dasharray: ([\d., ]+)", svg)
    assert len(set(dashes)) >= 2 and len(set(re.findall(r'href="#(m\w+)"', svg))) >= 3


def test_long_curves_and_labels(drawn):
    rng = np.random.default_rng(0)
    long = line(*rng.normal(size=100_000), steps=range(100_000))
    assert len(drawing("k", figures.curves, {"long": long}, "y", "")) < 200_000
    assert figures.short("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb" and figures.short("abc", 3) == "abc"


@pytest.mark.parametrize("steps", [[4], [4, 5], [1, 2, 3]])
def test_steps_are_whole_numbers(steps):
    figure, _, _ = figures.curves({"a": line(*[1.0] * len(steps), steps=steps)}, "y", "")
    figure.canvas.draw()
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())


def test_a_run_imports_matplotlib_only_to_draw():
    code = "import sys, rm.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
