"""The reward table: the same held-out pairs at every evaluation, on the terminal, in a file and at the tracker."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm.config.files import write_text
from rm.log.token_html import JOINERS, sparkline, strips_page

PROMPT_LINES, ANSWER_LINES = 3, 4  # lines of the terminal, about, to which a text is shortened
TRACES = ("trace_chosen", "trace_rejected")  # of a record


def visualize_samples(
    texts: Sequence[dict[str, str]],
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    ids: Sequence[str],
    sets: Sequence[str] | None = None,
    step: int,
    output_dir: str | os.PathLike,
    run_log: Any = None,
    num_print_samples: int = 4,
    margins: Sequence[float] | None = None,
    traces: Sequence[tuple[list, list] | None] | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Show the first pairs with their rewards: a table on the terminal, the whole texts in
    `output_dir/samples/step-N.jsonl` and in the W&B Table `eval/samples`. On one process, and with the same pairs
    every time. With `traces` also the reward along each answer: bars on the terminal, coloured text in the W&B page
    `eval/strips`.

    Args:
        texts: "prompt", "chosen" and "rejected" of each pair; the answers without the prompt.
        chosen, rejected: rewards of the answers, float [B].
        ids: names of the pairs, the same at every step.
        sets: the evaluation set of each pair, shown above the first one of it. None: not shown.
        step: optimizer steps done.
        run_log: a `RunLog`, for its `table`. None: no tracker.
        num_print_samples: how many pairs to show. -1: all; 0: off, nothing is written either.
        margins: margins that the data gives, float [B], shown as `data_margin`. None: not shown.
        traces: the reward along both answers of each pair, or None for a pair without; a trace is
            [[piece of text, reward after it], ...], see `rm.token_rewards.trace_pairs`. None, or no pair's: not shown.
        console: where to print. None: standard output.

    Returns:
        The records, with id, step, set if given, prompt, chosen, rejected, reward_chosen, reward_rejected, and
        p_chosen: probability that chosen is better, sigmoid(margin) (Bradley-Terry);
        margin: reward_chosen - reward_rejected; data_margin if given;
        correct: "right", "wrong" or "tie" as chosen has the higher, the lower or the same reward; "nan";
        trace_chosen, trace_rejected: if given for the pair.

    Raises:
        ValueError: the sequences differ in length, or `num_print_samples` is below -1.
    """
    if num_print_samples < -1:
        raise ValueError(f"num_print_samples={num_print_samples}: must be a count, -1 (all) or 0 (off)")
    records = sample_records(texts, chosen, rejected, ids=ids, sets=sets, step=step, margins=margins, traces=traces)
    records = records if num_print_samples == -1 else records[:num_print_samples]
    if records:
        write_records(Path(output_dir) / "samples" / f"step-{step}.jsonl", records)
        console = console or Console()
        console.print(reward_table(records, console))
        if run_log is not None:
            columns = [name for name in records[0] if name not in TRACES]
            run_log.table("eval/samples", columns, [[record[name] for name in columns] for record in records], step)
            if traced := [record for record in records if "trace_chosen" in record]:
                run_log.html("eval/strips", strips_page(traced), step)
    return records


def sample_records(
    texts: Sequence[dict[str, str]],
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    ids: Sequence[str],
    sets: Sequence[str] | None = None,
    step: int | None = None,
    margins: Sequence[float] | None = None,
    traces: Sequence[tuple[list, list] | None] | None = None,
) -> list[dict[str, Any]]:
    """The records that `visualize_samples` describes, one for each pair."""
    traces = traces or None
    columns = (texts, chosen, rejected, ids, sets, margins, traces)
    lengths = sorted({len(column) for column in columns if column is not None})
    if len(lengths) != 1:
        raise ValueError(f"texts, chosen, rejected, ids, sets, margins and traces must have one length, got {lengths}")
    records = []
    for i in range(len(texts)):
        margin = float(chosen[i]) - float(rejected[i])
        record = {"id": str(ids[i]), "step": step} | ({} if sets is None else {"set": sets[i]})
        record |= {key: texts[i][key] for key in ("prompt", "chosen", "rejected")}
        record |= {"reward_chosen": float(chosen[i]), "reward_rejected": float(rejected[i])}
        record |= {"p_chosen": 0.5 + 0.5 * math.tanh(margin / 2), "margin": margin}  # sigmoid(margin), no overflow
        record |= {} if margins is None else {"data_margin": float(margins[i])}
        record["correct"] = "right" if margin > 0 else "wrong" if margin < 0 else "tie" if margin == 0 else "nan"
        record |= dict(zip(TRACES, (traces and traces[i]) or (), strict=False))
        records.append(record)
    return records


