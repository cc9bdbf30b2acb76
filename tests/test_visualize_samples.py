"""Tests of rm/visualize_samples.py: the records, the file, the table in the terminal and the W&B Table."""

import io
import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import wandb_files
from rich.console import Console

from rm.log.trackers import RunLog
from rm.visualize_samples import group_record, sample_records, visualize_samples

TEXTS = [
    {"prompt": "Human: hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Go away."},
    {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
    {"prompt": "你好", "chosen": "é 👍", "rejected": "|"},
    {"prompt": "", "chosen": "yes", "rejected": ""},
    {"prompt": "fifth", "chosen": "a", "rejected": "b"},
]
TOKEN_REWARDS = [
    ([["", 0.0], [" Hello", -1.0], ["!", 1.5]], [["", 0.0], [" Go", 0.5], [" away", -1.0], [".", 0.5]]),
    ([["2", -0.25]], [["3", 0.25]]),
    None,
    ([["", math.nan], ["yes", 1000.0]], [["", -1000.0]]),
    ([["", 0.0], ["a", 0.0]], [["", 0.0], ["b", 1.0]]),
]
CHOSEN, REJECTED = [1.5, -0.25, 0.5, 1000.0, 0.0], [0.5, 0.25, 0.5, -1000.0, 1.0]


ALL = [(0, 1), (0, 2), (1, 2)]


class Nothing:
    """A log of a run without trackers."""

    def log_wandb(self, what, make, step):
        pass


def table_of(count=5, chosen=CHOSEN, rejected=REJECTED, **columns) -> pd.DataFrame:
    table = pd.DataFrame({"id": list("abcdef")[:count], "set": "s", "margin": 0.0}).assign(**columns)
    return table.assign(reward_chosen=np.float64(chosen[:count]), reward_rejected=np.float64(rejected[:count]))


def show(folder, table=None, texts=TEXTS, token_rewards=(), *, step=10, width=80, encoding="utf-8", run_log=None):
    """(records, what the terminal shows)."""
    table = table_of(len(texts)) if table is None else table
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
    records = sample_records(table, range(len(texts)), texts, token_rewards, step=step)
    visualize_samples(records, step=step, output_dir=folder, run_log=run_log or Nothing(), console=console)
    return records, raw.getvalue().decode(encoding)


def test_records(tmp_path):
    """By hand: sigmoid(1) = 0.7310586, sigmoid(-0.5) = 0.3775407."""
    records, _ = show(tmp_path)
    p = 1 / (1 + math.exp(-1))
    assert list(records[0].items()) == [
        ("id", "a"),
        ("step", 10),
        ("prompt", "Human: hi\n\nAssistant:"),
        ("chosen", " Hello!"),
        ("rejected", " Go away."),
        ("reward_chosen", 1.5),
        ("reward_rejected", 0.5),
        ("p_chosen", pytest.approx(p)),
        ("margin", 1.0),
        ("correct", "right"),
    ]
    assert p == pytest.approx(0.7310586) and records[1]["p_chosen"] == pytest.approx(0.3775407)
    assert [r["correct"] for r in records] == ["right", "wrong", "tie", "right", "wrong"]
    assert records[2]["p_chosen"] == 0.5 and records[3]["p_chosen"] == 1.0  # no overflow


def test_rows_are_chosen_and_must_fit():
    records = sample_records(table_of(margin=[0, 0, 0, 0, 2.0]), np.array([3, 0]), [TEXTS[3], TEXTS[0]])
    assert [(r["id"], r["prompt"], r["data_margin"]) for r in records] == [("d", "", 0), ("a", TEXTS[0]["prompt"], 0)]
    with pytest.raises(ValueError, match="shorter"):
        sample_records(table_of(), [0, 1], TEXTS[:1])


def test_sets_are_named_above_their_first_pair(tmp_path):
    long = "a set with a name that is longer than the column of the ids"
    records, text = show(tmp_path, table_of(4, set=["one", "one", long, long]), TEXTS[:4])
    assert [(r["id"], r["set"]) for r in records] == [
        ("one/a", "one"),
        ("one/b", "one"),
        (f"{long}/c", long),
        (f"{long}/d", long),
    ]
    rows = text.splitlines()
    (one,), (other,) = ([n for n, row in enumerate(rows) if row.split()[:2] == ["set", word]] for word in ("one", "a"))
    first = {i: next(n for n, row in enumerate(rows) if row.split()[:1] == [i]) for i in "abcd"}
    assert one < first["a"] < first["b"] < other < first["c"] < first["d"] and "one/" not in text
    assert long in " ".join(text.split())


def test_without_records_nothing_is_written(tmp_path):
    assert show(tmp_path, texts=[]) == ([], "") and not list(tmp_path.iterdir())


def test_files(tmp_path):
    """One file a step, with whole texts, whatever they hold; half a character and NaN included."""
    nasty = {"prompt": "p" * 5000, "chosen": "\ud83d half", "rejected": "\x1b[31m\0\u2028"}
    for step in (10, 20):
        table = table_of(6, [*CHOSEN, math.nan], [*REJECTED, step])
        show(tmp_path, table, [*TEXTS, nasty], [*TOKEN_REWARDS, None], step=step)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-10.jsonl", "step-20.jsonl"]
    for step in (10, 20):
        with open(tmp_path / "samples" / f"step-{step}.jsonl", encoding="utf-8", newline="\n") as file:
            records = [json.loads(line, parse_constant=pytest.fail) for line in file]
        texts = [{key: r[key] for key in ("prompt", "chosen", "rejected")} for r in records]
        assert texts == [*TEXTS, nasty | {"chosen": "\\ud83d half"}]
        assert [r["step"] for r in records] == [step] * 6
        assert [r["reward_chosen"] for r in records] == CHOSEN + ["NaN"] and records[5]["reward_rejected"] == step
        assert records[5]["correct"] == "nan" and "token_rewards_chosen" not in records[2]
        assert records[3]["token_rewards_chosen"] == [["", "NaN"], ["yes", 1000.0]]
        assert records[0]["token_rewards_rejected"] == TOKEN_REWARDS[0][1]


@pytest.mark.parametrize("width", [80, 120])
def test_terminal(tmp_path, width):
    """It fits; numbers have a sign and three decimals; the verdict is a word."""
    long = {"prompt": "START " + "words " * 300 + "END", "chosen": "ANSWER " + "a b c " * 300, "rejected": "x" * 999}
    _, text = show(tmp_path, table_of(4, margin=[2, 0, 0.5, 1]), [*TEXTS[:3], long], width=width)
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
    table = table_of(5, [*CHOSEN[:4], 1500.25], [*REJECTED[:4], -1500.25])
    _, text = show(tmp_path, table, TEXTS, [*TOKEN_REWARDS[:4], long], width=width, encoding=encoding)
    rows = [re.sub(r"\s+", " ", line).strip(" |") for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= width
    bars = [row for row in rows if re.fullmatch(r"(.*[| ])?[+-]\S+ \S+ [+-]\S+( \|)?", row) and "margin" not in row]
    bars = [re.search(r"[+-]\S+ \S+ [+-][\d.]+", row)[0] for row in bars]
    first = ["+0.00 ▄▁█ +1.50", "+0.00 ▅█▁█ +0.50", "-0.25 ▁ -0.25", "+0.25 █ +0.25"]
    first[1] = "+0.00 ▄▅▁▅ +0.50"
    first += ["+nan ?█ +1000.00", "-1000.00 ▁ -1000.00"]
    if encoding == "ascii":
        first = [row.translate(str.maketrans("▁▂▃▄▅▆▇█", "_.:-=+*#")) for row in first]
    assert bars[: len(first)] == first and len(bars) == len(first) + 2
    assert "bars: reward after each token" in " ".join(rows) and "only the last one is trained" in " ".join(rows)
    _, narrow = show(tmp_path, table, TEXTS, [*TOKEN_REWARDS[:4], long], width=40, encoding=encoding)
    assert max(map(len, narrow.splitlines())) <= 40 and "▁" not in narrow
    assert "bars" not in show(tmp_path)[1]


def test_terminal_shows_text_literally(tmp_path):
    """No markup, emoji code, escape sequence, bell or direction override in the data has any effect."""
    nasty = "[red]x[/red] :smile: [/] \x1b[31mred\x07 \u202eabc\r\nnext\tline \ud83d"
    pair = {"prompt": nasty, "chosen": nasty + " 1", "rejected": "[bold]"}
    _, text = show(tmp_path, table_of(1, id="[i]\x1b"), [pair], width=200)
    flat = re.sub(r"\s+", " ", text)
    assert r"[red]x[/red] :smile: [/] \x1b[31mred\x07 \u202eabc ⏎ next line \ud83d" in flat
    assert r"[i]\x1b prompt" in flat and "[bold]" in flat
    assert all(c.isprintable() or c == "\n" for c in text)


def test_terminal_shows_late_difference(tmp_path):
    same = "The answers begin alike. " * 20
    _, text = show(tmp_path, texts=[{"prompt": "p", "chosen": same + "Then GOOD.", "rejected": same + "Then BAD."}])
    assert "GOOD" in text and "BAD" in text


def test_terminal_without_unicode(tmp_path):
    _, text = show(tmp_path, texts=TEXTS[:3], encoding="ascii")
    assert r"\u4f60\u597d" in text and "Human: hi / Assistant:" in text


# ------------------------------------------------------------------------------ groups


def group(rewards, scores=None, comparisons=ALL, p_chosen=1.0, tokens=None) -> dict:
    """The record of a group; the texts of its answers are "a", "b", ..."""
    chosen, rejected = np.transpose(comparisons)
    table = pd.DataFrame({"chosen": chosen, "rejected": rejected, "p_chosen": p_chosen})
    table = table.assign(**{f"reward_{side}": np.take(rewards, table[side]) for side in ("chosen", "rejected")})
    scores = [math.nan] * len(rewards) if scores is None else scores
    answers = pd.DataFrame({"answer": range(len(rewards)), "score": scores, "reward": rewards})
    return {"id": "g", "step": 10, "prompt": "p"} | group_record(table, answers, list("abcdef")[: len(rewards)], tokens)


def column(record: dict, name: str) -> list:
    return [answer[name] for answer in record["answers"]]


def test_a_group_by_hand():
    """b has the highest score, c the highest reward: of c > a, b > a and b > c two are right."""
    record = group([0.5, 2.0, 2.5], [1.0, 3.0, 2.0], [(1, 0), (2, 0), (1, 2)], tokens=[["A"], ["B"], ["C"]])
    assert list(record) == ["id", "step", "prompt", "answers", "accuracy", "correct"]
    assert (record["accuracy"], record["correct"]) == (pytest.approx(2 / 3), "wrong")
    keys = ["text", "score", "win_share", "reward", "rank", "is_inverted", "token_rewards"]
    assert [list(answer.values()) for answer in record["answers"]] == [
        ["b", 3.0, 1.0, 2.0, 2, True, ["B"]],
        ["c", 2.0, 0.5, 2.5, 1, False, ["C"]],
        ["a", 1.0, 0.0, 0.5, 3, False, ["A"]],
    ]
    assert all(list(answer) == keys for answer in record["answers"])
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    "record, accuracy, correct, order, inverted",
    [
        (group([3.0, 2.0, 1.0], [9, 5, 1]), 1, "right", "abc", ""),
        (group([3.0, 1.0, 2.0], [9, 5, 1]), 2 / 3, "partly", "abc", "b"),
        (group([2.0, 2.0, 2.0], [9, 5, 1]), 0.5, "partly", "abc", ""),  # equal rewards count half
        (group([1.0, 2.0, 3.0], [5, 5, 1], [(0, 2), (1, 2)]), 0, "wrong", "abc", "ab"),
        (group([3.0, 2.0, 1.0]), 1, "right", "abc", ""),  # without scores: wins 2, 1 and 0 of 2
        (group([1.0, 2.0, 3.0], None, [(2, 0), (2, 1)]), 1, "right", "cab", ""),
        (group([1.0, 9.0, 2.0], None, [(2, 0)]), 1, "right", "cab", ""),  # b is in no comparison
        (group([1.0, 9.0, 2.0], [9, 5, 1], [(0, 2)]), 0, "wrong", "acb", "a"),  # neither with a score
        (group([1.0, 3.0, 2.0], None, ALL, [1.0, 1.0, 0.5]), 0, "wrong", "abc", "a"),  # b and c: a label tie
        (group([1.0, math.nan, 3.0], [9, 5, 1]), math.nan, "nan", "abc", "a"),
    ],
)
def test_groups_by_hand(record, accuracy, correct, order, inverted):
    assert (record["accuracy"], record["correct"]) == (pytest.approx(accuracy, nan_ok=True), correct)
    assert "".join(column(record, "text")) == order
    assert "".join(answer["text"] for answer in record["answers"] if answer["is_inverted"]) == inverted


def test_what_a_group_lacks_is_null():
    record = group([1.0, math.nan, 2.0], None, [(2, 0)])
    assert [column(record, name) for name in ("score", "win_share", "rank")] == [[None] * 3, [1, 0, None], [1, 2, None]]


TOKENS = [[["", 0.0], ["a", 1.0]], [["", 0.0], ["b", -1.0]], [["", 0.0], ["c", 0.5]]]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_groups_in_the_terminal(tmp_path, encoding):
    """A block for each answer: its place by label with its score, its text, its reward and its rank."""
    records = [group([1.0, -1.0, 0.5], [7.25, 5, 1], tokens=TOKENS), group([1.0, 2.0, 3.0]) | {"id": "h"}]
    for width in (80, 120):
        raw = io.BytesIO()
        console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
        visualize_samples(records, step=10, output_dir=tmp_path, run_log=Nothing(), console=console)
        text = raw.getvalue().decode(encoding)
        assert "a best answer has the highest reward in 1 of 2 groups shown" in text
        assert max(map(len, text.splitlines())) <= width and "pair" not in text
        rows = [re.sub(r"[\s|]+", " ", line).strip() for line in text.splitlines()]
        at, bars = rows.index("g prompt p"), "▅█ ▅▁ ▅▇" if encoding == "utf-8" else "=# =_ =*"
        one, two, three = bars.split()
        assert rows[at + 1 : at + 7] == [
            "partly 1: 7.25 a +1.000",
            f"+0.00 {one} +1.00 rank 1",
            "accuracy 0.667 2: 5 b -1.000",
            f"inverted +0.00 {two} -1.00 rank 3",
            "3: 1 c +0.500",
            f"+0.00 {three} +0.50 rank 2",
        ]
        at = rows.index("h prompt p")
        assert rows[at + 1 : at + 4] == ["wrong 1: 100% a +1.000", "inverted rank 3", "accuracy 0.000 2: 50% b +2.000"]
    lines = (tmp_path / "samples" / "step-10.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == records


class Tables:
    """Keeps what W&B gets."""

    def __init__(self):
        self.logged, self.Html = {}, lambda page, inject: page

    def Table(self, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log_wandb(self, what, make, step):
        self.logged |= make(self)


def test_wandb_rows_of_groups_and_of_pairs(tmp_path):
    """A row for each answer; beside pairs the groups have a table of their own."""
    (pair, *_), _ = show(tmp_path)
    record = group([0.5, 2.0, 2.5], [1.0, 3.0, 2.0], [(1, 0), (2, 0), (1, 2)], tokens=TOKENS)
    for records, name in (([record], "eval/samples"), ([pair, record], "eval/group_samples")):
        console, log = Console(file=io.StringIO(), width=80), Tables()
        visualize_samples(records, step=10, output_dir=tmp_path, run_log=log, console=console)
        first, *others = log.logged[name]
        assert first == {
            "id": "g", "step": 10, "prompt": "p", "accuracy": pytest.approx(2 / 3), "correct": "wrong", "answer": "b",
            "score": 3.0, "win_share": 1.0, "reward": 2.0, "rank": 2, "is_inverted": True,
        }  # fmt: skip
        assert [row["answer"] for row in others] == ["c", "a"]
        page = log.logged["eval/token_rewards"]
        assert "g: wrong, accuracy 0.667" in page and "<b>answer 1: 3</b>, rank 2, inverted" in page
    assert log.logged["eval/samples"] == [pair]
    shown = console.file.getvalue()
    assert "in 1 of 1 pairs shown; a best answer has the highest reward in 0 of 1 groups" in " ".join(shown.split())
    assert "P=0.731" in shown and "1: 3" in shown


def test_colours_are_extra(tmp_path):
    """With colours taken out, a colour terminal shows what a plain one shows."""
    records, plain = show(tmp_path)
    raw = io.StringIO()
    console = Console(file=raw, width=80, force_terminal=True, color_system="standard", _environ={})
    visualize_samples(records, step=10, output_dir=tmp_path, run_log=Nothing(), console=console)
    assert "\x1b[32m" in raw.getvalue() and re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue()) == plain


def test_wandb_table(tmp_path, monkeypatch):
    """Two evaluations of the same pairs: every cell of both W&B Tables, read back from the files of an offline run."""
    from types import SimpleNamespace

    import wandb
    from accelerate.state import PartialState

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    settings = {"HOME": str(tmp_path / "home"), "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    PartialState(cpu=True)
    wandb.teardown()
    config = SimpleNamespace(project="p", report_to=["wandb"])
    run_log = RunLog(config, tmp_path, "n", {}, None, True)
    half = TEXTS[:4] + [{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}]
    expected = []
    for step, scale in ((10, 1.0), (20, -0.5)):
        run_log.log({"eval/accuracy": scale}, step)
        table = table_of(5, np.multiply(CHOSEN, scale), np.multiply(REJECTED, scale), margin=0.5)
        expected.append(show(tmp_path, table, half, TOKEN_REWARDS if step == 20 else (), step=step, run_log=run_log)[0])
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
        shown = [{name: value for name, value in record.items() if "token" not in name} for record in records]
        assert [dict(zip(columns, row, strict=True)) for row in rows] == shown
    assert tables[0][2][0][5:] == [1.5, 0.5, pytest.approx(0.7310586), 1.0, 0.5, "right"]
    assert tables[1][2][0][5:] == [-0.75, -0.25, pytest.approx(0.3775407), -0.5, 0.5, "wrong"]
    ((line, page),) = wandb_files.pages(folder, "eval/token_rewards")  # of the pairs that have token rewards
    assert line["train/step"] == 20 and page.count("<h2>") == 4 and ">c: " not in page
    assert page.count('class="tokens"') == 8
    history = [(h["train/step"], h["eval/accuracy"]) for h in wandb_files.history(folder) if "eval/accuracy" in h]
    assert history == [(10, 1.0), (20, -0.5)]
