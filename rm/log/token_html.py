"""The reward along an answer as a picture: coloured text under a chart (HTML), and a line of bars for the terminal.

A trace is what `rm.token_rewards.trace_pairs` gives for an answer: [[piece of text, reward after it], ...]. Its first reward is
that of the prompt's end, with an empty piece. Colours tell on which side of the middle between the two answers' rewards
a value lies, since a reward has no zero: where the pair is in the right order, chosen ends above it, rejected below.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LEVELS = 6  # shades on either side of the middle
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
JOINERS = "\u200c\u200d"  # invisible, harmless, and part of many words and emoji
NOTE = (
    "Reward after each token, from the prompt's end on. Only the reward at the last token is trained; "
    "those before it are what the head says there."
)
LEGEND = (
    "<b>Blue, solid underline</b>: above the middle between the rewards of chosen and rejected (the dashed line); "
    "<b>orange, dotted underline</b>: below it; the stronger, the further. Both answers of a pair have one scale. "
    "Point at a token for its number."
)

# Blue against orange, which the common kinds of colour blindness tell apart; lines under the text say the same.
STRIP_CSS = """
.strip-label { margin: .8em 0 .3em; }
.strip { --up: 33 102 172; --down: 205 92 8; margin: 0 0 1em; max-width: 60em; }
@media (prefers-color-scheme: dark) { .strip { --up: 96 165 250; --down: 251 146 60; } }
.strip-chart { display: grid; grid-template-columns: auto 1fr; font: 12px/1.2 system-ui, sans-serif; column-gap: 6px; }
.strip-y { display: flex; flex-direction: column; justify-content: space-between; text-align: right; }
.strip-x { grid-column: 2; display: flex; justify-content: space-between; }
.strip-y, .strip-x { opacity: .75; font-variant-numeric: tabular-nums; }
.strip-chart svg { display: block; width: 100%; height: 72px; border: solid currentColor; border-width: 0 0 1px 1px; }
.strip-chart svg * { vector-effect: non-scaling-stroke; }
.strip-line { fill: none; stroke: currentColor; stroke-width: 1.5; }
.strip-middle { fill: none; stroke: currentColor; stroke-width: 1; stroke-dasharray: 3 3; opacity: .6; }
.strip-up { fill: rgb(var(--up) / .35); }
.strip-down { fill: rgb(var(--down) / .35); }
.strip-text { margin: .5em 0 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; }
.strip-text span { padding-bottom: 1px; }
.strip-text .u { background: rgb(var(--up) / calc(var(--n) * .07)); }
.strip-text .u { border-bottom: calc(var(--n) * .5px + .5px) solid rgb(var(--up)); }
.strip-text .d { background: rgb(var(--down) / calc(var(--n) * .07)); }
.strip-text .d { border-bottom: calc(var(--n) * .5px + .5px) dotted rgb(var(--down)); }
"""

PAGE_CSS = """
:root { color-scheme: light dark; }
body { background: #fff; color: #1c1c1c; font: 15px/1.5 system-ui, sans-serif; margin: 1em; }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #e6e6e6; } }
h2 { font-size: 1em; margin: 1.5em 0 .3em; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; opacity: .8; margin: 0; }
.prompt { max-width: 60em; max-height: 9em; overflow: auto; }
"""


class Scale(NamedTuple):
    """What both strips of a pair share, in units of the reward: the middle, and the ends of the chart."""

    middle: float
    low: float
    high: float

    def place(self, reward: float) -> float:
        """Where `reward` lies between the middle (0) and the farther end of the chart (1 above, -1 below); NaN: 0."""
        reach = max(self.high - self.middle, self.middle - self.low) or 1.0
        return min(max((reward - self.middle) / reach, -1.0), 1.0) if not math.isnan(reward) else 0.0


def strip_scale(*traces: Sequence[Sequence[Any]]) -> Scale:
    """The scale of answers that are to be compared: the mean of their last rewards, and the range of all that is
    finite."""
    ends = [reward for trace in traces if math.isfinite(reward := float(trace[-1][1]))]
    middle = sum(ends) / len(ends) if ends else 0.0
    rewards = [reward for trace in traces for _, value in trace if math.isfinite(reward := float(value))]
    return Scale(middle, min([middle, *rewards]), max([middle, *rewards]))


def strip_html(trace: Sequence[Sequence[Any]], scale: Scale) -> str:
    """An HTML fragment: a chart of the reward along the answer, and the text with each piece coloured; `STRIP_CSS`
    belongs to it, once a page.

    Args:
        trace: [[piece of text, reward after it], ...], at least one.
        scale: `strip_scale` of the answers that are to be compared, as both of a pair.
    """
    rewards, spans = [float(reward) for _, reward in trace], []
    for i, (piece, _) in enumerate(trace):
        level = round(LEVELS * scale.place(rewards[i]))
        mark = f' class="{"u" if level > 0 else "d"}" style="--n:{abs(level)}"' if level else ""
        change = f" ({rewards[i] - rewards[i - 1]:+.3f})" if i else ""
        text = visible(piece if spans else piece.lstrip(" "))
        if piece:
            spans.append(f'<span{mark} title="{rewards[i]:+.3f}{change}">{text}</span>')
    chart = _chart(rewards, scale, start="first token" if trace[0][0] else "prompt’s end")
    return f'<div class="strip">{chart}<p class="strip-text" dir="auto">{"".join(spans)}</p></div>'


def pair_strips(record: dict[str, Any]) -> str:
    """The strips of both answers of a record with traces, on one scale, as an HTML fragment."""
    scale, parts = strip_scale(record["trace_chosen"], record["trace_rejected"]), []
    for side in ("chosen", "rejected"):
        label = f"<b>{side}</b>, reward {float(record[f'reward_{side}']):+.3f} (middle {scale.middle:+.3f})"
        parts.append(f'<p class="strip-label">{label}</p>{strip_html(record[f"trace_{side}"], scale)}')
    return "".join(parts)


def strips_page(records: Sequence[dict[str, Any]]) -> str:
    """A self-contained HTML page of the records of `rm.visualize_samples` that have traces."""
    parts = [f"<p>{NOTE} {LEGEND}</p>"]
    for r in records:
        verdict = f"margin {float(r['margin']):+.3f}, P = {float(r['p_chosen']):.3f}"
        parts.append(f"<h2>{visible(r['id'])}: {r['correct']}, {verdict}</h2>")
        parts.append(f'<p class="prompt" dir="auto">{visible(r["prompt"].strip())}</p>{pair_strips(r)}')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>Reward along the answers, step {records[0]['step']}</title>" if records else ""
    style = f"<style>{STRIP_CSS}{PAGE_CSS}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}{title}{style}</head><body>{"".join(parts)}</body></html>'


def sparkline(
    trace: Sequence[Sequence[Any]],
    *,
    width: int = 60,
    low: float | None = None,
    high: float | None = None,
    unicode: bool = True,
) -> str:
    """The trace as bars between its first and its last reward: "+0.12 ▃▂▄▆█ +1.50".

    Args:
        trace: [[piece of text, reward after it], ...], at least one.
        width: of the whole line. A long trace is sampled evenly, with its first and its last reward.
        low, high: rewards of the lowest and the highest bar. None: those of the trace.
        unicode: block letters; else "_.:-=+*#".
    """
    rewards = np.array([float(reward) for _, reward in trace])
    ends = f"{rewards[0]:+.2f} ", f" {rewards[-1]:+.2f}"
    room = max(width - sum(map(len, ends)), 2)
    if len(rewards) > room:
        rewards = rewards[np.linspace(0, len(rewards) - 1, room).round().astype(int)]
    finite = rewards[np.isfinite(rewards)]
    low = finite.min(initial=math.inf) if low is None else low
    high = finite.max(initial=-math.inf) if high is None else high
    letters = BARS if unicode else ASCII_BARS
    bars = []
    for reward in rewards:
        if not math.isfinite(reward):
            bars.append("?")
        else:
            share = (reward - low) / (high - low) if high > low else 0.5
            bars.append(letters[min(max(int(share * len(letters)), 0), len(letters) - 1)])
    return ends[0] + "".join(bars) + ends[1]


def visible(text: str) -> str:
    """`text` as HTML that shows what it holds and does nothing: no tags, no control characters, no half characters."""
    shown = (c if c.isprintable() or c in "\n\t" + JOINERS else c.encode("unicode_escape").decode() for c in text)
    return html.escape("".join(shown))


def _chart(rewards: Sequence[float], scale: Scale, start: str) -> str:
    """The rewards as steps, filled up to the dashed line of the middle."""
    count, reach = len(rewards), max(scale.high - scale.middle, scale.middle - scale.low) or 1.0
    top, bottom = (scale.high - scale.middle) / reach + 0.05, (scale.middle - scale.low) / reach + 0.05
    heights = [scale.place(reward) for reward in rewards]

    def steps(heights: Sequence[float]) -> str:  # SVG counts downwards
        return "".join(f"V{0.0 - height:.3g}H{i + 1}" for i, height in enumerate(heights))

    up, down = steps([max(height, 0.0) for height in heights]), steps([min(height, 0.0) for height in heights])
    words = f"reward after each of {count - 1} tokens: first {rewards[0]:+.3f}, last {rewards[-1]:+.3f}"
    words += f", lowest {min(rewards):+.3f}, highest {max(rewards):+.3f}"
    return (
        f'<div class="strip-chart" role="img" aria-label="{words}"><div class="strip-y">'
        f"<span>{scale.high:+.2f}</span><span>reward</span><span>{scale.low:+.2f}</span></div>"
        f'<svg viewBox="0 {-top:.3f} {count} {top + bottom:.3f}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="strip-up" d="M0,0{up}V0Z"/><path class="strip-down" d="M0,0{down}V0Z"/>'
        f'<path class="strip-middle" d="M0,0H{count}"/><path class="strip-line" d="M0'
        f',{0.0 - heights[0]:.3g}{steps(heights)}"/></svg>'
        f'<div class="strip-x"><span>{start}</span><span>token</span><span>{count - 1}</span></div></div>'
    )
