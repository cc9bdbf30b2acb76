"""Tests of rm/visualize_samples.py: the records, the file, the table on the terminal and the W&B Table."""

import io
import json
import math
import os
import re

import numpy as np
import pytest
import wandb_files
from accelerate import Accelerator
from rich.console import Console

from rm.log.trackers import RunLog
from rm.visualize_samples import visualize_samples

TEXTS = [
    {"prompt": "Human: hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Go away."},
    {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
    {"prompt": "你好", "chosen": "é 👍", "rejected": "|"},
    {"prompt": "", "chosen": "yes", "rejected": ""},
    {"prompt": "fifth", "chosen": "a", "rejected": "b"},
]
IDS = ["a", "b", "c", "d", "e"]
TRACES = [
    ([["", 0.0], [" Hello", -1.0], ["!", 1.5]], [["", 0.0], [" Go", 0.5], [" away", -1.0], [".", 0.5]]),
    ([["2", -0.25]], [["3", 0.25]]),
    None,
    ([["", math.nan], ["yes", 1000.0]], [["", -1000.0]]),
    ([["", 0.0], ["a", 0.0]], [["", 0.0], ["b", 1.0]]),
]
CHOSEN, REJECTED = [1.5, -0.25, 0.5, 1000.0, 0.0], [0.5, 0.25, 0.5, -1000.0, 1.0]


def show(tmp_path, texts=TEXTS, chosen=CHOSEN, rejected=REJECTED, *, width=80, encoding="utf-8", **options):
    """(records, what the terminal shows)."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
    options = {"ids": IDS[: len(texts)], "step": 10, "output_dir": tmp_path} | options
    records = visualize_samples(texts, chosen, rejected, console=console, **options)
    console.file.flush()
    return records, raw.getvalue().decode(encoding)


def test_sets_are_named_above_their_first_pair(tmp_path):
    long = "a set with a name that is longer than the column of the ids"
    sets = ["one", "one", long, long, long]
    records, text = show(tmp_path, ids=[f"{name}/{i}" for name, i in zip(sets, IDS, strict=True)], sets=sets)
    assert [(r["id"], r["set"]) for r in records] == [("one/a", "one"), ("one/b", "one"), (f"{long}/c", long),
                                                       (f"{long}/d", long)]  # fmt: skip
    rows = text.splitlines()
    (one,), (other,) = ([n for n, row in enumerate(rows) if row.split()[:2] == ["set", word]] for word in ("one", "a"))
    first = {i: next(n for n, row in enumerate(rows) if row.split()[:1] == [i]) for i in "abcd"}
    assert one < first["a"] < first["b"] < other < first["c"] < first["d"] and "one/" not in text
    assert long in " ".join(text.split())
    with pytest.raises(ValueError, match="must have one length"):
        show(tmp_path, sets=["one"])


def test_records(tmp_path):
    """Hand-computed: sigmoid(1) = 0.7310586, sigmoid(-0.5) = 0.3775407."""
    records, _ = show(tmp_path, chosen=np.float32(CHOSEN), rejected=np.float32(REJECTED))
    assert len(records) == 4  # the default
    p = 1 / (1 + math.exp(-1))
    assert records[0] == {
        "id": "a",
        "step": 10,
        "prompt": "Human: hi\n\nAssistant:",
        "chosen": " Hello!",
        "rejected": " Go away.",
        "reward_chosen": 1.5,
        "reward_rejected": 0.5,
        "p_chosen": pytest.approx(p),
        "margin": 1.0,
        "correct": "right",
    }
    assert p == pytest.approx(0.7310586) and records[1]["p_chosen"] == pytest.approx(0.3775407)
    assert [r["correct"] for r in records] == ["right", "wrong", "tie", "right"]
    assert records[2]["p_chosen"] == 0.5 and records[3]["p_chosen"] == 1.0  # no overflow


@pytest.mark.parametrize("num_print_samples, shown", [(0, 0), (1, 1), (5, 5), (99, 5), (-1, 5)])
def test_how_many(tmp_path, num_print_samples, shown):
    records, text = show(tmp_path, num_print_samples=num_print_samples)
    assert [r["id"] for r in records] == IDS[:shown]
    assert bool(text) == (tmp_path / "samples").exists() == (shown > 0)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"one length, got \[4, 5\]"):
        show(tmp_path, chosen=CHOSEN[:4])
    with pytest.raises(ValueError, match=r"one length, got \[1, 5\]"):
        show(tmp_path, margins=[1.0])
    with pytest.raises(ValueError, match="num_print_samples=-2"):
        show(tmp_path, num_print_samples=-2)


def test_files(tmp_path):
    """One file a step, with whole texts, whatever they hold; half a character and NaN included."""
    long = {"prompt": "p" * 5000, "chosen": "\ud83d half", "rejected": "\x1b[31m\0\u2028"}
    texts = [*TEXTS, long]
    for step in (10, 20):
        show(tmp_path, texts, CHOSEN + [math.nan], REJECTED + [step], ids=[*IDS, "f"], step=step, num_print_samples=-1)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-10.jsonl", "step-20.jsonl"]
    for step in (10, 20):
        with open(tmp_path / "samples" / f"step-{step}.jsonl", encoding="utf-8", newline="\n") as file:
            records = [json.loads(line, parse_constant=pytest.fail) for line in file]
        assert [{key: r[key] for key in ("prompt", "chosen", "rejected")} for r in records] == texts
        assert [r["step"] for r in records] == [step] * 6
        assert [r["reward_chosen"] for r in records] == CHOSEN + ["nan"] and records[5]["reward_rejected"] == step
        assert records[5]["correct"] == "nan"


@pytest.mark.parametrize("width", [80, 120])
def test_terminal(tmp_path, width):
    """It fits; numbers have a sign and three decimals; the verdict is a word."""
    long = {"prompt": "START " + "words " * 300 + "END", "chosen": "ANSWER " + "a b c " * 300, "rejected": "x" * 999}
    texts = [*TEXTS[:3], long]
    _, text = show(tmp_path, texts, CHOSEN[:4], REJECTED[:4], width=width, margins=[2, 0, 0.5, 1])
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= width
    assert "Step 10: chosen has the higher reward in 2 of 4 pairs shown" in text
    rows = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    at = rows.index("a prompt Human: hi ⏎ Assistant:")
    assert rows[at : at + 4] == [
        "a prompt Human: hi ⏎ Assistant:",
        "right P=0.731 chosen Hello! +1.500",
        "margin +1.000 rejected Go away. +0.500",
        "data +2.000",
    ]
    assert "wrong P=0.378 chosen 2 -0.250" in rows and "margin -0.500 rejected 3 +0.250" in rows
    assert "tie P=0.500 chosen é 👍 +0.500" in rows
    flat = " ".join(rows)
    assert "words END" in flat and "START" not in flat and "prompt …" in flat
    assert "ANSWER a b c" in flat and "x…" in flat
    assert len(rows) < 40


@pytest.mark.parametrize("width", [64, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars(tmp_path, width, encoding):
    """Under each answer, on one scale for a pair; what they are stands below the table; a line is never broken."""
    long = ([["", -1.0], *([" a", 0.0] for _ in range(300)), [" end", 1500.25]], [["", -1.0], [" b", -1500.25]])
    _, text = show(
        tmp_path, chosen=[1.5, -0.25, 0.5, 1000.0, 1500.25], rejected=[0.5, 0.25, 0.5, -1000.0, -1500.25],
        traces=[*TRACES[:4], long], num_print_samples=-1, width=width, encoding=encoding,
    )  # fmt: skip
    rows = [re.sub(r"\s+", " ", line).strip(" |") for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= width
    bars = [row for row in rows if re.fullmatch(r"(.*[| ])?[+-]\S+ \S+ [+-]\S+( \|)?", row) and "margin" not in row]
    bars = [re.search(r"[+-]\S+ \S+ [+-][\d.]+", row)[0] for row in bars]
    first = ["+0.00 ▄▁█ +1.50", "+0.00 ▄▅▁▅ +0.50", "-0.25 ▁ -0.25", "+0.25 █ +0.25"]
    first += ["+nan ?█ +1000.00", "-1000.00 ▁ -1000.00"]
    if encoding == "ascii":
        first = [row.translate(str.maketrans("▁▂▃▄▅▆▇█", "_.:-=+*#")) for row in first]
    assert bars[: len(first)] == first and len(bars) == len(first) + 2
    assert "bars: reward after each token" in " ".join(rows) and "only the last one is trained" in " ".join(rows)
    _, narrow = show(tmp_path, traces=TRACES[:5], width=40, encoding=encoding)
    assert "bars" not in narrow and "▁" not in narrow
    assert "bars" not in show(tmp_path)[1] and "bars" not in show(tmp_path, traces=[])[1]


def test_traces_are_in_the_records_and_the_file(tmp_path):
    records, _ = show(tmp_path, traces=TRACES, num_print_samples=-1)
    assert [(r.get("trace_chosen"), r.get("trace_rejected")) for r in records] == [t or (None, None) for t in TRACES]
    lines = (tmp_path / "samples" / "step-10.jsonl").read_text().splitlines()
    written = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert written[3]["trace_chosen"] == [["", "nan"], ["yes", 1000.0]] and "trace_chosen" not in written[2]
    assert written[0]["trace_rejected"] == TRACES[0][1]
    with pytest.raises(ValueError, match=r"traces must have one length, got \[1, 5\]"):
        show(tmp_path, traces=TRACES[:1])


def test_terminal_shows_text_literally(tmp_path):
    """No markup, emoji code, escape sequence, bell or direction override in the data has any effect."""
    nasty = "[red]x[/red] :smile: [/] \x1b[31mred\x07 \u202eabc\r\nnext\tline \ud83d"
    pair = {"prompt": nasty, "chosen": nasty + " 1", "rejected": "[bold]"}
    _, text = show(tmp_path, [pair], [1.0], [0.0], ids=["[i]\x1b"], width=200)
    flat = re.sub(r"\s+", " ", text)
    assert r"[red]x[/red] :smile: [/] \x1b[31mred\x07 \u202eabc ⏎ next line \ud83d" in flat
    assert r"[i]\x1b prompt" in flat and "[bold]" in flat
    assert all(c.isprintable() or c == "\n" for c in text)


def test_terminal_shows_late_difference(tmp_path):
    same = "The answers begin alike. " * 20
    pair = {"prompt": "p", "chosen": same + "Then GOOD.", "rejected": same + "Then BAD."}
    _, text = show(tmp_path, [pair], [1.0], [0.0])
    assert "GOOD" in text and "BAD" in text


def test_terminal_without_unicode(tmp_path):
    _, text = show(tmp_path, TEXTS[:3], CHOSEN[:3], REJECTED[:3], encoding="ascii")
    assert r"\u4f60\u597d" in text and "Human: hi / Assistant:" in text


def test_colours_are_extra(tmp_path):
    """With colours taken out, a colour terminal shows what a plain one shows."""
    _, plain = show(tmp_path)
    raw = io.StringIO()
    console = Console(file=raw, width=80, force_terminal=True, color_system="standard", _environ={})
    visualize_samples(TEXTS, CHOSEN, REJECTED, ids=IDS, step=10, output_dir=tmp_path, console=console)
    assert "\x1b[32m" in raw.getvalue() and re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue()) == plain


def test_wandb_table(tmp_path, monkeypatch):
    """Two evaluations of the same pairs: every cell of both W&B Tables, read back from the files of an offline run."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    settings = {"HOME": str(tmp_path / "home"), "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    wandb.teardown()
    run_log = RunLog(Accelerator(cpu=True), tmp_path, project="p", run_name="n", config={}, report_to=["wandb"])
    half = TEXTS[:4] + [{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}]
    expected = []
    for step, scale in ((10, 1.0), (20, -0.5)):
        run_log.log({"eval/accuracy": scale}, step)
        chosen, rejected = np.float32(CHOSEN) * scale, np.float32(REJECTED) * scale
        options = {"run_log": run_log, "margins": [0.5] * 5, "num_print_samples": -1}
        options["traces"] = TRACES if step == 20 else None
        expected.append(show(tmp_path, half, chosen, rejected, step=step, **options)[0])
    run_log.close()
    wandb.teardown()

    folder = wandb_files.run_dir(tmp_path)
    tables = wandb_files.tables(folder, "eval/samples")
    assert len(tables) == 2
    for (line, columns, rows), records, step in zip(tables, expected, (10, 20), strict=True):
        assert line["train/step"] == step
        assert columns == (
            "id step prompt chosen rejected reward_chosen reward_rejected p_chosen margin data_margin correct".split()
        )
        records[4]["prompt"] = "?"  # half a character has no place in UTF-8
        shown = [{name: value for name, value in record.items() if "trace" not in name} for record in records]
        assert [dict(zip(columns, row, strict=True)) for row in rows] == shown
    assert tables[0][2][0][5:] == [1.5, 0.5, pytest.approx(0.7310586), 1.0, 0.5, "right"]
    assert tables[1][2][0][5:] == [-0.75, -0.25, pytest.approx(0.3775407), -0.5, 0.5, "wrong"]
    ((line, page),) = wandb_files.pages(folder, "eval/strips")  # of the pairs that have traces
    assert line["train/step"] == 20 and page.count("<h2>") == 4 and ">c: " not in page and page.count("<svg") == 8
    history = [(h["train/step"], h["eval/accuracy"]) for h in wandb_files.history(folder) if "eval/accuracy" in h]
    assert history == [(10, 1.0), (20, -0.5)]