def reward_table(records: list[dict[str, Any]], console: Console, title: str | None = None) -> Table:
    """The records as a table that fits the console: prompts lose their start, answers their end.

    `title`: None says the step, and in how many pairs chosen has the higher reward.
    """
    unicode = console.encoding.lower().startswith("utf")
    dots = "…" if unicode else "..."

    def plain(text: str) -> str:  # one line that can neither colour nor move the cursor, in the terminal's own letters
        text = re.sub(r"[ \t]*[\r\n]+[ \t]*", " ⏎ " if unicode else " / ", text.strip()).replace("\t", " ")
        text = "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)
        return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

    def end_of(text: str, cells: int) -> str:
        return text if cell_len(text) <= cells else dots + set_cell_size(text[::-1], cells - len(dots))[::-1].lstrip()

    def start_of(text: str, cells: int) -> str:
        return text if cell_len(text) <= cells else set_cell_size(text, cells - len(dots)).rstrip() + dots

    lefts = []  # what stands at the left of prompt, chosen, rejected, (data's margin)
    for r in records:
        own_id = r["id"].removeprefix(f"{r.get('set')}/")
        lefts.append([start_of(plain(own_id), 16), f"{r['correct']:5} P={r['p_chosen']:.3f}"])
        lefts[-1].append(f"margin {r['margin']:+.3f}")
        if "data_margin" in r:
            lefts[-1].append(f"data   {r['data_margin']:+.3f}")
    numbers = max(7, *(len(f"{r[f'reward_{side}']:+.3f}") for r in records for side in ("chosen", "rejected")))
    beside = max(cell_len(line) for left in lefts for line in left) + len("rejected") + numbers + 11  # with the gaps
    width = max(10, console.width - beside)  # of the text column

    caption = "margin = reward of chosen - reward of rejected, P = sigmoid(margin); compare rewards in a pair only"
    all_bars = [pair_bars(r, width, unicode) for r in records]
    if any(map(any, all_bars)):
        caption += "; bars: reward after each token, from the prompt's end; only the last one is trained"
    right = sum(r["correct"] == "right" for r in records)
    shown = f"chosen has the higher reward in {right} of {len(records)} pairs shown"
    table = Table(
        title=title or f"Step {records[0]['step']}: {shown}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=HORIZONTALS,
        pad_edge=False,
        expand=True,
    )
    overflow = "ellipsis" if unicode else "crop"  # where the terminal is too narrow
    table.add_column("pair", no_wrap=True, overflow=overflow)
    table.add_column("", no_wrap=True, overflow=overflow)
    table.add_column("text", ratio=1, overflow="fold", min_width=10)
    table.add_column("reward", justify="right", no_wrap=True, overflow=overflow, min_width=7)
    shown_set = None
    for r, left, bars in zip(records, lefts, all_bars, strict=True):
        if r.get("set") != shown_set:
            shown_set = r["set"]
            table.add_row("", Text("set", "dim"), Text(plain(shown_set), "bold"), "", end_section=True)
        prompt, chosen, rejected = (plain(r[key]) or "(empty)" for key in ("prompt", "chosen", "rejected"))
        same = len(os.path.commonprefix([chosen, rejected]))
        if same > width:  # the answers part late: show where
            chosen, rejected = (dots + answer[same - width // 2 :] for answer in (chosen, rejected))
        cells = [
            ("prompt", end_of(prompt, PROMPT_LINES * width), ""),
            ("chosen", start_of(chosen, ANSWER_LINES * width) + bars[0], f"{r['reward_chosen']:+.3f}"),
            ("rejected", start_of(rejected, ANSWER_LINES * width) + bars[1], f"{r['reward_rejected']:+.3f}"),
            ("", "", ""),
        ]
        colour = {"right": "green", "wrong": "red"}.get(r["correct"], "yellow")
        for i, verdict in enumerate(left):
            # Text, and not str: to rich, square brackets in a str are markup
            styles = ("bold", "dim", "dim", "") if i == 0 else (colour, "dim", "", colour)
            table.add_row(*map(Text, (verdict, *cells[i]), styles), end_section=i == len(left) - 1)
    return table


def pair_bars(record: dict[str, Any], width: int, unicode: bool) -> list[str]:
    """The lines of bars under both answers, on one scale; empty without traces, or where they do not fit."""
    traces = [record[name] for name in TRACES if name in record]
    rewards = [reward for trace in traces for _, reward in trace if math.isfinite(reward)] or [0.0]
    options = {"width": width, "low": min(rewards), "high": max(rewards), "unicode": unicode}
    lines = [sparkline(trace, **options) for trace in traces]
    return [f"\n{line}" for line in lines] if lines and max(map(len, lines)) <= width else ["", ""]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, all of them or no file. NaN and infinities become "nan", "inf" and "-inf"."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    rows = ({name: plain(value) for name, value in record.items()} for record in records)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    # UTF-8 has no half characters (lone surrogates), which data may hold; as backslash escapes they are valid JSON
    write_text(path, "".join(lines), errors="backslashreplace")
