"""The reward table: the same held-out pairs at every evaluation, in the terminal, in a file and in W&B.

`sample_records` makes a record of each pair; `visualize_samples` shows records. A key that is added to the record is in
the file and in the W&B Table.
"""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import HORIZONTALS
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm.config.files import finite, write_file
from rm.log.token_html import JOINERS, token_bars, token_rewards_page
from rm.log.trackers import RunLog, print_safely

PROMPT_LINES, ANSWER_LINES = 3, 4  # a text is shortened to about so many lines of the terminal
LEFT, REWARD = 16, 9  # widths of columns, for rewards and margins below 10000
SIDES, MARGINS = ("chosen", "rejected"), {"margin": "margin", "data": "data_margin"}


def visualize_samples(
    records: list[dict[str, Any]], *, step: int, output_dir: Path, run_log: RunLog, console: Console | None = None
) -> None:
    """Show records after `step` optimizer steps: a table in the terminal (`console`; None: standard output), whole
    texts in samples/step-N.jsonl, the W&B Table `eval/samples` and the W&B page `eval/token_rewards`."""
    if not records:
        return
    console = console or Console(file=sys.stdout)
    write_records(output_dir / "samples" / f"step-{step}.jsonl", records)
    print_safely(reward_table(records, console), console=console)
    columns = [name for name in records[0] if not name.startswith("token_rewards")]
    rows = [[record[name] for name in columns] for record in records]
    # a new Table each time: W&B does not upload rows that are added to a logged one
    run_log.log_wandb("table", lambda wandb: {"eval/samples": wandb.Table(columns=columns, data=rows)}, step)
    if with_tokens := [record for record in records if "token_rewards_chosen" in record]:
        page = token_rewards_page(with_tokens)
        run_log.log_wandb("page", lambda wandb: {"eval/token_rewards": wandb.Html(page, inject=False)}, step)


def sample_records(
    table: pd.DataFrame, rows: Sequence[int], texts: list[dict], token_rewards: Sequence = (), step: int | None = None
) -> list[dict[str, Any]]:
    """A record of each pair in the rows `rows` of an evaluation table (`rm.evaluate.table`).

    Args:
        texts: "prompt", "chosen" and "rejected" of each pair; the answers do not repeat the prompt.
        token_rewards: (of chosen, of rejected) or None for each pair, see `rm.evaluate.evaluator`. Empty: none.

    Returns:
        id, step, set (if there are several), prompt, chosen, rejected, reward_chosen, reward_rejected,
        p_chosen (the model's probability that chosen is better: sigmoid(margin), Bradley-Terry),
        margin (reward_chosen - reward_rejected), data_margin (of the data, if any is not 0),
        correct ("right", "wrong", "tie" or "nan"), token_rewards_chosen, token_rewards_rejected (if given).
    """
    several_sets, has_margins = table["set"].nunique() > 1, table["margin"].any()
    records, table = [], table.iloc[rows]
    for row, text, tokens in zip(table.to_dict("records"), texts, token_rewards or [None] * len(table), strict=True):
        margin = row["reward_chosen"] - row["reward_rejected"]
        record = {"id": row["id"], "step": step}
        if several_sets:
            record |= {"id": f"{row['set']}/{row['id']}", "set": row["set"]}
        # lone surrogates, which data may hold but UTF-8 does not, become backslash escapes
        record |= {key: text[key].encode("utf-8", "backslashreplace").decode() for key in ("prompt", *SIDES)}
        record |= {f"reward_{side}": row[f"reward_{side}"] for side in SIDES}
        record |= {"p_chosen": 0.5 + 0.5 * math.tanh(margin / 2), "margin": margin}  # a sigmoid without overflow
        record |= {"data_margin": row["margin"]} if has_margins else {}
        record["correct"] = {1: "right", 0: "tie", -1: "wrong"}.get(np.sign(margin), "nan")
        if tokens:
            record |= {f"token_rewards_{side}": part for side, part in zip(SIDES, tokens, strict=True)}
        records.append(record)
    return records


def reward_table(records: list[dict[str, Any]], console: Console, title: str | None = None) -> Table:
    """Records as a table that fits the console: prompts lose their start, answers their end."""
    unicode = console.encoding.startswith("utf")
    dots, line_end = ("…", " ⏎ ") if unicode else ("...", " / ")
    width = max(10, console.width - LEFT - len("rejected") - REWARD - 11)  # of the texts; 11: gaps

    def plain(text: str) -> str:  # one line, which can neither colour nor move anything
        text = re.sub(r"[ \t]*[\r\n]+[ \t]*", line_end, text.strip()).replace("\t", " ") or "(empty)"
        text = "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)
        return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

    def shortened(text: str, lines: int) -> str:
        cells = lines * width
        return text if cell_len(text) <= cells else set_cell_size(text, cells - len(dots)).rstrip() + dots

    right = sum(record["correct"] == "right" for record in records)
    title = title or f"Step {records[0]['step']}: chosen has the higher reward in {right} of {len(records)} pairs shown"
    caption = "margin = reward of chosen - reward of rejected, P = sigmoid(margin); compare rewards in a pair only"
    if any("token_rewards_chosen" in record for record in records):
        caption += "; bars: reward after each token, from the end of the prompt; only the last one is trained"
    table = Table(title=title, caption=caption, box=HORIZONTALS, pad_edge=False, expand=True)
    table.title_justify = table.caption_justify = "left"
    fixed = {"no_wrap": True, "overflow": "ellipsis" if unicode else "crop"}
    table.add_column("pair", max_width=LEFT, **fixed)
    table.add_column("", **fixed)
    table.add_column("text", ratio=1, overflow="fold", min_width=10)
    table.add_column("reward", min_width=7, justify="right", **fixed)
    shown_set = None
    for record in records:
        if record.get("set") != shown_set:
            shown_set = record["set"]
            table.add_row("", Text("set", "dim"), Text(plain(shown_set), "bold"))
            table.add_section()
        texts, bars = [plain(record[side]) for side in SIDES], ["", ""]
        if (same := len(os.path.commonprefix(texts))) > width:  # show where the answers begin to differ
            texts = [dots + text[same - width // 2 :] for text in texts]
        if "token_rewards_chosen" in record:
            bars = token_bars([record[f"token_rewards_{side}"] for side in SIDES], width, unicode)
        middle = [("prompt", shortened(plain(record["prompt"])[::-1], PROMPT_LINES)[::-1], "")]  # keeps its end
        for side, text, line in zip(SIDES, texts, bars, strict=True):
            text = shortened(text, ANSWER_LINES) + (f"\n{line}" if 0 < len(line) <= width else "")
            middle.append((side, text, f"{record[f'reward_{side}']:+.3f}"))
        left = [plain(record["id"].removeprefix(f"{shown_set}/")), f"{record['correct']:5} P={record['p_chosen']:.3f}"]
        left += [f"{name:6} {record[key]:+.3f}" for name, key in MARGINS.items() if key in record]
        colour = {"right": "green", "wrong": "red"}.get(record["correct"], "yellow")
        styles = ("bold", "dim", "dim", "")
        for line, cells in zip_longest(left, middle):  # Text, since a str with brackets would be taken for markup
            table.add_row(*map(Text, (line or "", *(cells or ("", "", ""))), styles))
            styles = (colour, "dim", "", colour)
        table.add_section()
    return table


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, all or none; NaN and infinities as `finite` spells them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records]
    write_file(path, "".join(lines))
