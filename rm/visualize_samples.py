"""The reward table: the same held-out prompts at every evaluation, in the terminal, in a file and in W&B.

`sample_records` makes a record of each pair, and of each group: a prompt with more than two answers.
`visualize_samples` shows records. A key that is added to a record is in the file and in the W&B Table.
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
from rm.log.token_html import JOINERS, SIDES, answers_of, token_bars, token_rewards_page
from rm.log.trackers import RunLog, print_safely

PROMPT_LINES, ANSWER_LINES = 3, 4  # a text is shortened to about so many lines of the terminal
LEFT, REWARD = 16, 9  # widths of columns, for rewards and margins below 10000
PAIR_NOTE = "margin = reward of chosen - reward of rejected, P = sigmoid(margin); compare rewards in a pair only"
GROUP_NOTE = (
    "answers of a group: from the best to the worst label, with the score or the share of comparisons won; rank 1: the "
    "highest reward; inverted: an answer with a worse label has a higher reward; compare rewards in a group only"
)


def visualize_samples(
    records: list[dict[str, Any]], *, step: int, output_dir: Path, run_log: RunLog, console: Console | None = None
) -> None:
    """Show records after `step` optimizer steps: a table in the terminal (`console`; None: standard output), whole
    texts in samples/step-N.jsonl, the W&B Table `eval/samples` and the W&B page `eval/token_rewards`. The W&B Table has
    a row for each pair, or for each answer of the groups; with both kinds the groups are `eval/group_samples`."""
    if not records:
        return
    console = console or Console(file=sys.stdout)
    write_records(output_dir / "samples" / f"step-{step}.jsonl", records)
    print_safely(reward_table(records, console), console=console)
    pairs = [record for record in records if "answers" not in record]
    groups = [
        {name: value for name, value in record.items() if name != "answers"} | {"answer": answer["text"]} | answer
        for record in records
        for answer in record.get("answers", [])
    ]
    tables = {"eval/samples": pairs or groups} | ({"eval/group_samples": groups} if pairs and groups else {})
    run_log.log_wandb("table", lambda wandb: {name: _table(wandb, rows) for name, rows in tables.items()}, step)
    if with_tokens := [record for record in records if answers_of(record)[0]["token_rewards"]]:
        page = token_rewards_page(with_tokens)
        run_log.log_wandb("page", lambda wandb: {"eval/token_rewards": wandb.Html(page, inject=False)}, step)


def _table(wandb: Any, rows: list[dict[str, Any]]) -> Any:
    """A W&B Table without token rewards. A new one each time: W&B does not upload rows added to a logged one."""
    columns = [name for name in rows[0] if not name.startswith("token_rewards") and name != "text"]
    return wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])


def sample_records(
    table: pd.DataFrame,
    rows: Sequence[int],
    texts: list[dict],
    token_rewards: Sequence = (),
    step: int | None = None,
    answers: pd.DataFrame | None = None,
) -> list[dict[str, Any]]:
    """A record of the pair or of the group in each of the rows `rows` of an evaluation table (`rm.evaluate.table`).

    Args:
        texts: "prompt", and "chosen" and "rejected" of each pair, or "answers" of each group. The answers do not repeat
            the prompt.
        token_rewards: of these texts (see `rm.evaluate.evaluator`), or None, for each row. Empty: none.
        answers: the table of all answers; groups need it.

    Returns:
        id, step, set (if there are several), prompt. Of a pair also chosen, rejected, reward_chosen, reward_rejected,
        p_chosen (the model's probability that chosen is better: sigmoid(margin), Bradley-Terry),
        margin (reward_chosen - reward_rejected), data_margin (of the data, if any is not 0),
        correct ("right", "wrong", "tie" or "nan"), token_rewards_chosen, token_rewards_rejected (if given).
        Of a group also the keys of `group_record`.
    """
    several_sets, has_margins, records = table["set"].nunique() > 1, table["margin"].any(), []
    by_prompt = [] if answers is None else [frame.groupby("index") for frame in (table, answers)]
    chosen_rows = table.iloc[rows].to_dict("records")
    for row, text, tokens in zip(chosen_rows, texts, token_rewards or [None] * len(chosen_rows), strict=True):
        record = {"id": row["id"], "step": step}
        if several_sets:
            record |= {"id": f"{row['set']}/{row['id']}", "set": row["set"]}
        record["prompt"] = valid(text["prompt"])
        if "answers" in text:
            record |= group_record(*(groups.get_group(row["index"]) for groups in by_prompt), text["answers"], tokens)
        else:
            record |= pair_record(row, text, tokens, has_margins)
        records.append(record)
    return records


def pair_record(row: dict, text: dict, tokens: Sequence | None, has_margins: bool) -> dict[str, Any]:
    """What is in the record of a pair only."""
    margin = row["reward_chosen"] - row["reward_rejected"]
    record = {side: valid(text[side]) for side in SIDES} | {f"reward_{side}": row[f"reward_{side}"] for side in SIDES}
    record |= {"p_chosen": 0.5 + 0.5 * math.tanh(margin / 2), "margin": margin}  # a sigmoid without overflow
    record |= {"data_margin": row["margin"]} if has_margins else {}
    record["correct"] = {1: "right", 0: "tie", -1: "wrong"}.get(np.sign(margin), "nan")
    if tokens:
        record |= {f"token_rewards_{side}": part for side, part in zip(SIDES, tokens, strict=True)}
    return record


def group_record(
    comparisons: pd.DataFrame, answers: pd.DataFrame, texts: list[str], tokens: Sequence | None
) -> dict[str, Any]:
    """What is in the record of a group only: answers, accuracy, correct, as docs/evaluation.md defines them."""
    is_tie = (comparisons["p_chosen"] == 0.5).to_numpy()
    right = 0.5 + 0.5 * np.sign(comparisons["reward_chosen"] - comparisons["reward_rejected"]).to_numpy()[~is_tie]
    wins = pd.Series(np.where(is_tie, 0.5, 1.0), comparisons["chosen"])
    losses = pd.Series(np.where(is_tie, 0.5, 0.0), comparisons["rejected"])
    win_share = pd.concat([wins, losses]).groupby(level=0).mean()
    answers = answers.set_index("answer")
    frame, reward = answers[["score"]].assign(win_share=win_share, reward=answers["reward"]), answers["reward"]
    label = frame["win_share" if frame["score"].isna().any() else "score"].where(frame["win_share"].notna())
    frame["rank"] = reward.rank(method="min", ascending=False).astype("Int64")
    frame["is_inverted"] = [bool((reward[label < label[i]] > reward[i]).any()) for i in frame.index]
    frame = frame.astype(object).where(frame.notna(), None).assign(reward=reward)
    frame.insert(0, "text", list(map(valid, texts)))
    if tokens:
        frame["token_rewards"] = pd.Series(tokens, frame.index)
    has_highest = label[reward == reward[label.notna()].max()]
    correct = "right" if (right == 1).all() else "partly" if label.max() in has_highest.to_list() else "wrong"
    return {
        "answers": frame.loc[label.sort_values(ascending=False, kind="stable").index].to_dict("records"),
        "accuracy": float(right.mean()) if len(right) else math.nan,
        "correct": correct if np.isfinite(reward).all() else "nan",
    }


def valid(text: str) -> str:
    """`text` with lone surrogates, which data may hold but UTF-8 does not, as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def reward_table(records: list[dict[str, Any]], console: Console, title: str | None = None) -> Table:
    """Records as a table that fits the console: prompts lose their start, answers their end."""
    unicode = console.encoding.startswith("utf")
    dots, line_end = ("…", " ⏎ ") if unicode else ("...", " / ")
    answers_by_record = [answers_of(record) for record in records]
    middle_width = max(len("rejected"), *(len(a["name"]) for answers in answers_by_record for a in answers))
    width = max(10, console.width - LEFT - middle_width - REWARD - 11)  # of the texts; 11: gaps

    def plain(text: str) -> str:  # one line, which can neither colour nor move anything
        text = re.sub(r"[ \t]*[\r\n]+[ \t]*", line_end, text.strip()).replace("\t", " ") or "(empty)"
        text = "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)
        return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

    def shortened(text: str, lines: int) -> str:
        cells = lines * width
        return text if cell_len(text) <= cells else set_cell_size(text, cells - len(dots)).rstrip() + dots

    pairs, groups = ([r["correct"] for r in records if ("answers" in r) == is_group] for is_group in (False, True))
    counts = [f"chosen has the higher reward in {pairs.count('right')} of {len(pairs)} pairs shown"] if pairs else []
    best = groups.count("right") + groups.count("partly")
    counts += [f"a best answer has the highest reward in {best} of {len(groups)} groups shown"] if groups else []
    caption = "; ".join(note for note, kind in ((PAIR_NOTE, pairs), (GROUP_NOTE, groups)) if kind)
    if any(answers[0]["token_rewards"] for answers in answers_by_record):
        caption += "; bars: reward after each token, from where the answers part; only the last one is trained"
    title = title or f"Step {records[0]['step']}: {'; '.join(counts)}"
    table = Table(title=title, caption=caption, box=HORIZONTALS, pad_edge=False, expand=True)
    table.title_justify = table.caption_justify = "left"
    fixed = {"no_wrap": True, "overflow": "ellipsis" if unicode else "crop"}
    table.add_column("prompt" if groups else "pair", max_width=LEFT, **fixed)
    table.add_column("", **fixed)
    table.add_column("text", ratio=1, overflow="fold", min_width=10)
    table.add_column("reward", min_width=7, justify="right", **fixed)
    shown_set, margins = None, (("margin", "margin"), ("data", "data_margin"))
    for record, answers in zip(records, answers_by_record, strict=True):
        if record.get("set") != shown_set:
            shown_set = record["set"]
            table.add_row("", Text("set", "dim"), Text(plain(shown_set), "bold"))
            table.add_section()
        texts, bars = [plain(answer["text"]) for answer in answers], [""] * len(answers)
        if (same := len(os.path.commonprefix(texts))) > width:  # show where the answers begin to differ
            texts = [dots + text[same - width // 2 :] for text in texts]
        if answers[0]["token_rewards"]:
            bars = token_bars([answer["token_rewards"] for answer in answers], width, unicode)
        colour = {"right": "green", "wrong": "red"}.get(record["correct"], "yellow")
        prompt = shortened(plain(record["prompt"])[::-1], PROMPT_LINES)[::-1]  # keeps its end
        lines = [(("prompt", prompt, ""), ("bold", "dim", "dim", ""))]
        for answer, text, line in zip(answers, texts, bars, strict=True):
            text = shortened(text, ANSWER_LINES) + (f"\n{line}" if 0 < len(line) <= width else "")
            name, reward, style = answer["name"], f"{answer['reward']:+.3f}", ("dim", "", colour)
            if "answers" in record:
                style = ("red", "", "red") if answer["is_inverted"] else ("dim", "", "")
                name, reward = name + "\ninverted" * answer["is_inverted"], f"{reward}\nrank {answer['rank']}"
            lines.append(((name, text, reward), (colour, *style)))
        verdict = f"{record['correct']:5} P={record['p_chosen']:.3f}" if "p_chosen" in record else record["correct"]
        left = [plain(record["id"].removeprefix(f"{shown_set}/")), verdict]
        left += [f"accuracy {record['accuracy']:.3f}"] if "accuracy" in record else []
        left += [f"{name:6} {record[key]:+.3f}" for name, key in margins if key in record]
        # Text, since a str with brackets would be taken for markup
        left += [""] * (len(lines) - len(left))
        for line, (cells, style) in zip_longest(left, lines, fillvalue=(("", "", ""), (colour, "dim", "", colour))):
            table.add_row(*map(Text, (line, *cells), style))
        table.add_section()
    return table


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, all or none; NaN and infinities as `finite` spells them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records]
    write_file(path, "".join(lines))
