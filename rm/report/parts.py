"""The parts of report.html that are numbers and texts: headline, metrics, samples, audit, configuration, comparison."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

from rm.config.options import RewardConfig
from rm.data.audit import MEANING
from rm.evaluate.compare import compare_tables
from rm.log.token_html import strip_html, strip_scale
from rm.report.figures import Intervals, with_finite_rewards
from rm.report.read_run import Run, number

MAX_SAMPLES = 12  # pairs shown over training
LOSS_OPTIONS = ("center_rewards_coefficient", "label_smoothing_factor")
MAX_TOKENS = 1_000  # of an answer that is shown as a strip
SHOWN_AT_ONCE, KEPT = 600, 8_000  # characters of a text: more are folded, more than that are left out

GLOSSARY = {  # of metrics, by the last part of the name: unit, meaning
    "loss": ("nats", "mean loss; guessing costs 0.693"),
    "accuracy": ("fraction", "pairs whose chosen answer has the higher reward; a tie counts half"),
    "margin": ("reward", "mean reward of chosen minus reward of rejected"),
    "reward_chosen": ("reward", "mean reward of chosen answers"),
    "reward_rejected": ("reward", "mean reward of rejected answers"),
    "reward_std": ("reward", "standard deviation of all rewards"),
    "reward_mean": ("reward", "mean of all rewards"),
    "reward_min": ("reward", "smallest reward"),
    "reward_max": ("reward", "largest reward"),
    "ties": ("fraction", "pairs with equal rewards"),
    "pairs": ("pairs", "number of pairs"),
    "prompts": ("prompts", "number of different prompts"),
    **{f"margin_q{q}": ("reward", f"{int(q)}% quantile of the margin") for q in ("05", "25", "50", "75", "95")},
    "brier": ("", "Brier score: mean squared error of the probabilities; a coin has 0.25"),
    "ece": ("fraction", "expected calibration error: accuracy against confidence, in ten bins"),
    "temperature": ("", "what rewards should be divided by to be calibrated; above 1 the model is too sure"),
    "reward_length_spearman": ("", "rank correlation of reward and length of the answer"),
    "margin_length_spearman": ("", "rank correlation of margin and length difference"),
    "null_length_accuracy": ("fraction", "accuracy of preferring the longer answer: to be beaten"),
    "null_prompt_loss": ("nats", "loss of giving both answers the same reward: to be beaten"),
    "prompt_share": ("fraction", "share of the rewards' variance that belongs to the prompt"),
    "accuracy_ceiling": ("fraction", "best possible accuracy, where the true reward is known"),
    "spearman_true_margin": ("", "rank correlation of learned and true reward differences"),
    "steps": ("steps", "optimizer steps done"),
    "best_step": ("steps", "step of the best evaluation"),
    "train_seconds": ("s", "time in the training loop, without evaluation and saving"),
    "total_seconds": ("s", "time since the program's first line"),
    "pairs_per_second": ("1/s", "training pairs of all processes per second"),
    "tokens_per_second": ("1/s", "padded tokens computed per second"),
    "peak_memory_gb": ("10⁹ bytes", "largest memory of the main process"),
}

# What could move the text around it or is no HTML: controls, halves of characters, direction overrides, noncharacters
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421, 13: None}
VISIBLE |= {code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Excerpt(NamedTuple):
    """A text to show: its first line or so, as much as is kept of it, and the number of characters left out."""

    start: str
    whole: str
    is_long: bool
    omitted: int


def excerpt(text: Any, kept: int = KEPT) -> Excerpt:
    text = text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False, default=str)
    whole = text[:kept]
    return Excerpt(text[:160], whole, len(text) > SHOWN_AT_ONCE or text.count("\n") > 12, len(text) - len(whole))


def clean(value: Any) -> Any:
    """What stands in the page for a value: strings without characters that HTML has not or that hide others."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else value.translate(VISIBLE)


def signed(value: Any) -> str:
    return f"{number(value):+.3f}" if math.isfinite(number(value)) else "not finite"


def plain(value: Any) -> str:
    """An option's value as it is written in YAML or on the command line."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def spelled(value: float) -> str:
    """A metric's value for a table."""
    if not math.isfinite(value):
        return "not finite"
    return (
        f"{value:,.0f}"
        if value == round(value) and abs(value) < 1e12
        else f"{value:,.4g}"
        if abs(value) >= 1
        else f"{value:.4f}"
    )


