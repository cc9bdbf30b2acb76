"""Token rewards as a picture: coloured text in HTML, and a line of bars for terminal and HTML.

Token rewards come from `rm.evaluate.evaluator`: [[piece of text, reward after it], ...] for an answer. The first
piece is empty; its reward belongs to the end of the prompt. Rewards have no zero, so colours compare them with the mean
of the answers' rewards (their last ones): in a pair in the right order, chosen ends above it and rejected below.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

SIDES = ("chosen", "rejected")
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
JOINERS = "\u200c\u200d"  # invisible, harmless, and part of many words and emoji
NOTE = (
    "Reward after each token; only the last one is trained. <b>Blue, solid underline</b>: above the mean reward of the "
    "answers; <b>orange, dotted underline</b>: below it. Point at a token to see its reward."
)
CSS = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
PAGE = Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")


def answers_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a record of `rm.visualize_samples`: `name`, `text`, `reward`, `token_rewards` (may be empty); of a
    group also `rank` and `is_inverted`. There the name is the place by label, with the score (without scores the
    share of comparisons won) if it says more than the place."""
    if "answers" not in record:
        keys = {"text": "", "reward": "reward_", "token_rewards": "token_rewards_"}
        sides = [{key: record.get(start + side, []) for key, start in keys.items()} for side in SIDES]
        return [{"name": side} | answer for side, answer in zip(SIDES, sides, strict=True)]
    answers = []
    for place, answer in enumerate(record["answers"], start=1):
        score, win_share = answer["score"], answer["win_share"]
        is_plain = win_share is None or score == -place  # ranks 1, 2, ... are read as scores -1, -2, ...
        label = "" if is_plain else f": {win_share:.0%}" if score is None else f": {score:.4g}"
        answers.append({"token_rewards": []} | answer | {"name": f"{place}{label}", "rank": answer["rank"] or "?"})
    return answers


def token_rewards_html(*answers: list) -> list[str]:
    """An HTML fragment for each answer, on one scale: bars, and the text with coloured tokens. It needs `CSS` once."""
    rewards = [np.array([float(reward) for _, reward in answer]) for answer in answers]
    ends = np.array([values[-1] for values in rewards if math.isfinite(values[-1])])
    middle = ends.mean() if len(ends) else 0.0
    distances = np.abs(np.concatenate(rewards) - middle)
    reach = distances.max(where=np.isfinite(distances), initial=0.0) or 1.0
    fragments = []
    for answer, values, bars in zip(answers, rewards, token_bars(answers, width=48), strict=True):
        spans, before = [], float(values[0])
        heights = np.nan_to_num(((values - middle) / reach).clip(-1, 1)).round(2)
        for (piece, _), reward, height in zip(answer, values.tolist(), heights, strict=True):
            mark = f' class="{"u" if height > 0 else "d"}" style="--v:{abs(height):g}"' if height else ""
            if piece:
                text = visible(piece if spans else piece.lstrip(" "))
                spans.append(f'<span{mark} title="{reward:+.3f} ({reward - before:+.3f})">{text}</span>')
            before = reward
        text = f'<p class="tokens-bars">{bars}</p><p class="tokens-text" dir="auto">{"".join(spans)}</p>'
        fragments.append(f'<div class="tokens">{text}</div>')
    return fragments


def token_rewards_page(records: Sequence[dict[str, Any]]) -> str:
    """A self-contained HTML page of the records of `rm.visualize_samples` that have token rewards."""
    answers = [answers_of(record) for record in records]
    fragments = [token_rewards_html(*(answer["token_rewards"] for answer in group)) for group in answers]
    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"visible": lambda text: Markup(visible(text)), "float": float}
    shown = zip(records, answers, fragments, strict=True)
    return env.from_string(PAGE).render(records=shown, note=Markup(NOTE), css=Markup(CSS))


def token_bars(answers: Sequence[list], width: int, unicode: bool = True) -> list[str]:
    """A line for each answer, bars between the first and the last reward, all on one scale: "+0.12 ▃▂▄▆█ +1.50". It has
    at most `width` characters; long answers are sampled evenly. Without `unicode`, bars are "_.:-=+*#"."""
    rewards = [np.array([float(reward) for _, reward in answer]) for answer in answers]
    finite = np.concatenate(rewards)[np.isfinite(np.concatenate(rewards))]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    letters, lines = BARS if unicode else ASCII_BARS, []
    for values in rewards:
        first, last = f"{values[0]:+.2f} ", f" {values[-1]:+.2f}"
        count = min(len(values), max(width - len(first) - len(last), 2))
        values = values[np.linspace(0, len(values) - 1, count).round().astype(int)]
        levels = np.nan_to_num((values - low) / (high - low or 1.0) * len(letters)).clip(0, len(letters) - 1)
        bars = np.where(np.isfinite(values), np.array(list(letters))[levels.astype(int)], "?")
        lines.append(first + "".join(bars) + last)
    return lines


def visible(text: str) -> str:
    """`text` as HTML that shows its content and does nothing: no tags, control characters or lone surrogates."""
    shown = (c if c.isprintable() or c in "\n\t" + JOINERS else c.encode("unicode_escape").decode() for c in text)
    return html.escape("".join(shown))
