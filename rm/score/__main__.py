"""Rewards for what a file holds: JSON lines in, JSON lines out.

python -m rm.score --model OUT --input x.jsonl --output y.jsonl       # again: goes on where it was
zcat x.jsonl.gz | python -m rm.score --model OUT > y.jsonl
python -m rm.score --help
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from rm.config.cli import split_arguments, take_option
from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.redact import safe_line
from rm.data.items import ItemError, family_of
from rm.model.load import check_folder
from rm.score.answers import answer_lines, is_same
from rm.score.inputs import (
    Signals,
    Stopped,
    die_of,
    open_input,
    open_output,
    parse_line,
    read_lines,
    read_output,
    to_line,
    windows,
)
from rm.score.loading import OPTIONS, load_scorer
from rm.score.scorer import Scorer
from rm.train.processes import processes_asked_for

logger = logging.getLogger(__name__)

OWN_OPTIONS = {
    "model": "the output folder of a run, or a hub name",
    "input": "JSON lines, also .gz; -, or nothing: stdin",
    "output": "file to append to, after the lines that it has; -, or nothing: stdout",
    "normalize": "give (r - mean) / std, over answers of the training set, instead of the reward r (true, false)",
    "only_rewards": "leave the input's own keys out of the output, but for id (true, false)",
    "window_size": "lines read, sorted by length, scored and written at a time (256); no reward depends on it",
}


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    """Score the input; returns the exit code, 0, or 1 if there are lines and none could be scored."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    model, source, target, flags, options = _parse(argv)
    end, written, records = read_output(target) if target else (0, 0, [])
    scorer = load_scorer(model, normalize=flags["normalize"], **options)
    logger.info(f"{model}: {scorer.layout} ({scorer.reason}) on {scorer.device}")
    signals, started = Signals(), time.perf_counter()
    stream, raw = open_input(source)
    lines = read_lines(stream, source or "stdin")
    done = records[-1]["line"] if records else 0
    if records:
        lines = _skip(scorer, lines, records, target, source, flags["only_rewards"])
        logger.info(f"{target}: has the lines up to {done}; what comes after them is scored")
    file = open_output(target, end, written) if target else sys.stdout.buffer
    size = os.path.getsize(source) if source and Path(source).is_file() else None  # of a pipe it is not known
    num_lines = num_errors = num_tokens = 0
    first_error = None
    try:
        with tqdm(total=size, unit="B" if size else "line", unit_scale=True, dynamic_ncols=True) as bar:
            for window in windows(lines, flags["window_size"]):
                answered = answer_lines(scorer, window, flags["only_rewards"])
                with signals.held():
                    _write(file, b"".join(to_line(record) for record, _ in answered))
                    done = window[-1][0]
                errors = [record for record, _ in answered if "error" in record]
                first_error = first_error or next(iter(errors), None)
                num_lines, num_errors = num_lines + len(window), num_errors + len(errors)
                num_tokens += sum(tokens for _, tokens in answered)
                if num_lines == len(window):
                    made = scorer.encoding["text_as_conversation"]
                    warn_of_family(window, trained_families(model), made)
                bar.update(raw.tell() - bar.n if size else len(window))
                speed = num_tokens / (time.perf_counter() - started)
                bar.set_postfix_str(f"{num_lines:,} lines, {num_errors:,} errors, {speed:,.0f} tokens/s")
    except Stopped as stopped:
        again = "; the same command goes on there" if target and source else ""
        print(f"stopped after line {done}{again}", file=sys.stderr)
        die_of(stopped.args[0])
    seconds = time.perf_counter() - started
    said = f"{num_lines:,} lines, {num_errors:,} errors, {num_tokens:,} tokens in {seconds:.1f} s"
    said += f" ({num_tokens / seconds:,.0f} tokens/s)"
    if first_error:
        said += f"; the first error, line {first_error['line']}: {first_error['error']}"
    print(safe_line(said), file=sys.stderr)
    return 1 if num_lines and num_errors == num_lines and not records else 0