def to(*ends: str) -> str:
    """The two ends of an interval, which a line does not part."""
    return "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}".join(ends)


def interval_text(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else to(*map(spelled, pair))


# ---------------------------------------------------------------- the parts of a page


def headline(run: Run, intervals: Intervals) -> list[dict[str, Any]]:
    """The few numbers that a stranger needs, each with its interval and what it means."""
    final, cards = run.final, []

    def card(name: str, key: str, meaning: str, unit: str = "") -> None:
        if key in final:
            known = known_interval(run, intervals, key)
            cards.append(dict(name=name, value=final[key], interval=known, meaning=meaning, unit=unit))

    pairs = final.get("eval/pairs")
    of = f"{pairs:,.0f} held-out pairs" if pairs and math.isfinite(pairs) else "the held-out pairs"
    meaning = f"Fraction of {of} in which the preferred answer gets the higher reward. Guessing: 0.5."
    card("Accuracy", "eval/accuracy", meaning)
    meaning = "No model can do better on these data: their labels are drawn with known noise."
    card("Best possible accuracy", "eval/accuracy_ceiling", meaning)
    meaning = "Accuracy of a rule that always prefers the longer answer: what a model must beat."
    card("If the longer answer won", "eval/null_length_accuracy", meaning)
    meaning = f"Mean cost of {of} under the Bradley-Terry model; guessing costs 0.693, less is better."
    card("Loss", "eval/loss", meaning, "nats")
    meaning = "Between accuracy and the probabilities that the rewards imply, on average; 0 is perfect."
    card("Calibration error", "eval/ece", meaning)
    card("Margin", "eval/margin", "Mean reward of the preferred answer minus that of the other.", "reward")
    return cards


def known_interval(run: Run, intervals: Intervals, key: str) -> tuple[float, float] | None:
    """The 95% interval of a final metric: from results.json, or as computed for the evaluation that it is of."""
    logged = run.curve(key)
    ends = intervals.get(key.removeprefix("eval/"), ()) if key.startswith("eval/") else ()
    steps = [step for step in logged.index[logged == run.final[key]] if all(step in end for end in ends)]
    computed = tuple(float(end[steps[-1]]) for end in ends) if ends and steps else None
    return run.interval(key) or computed


def metric_rows(run: Run, intervals: Intervals) -> list[list[str]]:
    rows = []
    for name, value in run.final.items():
        if not name.endswith(("_low", "_high")):
            unit, meaning = GLOSSARY.get(name.rsplit("/", 1)[-1], ("", ""))
            rows.append([name, spelled(value), interval_text(known_interval(run, intervals, name)), unit, meaning])
    return rows


def bin_rows(bins: pd.DataFrame) -> list[list[str]]:
    rows = []
    for row in bins.to_dict("records"):
        ends = (row["accuracy_low"], row["accuracy_high"])
        rows.append([str(row["bin"]), f"{row['pairs']:,}", spelled(row["accuracy"]), interval_text(ends)])
        rows[-1] += [spelled(row["confidence"])] if "confidence" in row else []
    return rows


def sample_parts(run: Run) -> tuple[list[dict[str, Any]], str]:
    """The pairs shown over training, each with a chart of its rewards; some of each set if there are many."""
    from rm.report.plots import movement, svg

    by_set: dict[Any, list[list[dict]]] = {}
    for records in run.samples.values():
        by_set.setdefault(str(records[-1].get("set")), []).append(records)
    turns = itertools.zip_longest(*by_set.values())
    chosen = [records for turn in turns for records in turn if records is not None][:MAX_SAMPLES]
    parts = []
    for i, records in enumerate(chosen):
        steps = [record["step"] for record in records]
        sides = [[number(record.get(f"reward_{side}")) for record in records] for side in ("chosen", "rejected")]
        figure = movement(*(pd.Series(side, index=steps) for side in sides))
        rows = [[f"{step:,}", signed(c), signed(r), signed(c - r)] for step, c, r in zip(steps, *sides, strict=True)]
        drawing = svg(figure, f"sample-{i}", "Rewards of this pair's answers over optimizer steps")
        parts.append(dict(last=with_defaults(records[-1]), svg=drawing, rows=rows))
    note = f"{len(chosen)} of {len(run.samples)} pairs; all are in samples/." if len(chosen) < len(run.samples) else ""
    return parts, note


def with_defaults(record: dict[str, Any]) -> dict[str, Any]:
    """A record of samples/ or mistakes.jsonl with what the page asks of it, also where it is of another version.

    Where it holds the reward along its answers (`trace_chosen`, `trace_rejected`), they become strips."""
    margin = number(record.get("reward_chosen")) - number(record.get("reward_rejected"))
    known = dict(id="", step="", correct="", prompt="", chosen="", rejected="", strip_chosen=None, strip_rejected=None)
    numbers = {name: number(record.get(name)) for name in ("reward_chosen", "reward_rejected", "p_chosen")}
    traces = {side: record.get(f"trace_{side}") for side in ("chosen", "rejected")}
    strips: dict[str, Markup] = {}
    if all(traces.values()) and max(map(len, traces.values())) <= MAX_TOKENS:
        scale = strip_scale(*traces.values())
        strips = {f"strip_{side}": Markup(strip_html(trace, scale)) for side, trace in traces.items()}
    return known | record | numbers | {"margin": margin} | strips


def audit_part(data: dict[str, Any]) -> dict[str, Any] | None:
    """data_report.json as a table with a column for each split, and for each set where there are several."""
    columns = {}
    for split in ("train", "test"):
        part = data.get(split)
        if isinstance(part, dict):
            sets = part.get("sets") if isinstance(part.get("sets"), dict) else {}
            columns |= {f"{split}: {name}": one for name, one in sets.items() if isinstance(one, dict)}
            columns[f"{split}: all" if sets else split] = part
    if not columns:
        return None
    rows = []
    for name, meaning in MEANING.items():
        values = [part.get(name) for part in columns.values()]
        if any(values) or name in ("total", "kept"):
            rows.append([name, *("" if value is None else spelled(number(value)) for value in values), meaning])
    sources = [f"{name}: {part.get('source')}, format {part.get('format')}." for name, part in columns.items()]
    return dict(headers=["count", *columns, "meaning"], rows=rows, sources=sources)


def record_part(run: Run) -> dict[str, Any]:
    """Configuration and provenance of one run."""
    defaults = {}
    for field in dataclasses.fields(RewardConfig):
        has_factory = field.default is dataclasses.MISSING
        defaults[field.name] = field.default_factory() if has_factory else field.default
    changed = []
    for name, value in run.config.items():
        if name not in defaults:
            changed.append([name, plain(value), "(not an option of this version)"])
        elif value != defaults[name]:
            changed.append([name, plain(value), plain(defaults[name])])
    results, facts = run.results, [["folder", str(run.folder)]]
    command = results.get("command")
    names = {"command": " ".join(map(str, command)) if isinstance(command, list) else None}
    names |= {"commit": results.get("git_commit"), "layout": results.get("layout"), "adapter": results.get("adapter")}
    facts += [[name, value if isinstance(value, str) else plain(value)] for name, value in names.items() if value]
    for name in ("packages", "machine"):
        if isinstance(results.get(name), dict):
            facts += [[name, ", ".join(f"{key} {value}" for key, value in results[name].items())]]
    for split, part in run.data.items():
        if isinstance(part, dict) and part.get("fingerprint"):
            facts.append([f"{split} pairs, sha256", str(part["fingerprint"])])
    options = [[name, plain(value)] for name, value in run.config.items()]
    return dict(name=run.name, changed=changed, options=options, facts=facts, diff=results.get("git_diff") or "")


def paired_differences(one: Run, other: Run) -> list[list[str]]:
    """Rows on `one` minus `other` over the pairs that both have scored, if they were evaluated on the same data."""
    prints = [(run.data.get("test") or {}).get("fingerprint") for run in (one, other)]
    tables = [run.table() for run in (one, other)]
    if prints[0] != prints[1] or prints[0] is None or any(table is None or "row" not in table for table in tables):
        return []
    options = [{key: run.config.get(key) for key in LOSS_OPTIONS} for run in (one, other)]
    names = {"accuracy": "accuracy", "brier": "Brier score"} | ({"loss": "loss"} if options[0] == options[1] else {})
    try:
        values, intervals = compare_tables(
            *map(with_finite_rewards, tables),
            center_rewards_coefficient=options[0]["center_rewards_coefficient"],
            label_smoothing=options[0]["label_smoothing_factor"] or 0.0,
        )
    except ValueError:  # no pair in common
        return []
    rows = []
    for name, words in names.items():
        key = f"compare/{name}_difference"
        ends = to(*map(signed, intervals[key])) if key in intervals else ""
        rows.append([f"{one.name} − {other.name}", words, signed(values[key]), ends, spelled(values["compare/pairs"])])
    return rows
