"""Inputs that can be scored, to trees of token ids; and JSON lines, which may be too many for memory.

An input is a dict. The first of these sets of keys that it has decides what it is; other keys are ignored:

    input_ids_chosen, input_ids_rejected    token ids of a pair, as in training (also by the other names of `formats`)
    input_ids                               token ids of one sequence
    chosen, rejected, perhaps prompt        a pair, in any format of training
    prompt, responses                       a prompt and N answers
    prompt, response                        a prompt and one answer
    messages                                one conversation
    text                                    one text

Text is scored as text and messages by the chat template, as in training; a prompt and answers of text are messages too
with `text_as_conversation`. To a prompt of messages an answer may be a message, a list of messages, or text.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from rm.config.errors import InputError
from rm.data.formats import (
    SIDES,
    TOKEN_COLUMNS,
    Encoding,
    Example,
    RowError,
    describe,
    make_example,
    stored_ids,
    template_variables,
)
from rm.data.load import one_line
from rm.data.render import is_blank
from rm.data.tokenize import Tree, encode_examples, make_tree, truncate_left

MASKS = {  # keys of token ids -> those of their attention masks
    **TOKEN_COLUMNS,
    ("input_ids",): ("attention_mask",),
}
FORMS = [*MASKS, SIDES, ("prompt", "responses"), ("prompt", "response"), ("messages",), ("text",)]


def keys_of(record: Any) -> tuple[str, ...]:
    """Which of `FORMS` an input is. Raises `RowError`."""
    if type(record) is not dict:
        raise RowError(f"is {describe(record)}, expected an object with keys")
    for keys in FORMS:
        if all(record.get(key) is not None for key in keys):
            return keys
    given = ", ".join(key for key, value in record.items() if value is not None)[:200] or "none"
    fix = "give text, messages, prompt and response or responses, or chosen and rejected"
    raise RowError(f"nothing to score (keys that are not null: {given}); {fix}")


def read_input(record: Any, encoding: Encoding) -> Example:
    """The example of an input, without comparisons. Raises `RowError`."""
    keys = keys_of(record)
    if keys in MASKS:
        named = zip(keys, MASKS[keys], strict=True)
        ids = [stored_ids(record[key], record.get(mask), key, encoding.vocab_size) for key, mask in named]
        return Example("tokens", None, ids, keys)
    prompt, names = record.get("prompt"), [key for key in keys if key != "prompt"]
    answers = [record[key] for key in names]
    if keys == ("prompt", "responses"):
        answers = record["responses"]
        if type(answers) is not list or not answers:
            problem = "an empty list" if answers == [] else describe(answers)
            raise RowError(f"'responses' is {problem}, expected a list of one answer or more")
        names = [f"responses[{i}]" for i in range(len(answers))]
    elif keys in (("text",), ("messages",)):
        prompt, kind = None, str if keys == ("text",) else list
        if type(answers[0]) is not kind:
            expected = "text" if kind is str else "a list of messages"
            raise RowError(f"{keys[0]!r} is {describe(answers[0])}, expected {expected}")
    example = make_example(prompt, dict(zip(names, answers, strict=True)), encoding.text_as_conversation)
    for name, answer in zip(names, example.answers, strict=True):
        if is_blank(answer):
            raise RowError(f"{name!r} is blank")
    if example.kind == "conversation":
        example.variables = template_variables(record, encoding.chat_template_kwargs)
    return example


def encode_inputs(
    records: Sequence[Any], tokenizer: Any, encoding: Encoding, max_positions: int | None = None
) -> list[Tree | RowError]:
    """Each input's sequences as a tree, their common prefix once; or what is wrong with it.

    `encoding.max_length` and `max_positions` (of the model) limit the tokens of a sequence; a longer one is an error,
    or truncated (`encoding.overlength`).
    """
    examples: list[Example | RowError] = []
    for record in records:
        try:
            if isinstance(record, RowError):
                raise record
            example = read_input(record, encoding)
            if example.kind == "conversation" and not tokenizer.chat_template:
                raise RowError("messages need a chat template, and the model's tokenizer has none; give text")
            examples.append(example)
        except RowError as error:
            examples.append(error)
    trees: list[Tree | RowError] = []
    for example, sequences in zip(examples, encode_examples(examples, tokenizer, encoding), strict=True):
        try:
            trees.append(_tree(example, sequences, tokenizer.bos_token_id, encoding, max_positions))
        except RowError as error:
            trees.append(error)
    return trees


def _tree(example: Example, sequences: Any, bos: int | None, encoding: Encoding, max_positions: int | None) -> Tree:
    if isinstance(sequences, RowError):
        raise sequences
    limit = min(encoding.max_length or math.inf, max_positions or math.inf)
    for name, ids in zip(example.names, sequences, strict=True):
        if not len(ids):
            raise RowError(f"{name!r} has no tokens")
        if len(ids) > limit and encoding.overlength == "drop":
            whose = "max_length allows" if limit == encoding.max_length else "the model has positions for"
            raise RowError(f"{name!r} has {len(ids)} tokens, {whose} {limit}; overlength=truncate_left cuts the start")
    if max(map(len, sequences)) > limit:
        sequences = truncate_left(sequences, int(limit), bos)
    return make_tree(sequences)


# ---------------------------------------------------------------- lines


def open_input(path: str | None) -> tuple[BinaryIO, BinaryIO]:
    """The lines (a file, also .gz; None: stdin), and the raw file whose position tells how far they are read."""
    if path is None:
        return sys.stdin.buffer, sys.stdin.buffer
    raw = open(path, "rb")  # noqa: SIM115
    return (gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw), raw


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, the JSON object in it or a `RowError`) of every line that is not blank.

    Raises:
        InputError: the compressed file is broken, or the disk.
    """
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _parse(line)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read after line {number}: {one_line(error)}") from error


def _parse(line: bytes) -> dict | RowError:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=reject)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")
    return record if type(record) is dict else RowError("not a JSON object with keys")