def _parse(argv: list[str]) -> tuple[str, str | None, Path | None, dict[str, Any], dict[str, Any]]:
    """(model, input or None, output or None, flags, options of `load_scorer`); all that can be wrong before loading."""
    given, rest = {}, argv
    for name in OWN_OPTIONS:
        given[name], rest = take_option(rest, name, is_flag=name in ("normalize", "only_rewards"))
    files, options = split_arguments(rest)
    if files:
        raise InputError("--config: the run's own is read; give options on the command line")
    if unknown := [name for name in options if name not in OPTIONS]:
        raise InputError(f"command line: {unknown[0]} cannot act in scoring; see python -m rm.score --help")
    if given["model"] is None:
        raise InputError("command line: --model FOLDER is needed: the output folder of a run, or a hub name")
    if options.get("overlength") == "truncate_left" and "max_length" not in options:
        logger.info("overlength=truncate_left without max_length: cuts what is longer than the model's positions")
    size = given["window_size"] or "256"
    if not size.isdecimal() or int(size) == 0:
        raise InputError(f"command line: window_size={size!r} does not fit; expected a number of lines")
    if processes_asked_for() > 1:
        raise InputError("scoring runs in one process; split the input and start a process for each part")
    check_folder(given["model"])
    source, target = (None if given[name] in (None, "-") else given[name] for name in ("input", "output"))
    if source is None and given["input"] is None and sys.stdin.isatty():
        raise InputError("command line: --input FILE is needed, or lines on stdin")
    if source is not None and (not Path(source).exists() or Path(source).is_dir()):
        raise InputError(f"--input={source}: there is no such file")
    if source is not None and not os.access(source, os.R_OK):
        raise InputError(f"--input={source}: must not be read")
    if target is not None:
        if not Path(target).absolute().parent.is_dir():
            raise InputError(f"--output={target}: its folder does not exist; make it first")
        if Path(target).exists() and not Path(target).is_file() or target.endswith(".gz"):
            raise InputError(f"--output={target}: is no plain file to append to; give another name")
        if not os.access(target if Path(target).exists() else Path(target).absolute().parent, os.W_OK):
            raise InputError(f"--output={target}: must not be written")
        if source is not None and Path(target).exists() and os.path.samefile(source, target):
            raise InputError(f"--output={target}: is the input; give another name")
    flags = {"normalize": bool(given["normalize"]), "only_rewards": bool(given["only_rewards"])}
    return given["model"], source, Path(target) if target else None, flags | {"window_size": int(size)}, options


def _write(file: Any, data: bytes) -> None:
    """All bytes, now; an unbuffered file may take a part of them only."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
    file.flush()


def _skip(scorer: Scorer, lines, records: list[dict], target: Path, source: str | None, only_rewards: bool):
    """The lines after those that the output has. Raises `InputError` if it is not this model's output to this input.

    The records at both its ends are made again and compared.
    """
    other = "it is of another input, model or options; give another --output, or remove it"
    known, checked, last = {record["line"]: record for record in records}, [], 0
    while last < records[-1]["line"]:
        number, line = next(lines, (None, None))
        if number is None or number > records[-1]["line"]:
            raise InputError(f"{target}: has line {records[-1]['line']}, {source or 'stdin'} has not; {other}")
        last = number
        if number in known:
            checked.append((number, line))
    for again, _ in answer_lines(scorer, checked, only_rewards):
        if not is_same(known[again["line"]], again, scorer):
            raise InputError(f"{target}: line {again['line']} of the input would be answered otherwise now; {other}")
    return lines


def trained_families(model: str) -> set[str]:
    """What a run was trained on, "text", "conversation" or "tokenized", from its data_report.json; empty if unknown."""
    try:
        formats = json.loads((Path(model) / "data_report.json").read_text(encoding="utf-8"))["train"]["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name.split("_")[0] for name in formats.split(", ")}


def warn_of_family(window: Sequence[tuple[int, bytes | None]], trained: set[str], text_as_conversation: bool) -> None:
    """Warn of the first text for a model that was trained on conversations alone, or the other way round."""
    for number, line in window if trained in ({"text"}, {"conversation"}) else ():
        try:
            family = family_of(parse_line(number, line), text_as_conversation)
        except ItemError:
            continue
        if family not in trained | {"tokenized"}:
            text = f"line {number} is text without a prompt to make a message of, and the model was trained on "
            text += "conversations: such lines are scored as they are, without the chat template"
            if family != "text":
                text = f"line {number} is a conversation, and the model was trained on text: such lines are scored by "
                text += "the chat template"
            if family == "text" and not text_as_conversation:
                text = f"line {number} is text, and the model was trained on conversations: such lines are scored as "
                text += "they are, without the chat template"
            return tqdm.write(f"warning: {text}", file=sys.stderr)


def help_text() -> str:
    fields = {field.name: field.metadata["help"] for field in dataclasses.fields(RewardConfig)}
    lines = [__doc__.split("\n")[0], "", "usage: python -m rm.score --model OUT [--input FILE] [--output FILE] ...", ""]
    lines += [f"  --{name}  {text}" for name, text in OWN_OPTIONS.items()]
    lines += ["", "Options of the training, by default as they were then (max_length: none, whatever it was):", ""]
    lines += [f"  --{name}  {fields[name]}" for name in OPTIONS]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or 2)
    except BrokenPipeError:  # nobody reads stdout any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(safe_line(f"error: {error.filename or 'the output'} cannot be used ({error.strerror})"), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        die_of(signal.SIGINT)
    except Stopped as stopped:  # while the model was loaded, or lines were skipped
        die_of(stopped.args[0])
