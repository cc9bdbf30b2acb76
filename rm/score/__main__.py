"""Rewards for the inputs in a file: JSON lines in, JSON lines out.

python -m rm.score --model OUT --input x.jsonl --output y.jsonl       # run again, it continues where it was
zcat x.jsonl.gz | python -m rm.score --model OUT > y.jsonl
python -m rm.score --help
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import transformers
from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from rm.config.cli import parse
from rm.config.errors import InputError
from rm.config.redact import safe_line
from rm.config.section import Section, option
from rm.model.source import check_folder
from rm.score.answers import answer_lines, open_output, skip_answered, to_line
from rm.score.inputs import open_input, read_lines
from rm.score.scorer import ACCEPTED, Scorer

logger = logging.getLogger(__name__)


class Score(Section):
    """usage: python -m rm.score --model OUT [--input FILE] [--output FILE] [--key=value ...]

    Rewards for JSON lines. Options of the training have by default the values that they had then.
    """

    model: str = option(..., "output folder of a run, or hub name")
    input: str | None = option(None, "JSON lines, also .gz; none or -: stdin")
    output: str | None = option(None, "file to append to, after the lines that it has; none or -: stdout")
    normalize: bool = option(False, "write (r - mean) / std, over answers of the training set, instead of the reward r")
    only_rewards: bool = option(False, "leave the input's own keys out of the output, except id")
    window_size: int = option(256, "lines read, scored and written at a time; no reward depends on it", gt=0)


def main(argv: list[str]) -> int:
    """Score the input; returns the exit code: 0, or 1 if there are lines and none could be scored."""
    own, options = parse(argv, Score, accepts=ACCEPTED)
    source, target = (None if path == "-" else path for path in (own.input, own.output))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("scoring runs in one process; split the input and start a process for each part")
    if source is None and own.input is None and sys.stdin.isatty():
        raise InputError("command line: --input FILE is needed, or lines on stdin")
    is_same = source and target and Path(target).exists() and os.path.samefile(source, target)
    if is_same or (target or "").endswith(".gz"):
        raise InputError(f"--output={target}: is the input or a compressed file; give another name")
    check_folder(own.model)
    stream, raw = open_input(source)
    size = os.path.getsize(source) if source and Path(source).is_file() else None  # unknown for a pipe
    lines, num_lines, num_errors, num_tokens, first_error = read_lines(stream, source or "stdin"), 0, 0, 0, ""
    with open_output(Path(target)) if target else nullcontext((sys.stdout.buffer, None)) as (file, last):
        scorer = Scorer(own.model, normalize=own.normalize, **options)
        logger.info(f"{own.model}: {scorer.layout.name} ({scorer.layout.reason}) on {scorer.device}")
        started = time.perf_counter()
        if last:
            skip_answered(scorer, lines, last, Path(target), own.only_rewards)
            logger.info(f"{target}: has the lines up to {last['line']}; the lines after them are scored")
        bar = tqdm(total=size, unit="B" if size else "line", unit_scale=True, dynamic_ncols=True)
        while window := list(islice(lines, own.window_size)):
            answered = answer_lines(scorer, window, own.only_rewards)
            file.write(b"".join(to_line(record) for record, _ in answered))
            file.flush()
            if num_lines == 0:
                scorer.warn_of_kind([record for _, record in window])
            errors = [f"line {record['line']}: {record['error']}" for record, _ in answered if "error" in record]
            first_error = first_error or "".join(errors[:1])
            num_lines, num_errors = num_lines + len(window), num_errors + len(errors)
            num_tokens += sum(tokens for _, tokens in answered)
            bar.update(raw.tell() - bar.n if size else len(window))
            bar.set_postfix_str(f"{num_lines:,} lines, {num_errors:,} errors")
        bar.close()
    seconds = time.perf_counter() - started
    summary = f"{num_lines:,} lines, {num_errors:,} errors, {num_tokens:,} tokens in {seconds:.1f} s"
    summary += f" ({num_tokens / seconds:,.0f} tokens/s)" + (f"; the first error, {first_error}" if first_error else "")
    print(safe_line(summary), file=sys.stderr)
    return 1 if num_lines and num_errors == num_lines and not last else 0


def run() -> int:
    """`main` with its errors as one line and an exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    transformers.logging.disable_progress_bar()  # of weights that load in no time
    try:
        return main(sys.argv[1:])
    except InputError as error:
        print(safe_line(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; with --input and --output the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads stdout any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(safe_line(f"error: {error.filename or 'the output'} cannot be used ({error.strerror})"), file=sys.stderr)
        return 2 if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) else 1
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        print("error: out of memory; give a smaller micro_batch_tokens (it changes no reward)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
