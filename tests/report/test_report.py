"""Tests of report.html: it shows what the files of a run say, whatever they hold, and nothing from outside."""

import json
import math
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import rm.report.__main__
import rm.report.page
import rm.report.plots
from rm.evaluate.compare import compare_tables
from rm.report import figures as pictures
from rm.report.page import distinct_names, report_html, write_report
from rm.report.parts import excerpt
from rm.report.plots import Line, accuracy_bins, binned_means, curves, distinct, histogram, style, svg, thin
from rm.report.read_run import ReadError, read_run

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "</div></svg></details><script>alert(1)</script>&amp;\x00\x1b[31m\u202e\ud800 $\\frac{1}{0}$ \"'{{ 7*7 }}"
CURVES = ["loss", "accuracy", "margin", "rewards", "learning-rate", "grad-norm", "speed"]
EVALUATION = [
    "reward-histogram",
    "margin-histogram",
    "reliability",
    "by-margin",
    "by-length",
    "length",
    "length-difference",
]


@pytest.fixture
def drawn():
    """Runs of `train` draw their report, which other tests' need not."""


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not turned into SVG, which takes most of the time."""
    monkeypatch.setattr(rm.plots, "svg", lambda figure, key, title: f'<svg role="img"><title>{title}</title></svg>')


class Page(HTMLParser):
    """A page taken apart; asserts that its elements are closed in order, and that nothing in it is from outside."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.stack, self.ids, self.links, self.tags, self.rows = html, [], [], [], [], []
        self.texts, self.notes = [], []
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
            self.rows[-1].append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ").split())

    def row(self, *start: str) -> list[str]:
        """The first table row that begins with these cells."""
        rows = ([cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in self.rows)
        return next(row for row in rows if row[: len(start)] == list(start))


def table(n: int = 60, seed: int = 0, **columns) -> pd.DataFrame:
    """A per-pair table of `n` pairs, two of each prompt."""
    rng = np.random.default_rng(seed)
    values = dict(id=[f"p{i}" for i in range(n)], set="test", row=np.arange(n), prompt=np.arange(n) // 2)
    values |= dict(reward_chosen=rng.normal(0.7, 1, n), reward_rejected=rng.normal(0, 1, n), data_margin=np.zeros(n))
    lengths = {f"length_{side}": rng.integers(5, 40, n) for side in ("chosen", "rejected")}
    return pd.DataFrame(values | lengths | dict(prefix_length=3) | columns)


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
            metrics |= {"eval/loss": float(np.log1p(np.exp(-margin)).mean()), "eval/margin": float(margin.mean())}
            metrics |= {"eval/accuracy": float((margin > 0).mean()), "eval/pairs": len(pairs)}
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


def figures(page: Page) -> list[str]:
    return [name for name in page.ids if name in (*CURVES, *EVALUATION, "by-subset", "by-set", "set-curves")]


def test_report_of_a_real_run(train, drawn):
    _, folder = train("run", "--eval_steps=2")
    page = Page((folder / "report.html").read_text())
    summary = json.loads((folder / "results.json").read_text())["summary"]
    expected = {*CURVES, *EVALUATION, "by-subset"}
    assert expected <= set(figures(page)) and {"samples", "mistakes", "data", "config"} <= set(page.ids)
    value, interval = page.row("eval/accuracy")[1:3]
    assert value == f"{summary['eval/accuracy']:.4f}"
    assert interval == f"{summary['eval/accuracy_low']:.4f} to {summary['eval/accuracy_high']:.4f}"
    brief = page.row("brief")
    assert brief[1] == str(summary["eval/brief/pairs"])
    assert float(brief[2]) == pytest.approx(summary["eval/brief/accuracy"], abs=1e-4)
    assert page.row("kept")[1:3] == ["80", "30"]
    assert page.row("train_batch_size") == ["train_batch_size", "16", "none"]
    first = json.loads((folder / "samples" / "step-4.jsonl").read_text().splitlines()[0])
    shown = "".join(page.text.split())  # each word of an answer that has its rewards is an element of its own
    assert "".join(first["prompt"].split()) in shown and "".join(first["chosen"].split()) in shown
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_a_run_without_evaluations_but_the_last(train, drawn, undrawn):
    _, folder = train("run", "--num_print_samples=0")
    page = Page((folder / "report.html").read_text())
    assert set(CURVES) <= set(page.ids) and "samples" not in page.ids and "No sample pairs" in page.text


def test_several_sets(train, drawn, undrawn, tmp_path):
    from runs import mixture

    _, folder = train("run", *mixture(tmp_path), "--eval_steps=2")
    page = Page((folder / "report.html").read_text())
    assert {"by-set", "set-curves", "set-0-reward-histogram", "set-1-reliability"} <= set(page.ids)
    assert page.row("plain")[1] == "12" and page.row("talk")[1] == "18"


def test_what_is_drawn_is_what_was_logged(tmp_path):
    pairs = table()
    run = read_run(make_run(tmp_path / "run", pairs))
    intervals = pictures.evaluation_intervals(run)
    low, high = intervals["margin"]
    assert intervals["loss"][0].index.tolist() == [10, 20]
    other = read_run(make_run(tmp_path / "other", pairs, label_smoothing_factor=0.3))  # not the loss that was logged
    assert "loss" not in pictures.evaluation_intervals(other)
    margin = (pairs.reward_chosen - pairs.reward_rejected).to_numpy()
    assert low.index.tolist() == [10, 20] and low[20] < margin.mean() < high[20]
    loss = run.curve("eval/loss")[20]
    assert loss == pytest.approx(pictures._losses(pairs, {}).mean())
    page = Page(report_html([tmp_path / "run"]))
    p = float((margin > 0).mean())
    assert page.row("eval/accuracy")[1] == f"{p:.4f}"
    assert f"{(margin > 0).sum()} right, {(margin < 0).sum()} wrong" in page.text
    assert page.row("10", "+1.000") == ["10", "+1.000", "+0.250", "+0.750"]
    assert page.row("learning_rate") == ["learning_rate", "0.001", "0.0001"]
    assert page.row("identical")[1:] == ["34", "34", "dropped: chosen and rejected are the same tokens"]


def test_mean_interval():
    values = np.array([0.0, 1.0, 2.0, 3.0])
    low, high = pictures.mean_interval(values)
    assert (high - low) / 2 == pytest.approx(1.959964 * values.std(ddof=1) / 2)
    # two prompts of two pairs: sums of residuals -2 and 2, so (8 * 2 / 1) ** 0.5 / 4 = 1
    low, high = pictures.mean_interval(values, np.array([0, 0, 1, 1]))
    assert (low, high) == pytest.approx((1.5 - 1.959964, 1.5 + 1.959964))
    assert math.isnan(pictures.mean_interval(values[:1])[0])


def test_hostile_texts(tmp_path):
    pairs = table(subset=["<script>alert(2)</script> $\\frac{", "</svg>\x07\u202e"] * 30)
    folder = make_run(tmp_path / "run", pairs, text=HOSTILE, run_name=HOSTILE)
    page = Page(report_html([folder]))  # which asserts that there is no script element
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text and "$\\frac{1}{0}$" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.html)
    assert "⟨U+202E⟩" in page.text and "by-subset" in page.ids
    write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page.html


def test_a_megabyte_of_text(tmp_path, undrawn):
    page = Page(report_html([make_run(tmp_path / "run", text="word " * 200_000)]))
    assert len(page.html) < 500_000 and "992,000 more characters" in page.text
    assert excerpt("a\n" * 20).is_long and not excerpt("short").is_long


def test_strips(tmp_path, undrawn):
    folder = make_run(tmp_path / "run")
    path = folder / "samples" / "step-20.jsonl"
    trace = {f"trace_{side}": [["", 0.5], ["<b>one", 1.5], [" two", "nan"]] for side in ("chosen", "rejected")}
    path.write_text(json.dumps(json.loads(path.read_text()) | trace) + "\n")
    page = Page(report_html([folder]))
    assert page.html.count('class="strip"') == 2 and "<b>one" in page.text


@pytest.mark.parametrize("left_out", ["results.json", "config.yaml", "eval", "samples", "mistakes.jsonl"])
def test_missing_files(tmp_path, undrawn, left_out):
    folder = make_run(tmp_path / "run", table(8))
    for path in sorted((folder / left_out).glob("*")):
        path.unlink()
    (folder / left_out).rmdir() if (folder / left_out).is_dir() else (folder / left_out).unlink()
    page = Page(report_html([folder]))
    assert set(CURVES) <= set(page.ids)
    word = {
        "results.json": "not finished",
        "eval": "No histograms",
        "samples": "No sample",
        "mistakes.jsonl": "No list",
    }
    assert word.get(left_out, "") in page.text


def test_damaged_files(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", table(8))
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "metrics.jsonl":
            path.write_bytes(b'{"a": [\xff\x00')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "x"}\nnull\n{"step": 30, "train/lo')
    assert set(CURVES) <= set(Page(report_html([folder])).ids)


def test_only_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = Page(report_html([tmp_path]))
    assert figures(page) == [] and "Nothing is logged yet" in page.text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "train/loss": 0.7}\n')
    assert figures(Page(report_html([tmp_path]))) == ["loss"]


def test_numbers_that_are_not_finite(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", table(1).assign(reward_chosen=math.nan))
    text = (folder / "metrics.jsonl").read_text().replace('"train/loss": 0.6', '"train/loss": "NaN"')
    (folder / "metrics.jsonl").write_text(text.replace('"eval/loss": NaN', '"eval/loss": "NaN"'))
    page = Page(report_html([folder]))
    assert "1 value that is not finite" in page.text and "its rewards are not finite" in page.text
    assert "reward-histogram" not in page.ids and "loss" in page.ids


@pytest.mark.parametrize("rewards", [(0.0, 0.0), (1.0, -1.0)])
def test_one_pair(tmp_path, undrawn, rewards):
    pairs = table(1).assign(reward_chosen=rewards[0], reward_rejected=rewards[1])
    page = Page(report_html([make_run(tmp_path / "run", pairs)]))
    assert {"reward-histogram", "margin-histogram", "length"} <= set(page.ids) and "1 pair:" in page.text


def test_files_past_the_last_step_are_of_the_past(tmp_path):
    folder = make_run(tmp_path / "run", table(4), steps=(10, 20, 30))
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"step": 30' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "results.json").unlink()
    run = read_run(folder)
    assert run.table_steps() == [10, 20] and [record["step"] for record in run.samples["p0"]] == [10, 20]


def test_the_best_evaluations_table(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", table(4), load_best_model_at_end=True)
    results = json.loads((folder / "results.json").read_text())
    results["summary"]["train/best_step"] = 10
    (folder / "results.json").write_text(json.dumps(results))
    assert read_run(folder).table_step == 10
    assert "Held-out evaluation, after step 10" in Page(report_html([folder])).text


def test_comparison(tmp_path, undrawn):
    one = table(10).assign(reward_chosen=[1.0] * 8 + [-1.0] * 2, reward_rejected=0.0)
    other = one.assign(reward_chosen=[1.0] * 6 + [-1.0] * 4)
    folders = [make_run(tmp_path / "one", one), make_run(tmp_path / "other", other, learning_rate=2e-3)]
    page = Page(report_html(folders))
    assert {"cmp-eval-loss", "cmp-eval-accuracy", "cmp-train-loss", "cmp-reliability"} <= set(page.ids)
    assert page.row("learning_rate")[1:] == ["0.001", "0.002"]
    assert page.row("eval/accuracy")[1].startswith("0.8000 (") and page.row("eval/accuracy")[2].startswith("0.6000 (")
    values, intervals = compare_tables(one, other)
    low, high = intervals["compare/accuracy_difference"]
    assert page.row("one − other", "accuracy")[2:] == ["+0.200", f"{low:+.3f} to {high:+.3f}", "10"]
    assert page.row("one − other", "loss")[2] == f"{values['compare/loss_difference']:+.3f}"


def test_comparison_of_runs_on_other_data(tmp_path, undrawn):
    folders = [make_run(tmp_path / name, table(10)) for name in ("a/run", "b/run")]
    results = json.loads((folders[1] / "results.json").read_text())
    results["data"]["test"]["fingerprint"] = "0" * 64
    (folders[1] / "results.json").write_text(json.dumps(results))
    page = Page(report_html(folders))
    assert "evaluated on different pairs" in page.text and "a/run − b/run" not in page.text
    assert page.row("evaluation pairs, sha256")[1:] == ["f" * 16, "0" * 16]
    assert distinct_names(folders) == ["a/run", "b/run"] and distinct_names(folders[:1]) == ["run"]


def command(*arguments, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rm.report", *map(str, arguments)])
    code = 0
    try:
        runpy.run_module("rm.report", run_name="__main__")
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_command(tmp_path, undrawn, monkeypatch, capsys):
    run = dict(monkeypatch=monkeypatch, capsys=capsys)
    folder, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    assert command(folder, **run)[:2] == (0, f"{folder / 'report.html'}\n")
    Page((folder / "report.html").read_text())
    assert command(folder, other, "--output", tmp_path / "cmp.html", **run)[0] == 0
    assert "Reward models: run, other" in Page((tmp_path / "cmp.html").read_text()).text
    (tmp_path / "empty").mkdir()
    for arguments, word in (
        ([tmp_path / "nowhere"], "is no folder"),
        ([tmp_path / "empty"], "holds no run"),
        ([folder, other], "give --output"),
        ([folder, "--output", tmp_path], "no place for a file"),
    ):
        code, _, err = command(*arguments, **run)
        assert code == 2 and word in err and err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(ReadError):
        read_run(tmp_path / "empty")


def test_a_drawing_that_fails_loses_no_run(train, drawn, monkeypatch, caplog):
    def fail(folders):
        raise RuntimeError("no ink")

    monkeypatch.setattr(rm.report, "report_html", fail)
    summary, folder = train("run")
    assert (folder / "results.json").exists() and not (folder / "report.html").exists()
    assert "report.html is not written (RuntimeError: no ink); to try again: python -m rm.report" in caplog.text
    assert summary["train/steps"] == 4


def test_a_new_run_in_the_folder_takes_the_old_report_away(tmp_path):
    from rm.train.run_dir import claim_output_dir

    (tmp_path / "report.html").touch()
    claim_output_dir(tmp_path, "", {}, None)
    assert not (tmp_path / "report.html").exists()


def test_matplotlib_is_imported_where_it_draws(zygote, tmp_path):
    run = zygote.start(["--help"], tmp_path, fault="import sys; assert 'matplotlib' not in sys.modules")
    assert run.wait() == 0, run.stderr


# ------------------------------------------------------------------------------ drawings


def draw(figure, key="k") -> str:
    return svg(figure, key, "A title & more")


def test_svg_fits_a_page():
    with style():
        drawings = [draw(curves([Line("a", pd.Series([1.0, 2.0], [1, 2]))], "y"), key) for key in ("one", "two")]
    assert 'role="img"' in drawings[0] and "A title &amp; more</title>" in drawings[0]
    ids = [set(re.findall(r'id="([^"]*)"', drawing)) for drawing in drawings]
    assert not ids[0] & ids[1] and not re.search(r"#0[0a]0", drawings[0]) and "var(--c1)" in drawings[0]
    assert "optimizer step</text>" in drawings[0] and "metadata" not in drawings[0] and "font-family" not in drawings[0]
    with style():
        assert draw(curves([Line("a", pd.Series([1.0, 2.0], [1, 2]))], "y"), "one") == drawings[0]


def test_series_are_told_apart_without_colour():
    y = pd.Series([1.0, 2.0, 3.0], [1, 2, 3])
    with style():
        drawing = draw(curves([Line(f"run {i}", y + i, look=i, has_markers=True) for i in range(3)], "y"))
        bars = draw(histogram([("chosen", np.arange(9.0)), ("rejected", np.arange(9.0))], "reward", "answers"))
    dashes = {
        re.search(r"stroke-dasharray: ([\d., ]+)", line)[1]
        for line in re.findall(r"<path[^>]*dasharray[^>]*>", drawing)
    }
    assert len(dashes) >= 2 and len(set(re.findall(r'href="#k-(m\w+)"', drawing))) >= 3
    assert bars.count("<pattern") == 2


def test_thin_and_bins():
    y = pd.Series(np.arange(10_000.0), np.arange(10_000))
    less = thin(y, 100)
    assert len(less) == 100 and less.iloc[0] == 49.5 and less.index[0] == 99
    assert thin(pd.Series([math.inf, 1.0], [1, 2])).isna().tolist() == [True, False]
    means = binned_means(np.arange(40.0), np.arange(40.0))
    assert len(means) == 3 and means["mean"].iloc[0] == pytest.approx(means["x"].iloc[0])
    assert len(binned_means(np.zeros(5), np.arange(5.0))) == 1


def test_steps_are_whole_numbers():
    with style():
        for steps in ([4], [4, 5], [1, 2, 3]):
            figure = curves([Line("a", pd.Series(1.0, steps))], "y")
            figure.canvas.draw()
            assert all(tick == int(tick) for tick in figure.axes[0].get_xticks()), steps


def test_labels_differ():
    names = ["rb/llmbar-adver-neighbor", "rb/llmbar-adver-natural", "a" * 40 + "1", "a" * 20 + "b" + "a" * 19 + "1"]
    labels = distinct(names, 28)
    assert labels[:2] == names[:2] and len(set(labels)) == 4 and max(map(len, labels)) <= 28
    bins = pd.DataFrame(dict(bin=names, pairs=1, accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6))
    with style():
        ticks = accuracy_bins(bins, "subset").axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == labels


def test_captions_quote_the_metrics(tmp_path, undrawn):
    pairs = table(20, true_margin=np.linspace(-1, 1, 20))
    pairs.loc[0, "reward_chosen"] = math.nan
    folder = make_run(tmp_path / "run", pairs)
    results = json.loads((folder / "results.json").read_text())
    names = ["eval/reward_length_spearman", "eval/margin_length_spearman", "eval/spearman_true_margin"]
    results["summary"] |= dict(zip(names, (0.25, -0.5, 0.75), strict=True))
    results["intervals"] = {names[0]: [0.1, 0.4], names[2]: [0.6, 0.9]}
    (folder / "results.json").write_text(json.dumps(results))
    page = Page(report_html([folder]))
    assert f"rank correlation 0.25, 95% interval 0.10 to 0.40 ({names[0]})" in page.text
    assert f"rank correlation -0.50 ({names[1]})" in page.text
    assert f"rank correlation 0.75, 95% interval 0.60 to 0.90 ({names[2]})" in page.text
    assert "Left out: 1 of 20 pairs, whose rewards are not finite." in page.text


def test_length_is_the_answers(monkeypatch, undrawn):
    seen, real = {}, rm.report.plots.scatter
    monkeypatch.setattr(rm.plots, "scatter", lambda *given: seen.update({given[1]: given[0]}) or real(*given))
    pairs = table(20)
    with style():
        list(pictures.evaluation_pictures(pairs))
    groups = seen["length of the answer (tokens)"]
    assert [x.tolist() for _, x, _ in groups] == [(pairs[f"length_{s}"] - 3).tolist() for s in ("chosen", "rejected")]


def test_sets_that_are_left_out(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", table(16, set=[f"s{i // 2}" for i in range(16)]))
    results = json.loads((folder / "results.json").read_text())
    results["data"]["test"]["sets"] = {f"s{i}": {} for i in range(8)}
    (folder / "results.json").write_text(json.dumps(results))
    page = Page(report_html([folder]))
    assert "The first 6 of 8 sets; 2 have no pictures of their own." in page.text and "Set s6 alone" not in page.text


def test_comparison_says_what_it_shows(tmp_path, monkeypatch, undrawn):
    seen, real = {}, rm.report.plots.curves
    monkeypatch.setattr(
        rm.plots, "curves", lambda lines, ylabel, **given: seen.update({ylabel: given}) or real(lines, ylabel, **given)
    )
    page = Page(report_html([make_run(tmp_path / name, table(10)) for name in ("a", "b")]))
    assert page.row("eval/margin")[3:] == ["reward", "mean reward of chosen minus reward of rejected"]
    assert "2 runs of reward models side by side" in page.text
    assert seen["loss (nats)"]["references"] == [(pytest.approx(math.log(2)), "guessing")]
    assert seen["accuracy (fraction of pairs)"]["references"] == [(0.5, "guessing")]
    assert not seen["margin (reward)"]["references"]
