"""From a raw row to an `Example`: a prompt, its answers, and the comparisons between them.

The layout of the data is found from the names of its columns; a new layout is one entry of `DATA_LAYOUTS`. Layout and
types give the format, which is in the log and in data_report.json:

    text_implicit_prompt           chosen, rejected: strings that begin alike (hh-rlhf)
    text_explicit_prompt           prompt, chosen, rejected: strings
    conversation_implicit_prompt   chosen, rejected: lists of messages {"role": ..., "content": ...} that begin alike
    conversation_explicit_prompt   prompt, chosen, rejected: lists of messages; or only the prompt
    conversation_from_text         text_explicit_prompt with `text_as_conversation`: the prompt is the user's message,
                                   the answers are the assistant's
    tokenized                      input_ids_chosen, input_ids_rejected (or chosen_ids, rejected_ids, or
                                   chosen_input_ids, rejected_input_ids), each with an attention mask or without
    text_lists                     chosen, rejected: lists of strings, each right answer compared with each wrong one
    text_NAME, conversation_NAME   another entry NAME of `DATA_LAYOUTS`

Optional columns: those of `rm.data.columns`, score_chosen and score_rejected, id, subset; for conversations also tools
and chat_template_kwargs.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rm.config.errors import InputError
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS, Column, columns_to_read
from rm.data.load import Source

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
TOKEN_COLUMNS = {  # ids of chosen and rejected -> their attention masks
    ("input_ids_chosen", "input_ids_rejected"): ("attention_mask_chosen", "attention_mask_rejected"),
    ("chosen_ids", "rejected_ids"): ("chosen_mask", "rejected_mask"),
    ("chosen_input_ids", "rejected_input_ids"): ("chosen_attention_mask", "rejected_attention_mask"),
}
LARGEST = float(np.finfo(np.float32).max)


class RowError(ValueError):
    """A row that cannot be used: what is wrong, in one line, and perhaps its number (from 0) in the data."""

    def __init__(self, problem: str, row: int = -1):
        super().__init__(problem, row)  # both as args: it is pickled on the way out of a worker
        self.problem, self.row = problem, row

    def __str__(self) -> str:
        return self.problem


@dataclass(slots=True)
class Example:
    """A prompt with N answers and C comparisons.

    kind: "text", "conversation" or "tokens". prompt: text or messages; None where each answer contains it.
    answers: N texts, lists of messages, or token ids. names: N keys, for error messages. comparisons: C pairs
    (chosen, rejected) of answer indices. columns: C values of each comparison column, N of each answer column.
    variables: keyword arguments of the chat template.
    """

    kind: str
    prompt: Any
    answers: list
    names: Sequence[str] = SIDES
    variables: dict[str, Any] = field(default_factory=dict)
    comparisons: list[tuple[int, int]] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoding:
    """Everything that decides a row's tokens and numbers, besides the row and the tokenizer."""

    format: str = ""
    data_layout: str = ""  # key of `DATA_LAYOUTS`
    numbers: dict[str, str] = field(default_factory=dict)  # comparison column -> data column
    answer_numbers: dict[str, list[str]] = field(default_factory=dict)  # answer column -> a data column per answer
    add_eos: bool = True
    text_as_conversation: bool = False
    margin_from_scores: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    overlength: str = "drop"
    vocab_size: int = 0

    @property
    def kind(self) -> str:
        return "tokens" if self.format == "tokenized" else self.format.split("_")[0]


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True)
class DataLayout:
    """Data whose `columns` all exist are read by `read`: a function of a raw row and the `Encoding`. Raises `RowError`.

    A layout of pairs needs no comparisons: the first answer is the chosen one. optional: other columns that are read.
    """

    columns: tuple[str, ...]
    read: Callable[[dict[str, Any], "Encoding"], Example]
    optional: tuple[str, ...] = ()


def read_pair(row: dict[str, Any], encoding: Encoding) -> Example:
    if "prompt" in row and row["prompt"] is None:
        raise RowError("'prompt' is missing (null), expected text or messages")
    answers, comparisons = {side: row[side] for side in SIDES}, []
    if all(type(row[side]) is list and row[side] and all(type(x) is str for x in row[side]) for side in SIDES):
        answers = {f"{side}[{i}]": text for side in SIDES for i, text in enumerate(row[side])}
        right = range(len(row["chosen"]))  # each right answer is compared with each wrong one
        comparisons = list(itertools.product(right, range(len(right), len(answers))))
    example = make_example(row.get("prompt"), answers, encoding.text_as_conversation)
    return replace(example, comparisons=comparisons)


def read_tokens(row: dict[str, Any], encoding: Encoding, names: Sequence[str], masks: Sequence[str]) -> Example:
    ids = []
    for name, mask in zip(names, masks, strict=True):
        if mask in row and row[mask] is None:
            raise RowError(f"{mask!r} is missing (null), expected a list of 0s and 1s")
        ids.append(stored_ids(row[name], row.get(mask), name, encoding.vocab_size))
    return Example("tokens", None, ids, names)


DATA_LAYOUTS = {  # name -> layout; the first one whose columns exist is used
    **{
        names[0]: DataLayout(names, partial(read_tokens, names=names, masks=masks), optional=masks)
        for names, masks in TOKEN_COLUMNS.items()
    },
    "pair": DataLayout(SIDES, read_pair, optional=("prompt",)),
}


def detect_format(source: Source, config: Any, tokenizer: Any, text_as_conversation: bool = False) -> Encoding:
    """The format of a data set by its columns and the types in its first row, and the options that decide its tokens.

    Raises:
        InputError: unknown columns, a wrong first row, or a tokenizer that lacks a chat template or EOS.
    """
    features = source.dataset.features
    layout = next((name for name, known in DATA_LAYOUTS.items() if all(c in features for c in known.columns)), None)
    if layout is None:
        raise InputError(
            f"{source.name}: needs the columns 'chosen' and 'rejected' (text or messages), or 'input_ids_chosen' and "
            f"'input_ids_rejected'; its columns are {', '.join(features)}"
        )
    pairs = {name: [f"{name}_{side}" for side in SIDES] for name in ANSWER_COLUMNS}
    encoding = Encoding(
        data_layout=layout,
        numbers=columns_to_read(features, config, source.name),
        answer_numbers={name: columns for name, columns in pairs.items() if all(c in features for c in columns)},
        add_eos=config.add_eos,
        margin_from_scores=config.margin_from_scores,
        chat_template_kwargs=config.chat_template_kwargs or {},
        max_length=config.max_length,
        overlength=config.overlength,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
    )
    try:
        read = [name for name in (*DATA_LAYOUTS[layout].columns, *DATA_LAYOUTS[layout].optional) if name in features]
        example = DATA_LAYOUTS[layout].read(source.dataset.select_columns(read).with_format(None)[0], encoding)
    except (RowError, UnicodeDecodeError) as error:
        raise InputError(f"{source.row_name(0)}: {error}") from None
    has_prompt = example.prompt is not None
    name = layout
    if layout == "pair":
        name = "explicit_prompt" if has_prompt else "implicit_prompt"
    if example.comparisons:
        name, encoding = "lists" if layout == "pair" else layout, replace(encoding, answer_numbers={})
        if config.margin_from_scores:
            raise InputError(f"{source.name}: margin_from_scores is for pairs, and rows have several answers")
    encoding = replace(encoding, format="tokenized" if example.kind == "tokens" else f"{example.kind}_{name}")
    if text_as_conversation and example.kind == "text" and has_prompt:
        encoding = replace(encoding, format="conversation_from_text", text_as_conversation=True)
    if encoding.kind == "text" and config.add_eos and tokenizer.eos_token_id is None:
        raise InputError(f"{source.name}: the tokenizer has no EOS token to append to text; set add_eos to false")
    if encoding.kind == "conversation":
        if not tokenizer.chat_template:
            fix = "set chat_template_path, or give the data as text"
            raise InputError(f"{source.name}: conversations need a chat template, the tokenizer has none; {fix}")
        has_date = "strftime_now" in str(tokenizer.chat_template)
        if has_date and not any("date" in key for key in encoding.chat_template_kwargs):
            logger.warning(
                "the chat template may write today's date into the prompt, so that rewards change from day to day; "
                'set the date, for most templates with chat_template_kwargs: {"date_string": "26 Jul 2024"}'
            )
    return encoding


# ---------------------------------------------------------------- one row


def read_row(row: dict[str, Any], encoding: Encoding) -> Example:
    """The example in a raw row. Raises `RowError`."""
    example = DATA_LAYOUTS[encoding.data_layout].read(row, encoding)
    if example.kind != encoding.kind:
        raise RowError(f"{example.names[0]!r} is {example.kind}, expected {encoding.kind}, as in the other rows")
    if example.kind == "conversation":
        example.variables = template_variables(row, encoding.chat_template_kwargs)
    example.comparisons = list(example.comparisons or [(0, 1)])
    add_numbers(row, example, encoding)
    return example


def add_numbers(row: dict[str, Any], example: Example, encoding: Encoding) -> None:
    """Read the numeric columns; a comparison with p_chosen below 0.5 is swapped. Raises `RowError`."""
    for name, column in encoding.numbers.items():
        value = _number(row[column], column, COMPARISON_COLUMNS[name])
        example.columns[name] = [value] * len(example.comparisons)
    for name, columns in encoding.answer_numbers.items():
        default = ANSWER_COLUMNS[name].default
        values = [default if row[c] is None else _number(row[c], c, ANSWER_COLUMNS[name]) for c in columns]
        example.columns[name] = values
    if encoding.margin_from_scores:
        score = example.columns["score"]
        for value, column in zip(score, encoding.answer_numbers["score"], strict=True):
            if value != value:
                raise RowError(f"{column!r} is missing (null), expected a number")
        example.columns["margin"] = [score[chosen] - score[rejected] for chosen, rejected in example.comparisons]
    for c, p_chosen in enumerate(example.columns.get("p_chosen", ())):
        if p_chosen < 0.5:
            example.comparisons[c] = example.comparisons[c][::-1]
            example.columns["p_chosen"][c] = 1 - p_chosen
            for name in example.columns.keys() & COMPARISON_COLUMNS.keys():
                if COMPARISON_COLUMNS[name].is_signed:
                    example.columns[name][c] *= -1


def make_example(prompt: Any, answers: dict[str, Any], text_as_conversation: bool = False) -> Example:
    """The example of a prompt (text, messages, None) and its answers {name: text, messages or one message}.

    Answers of text to a prompt of messages are messages of the assistant. With `text_as_conversation` a prompt of text
    is a message of the user. A prompt of text beside whole conversations must be one of their messages. The names are
    for error messages. Raises `RowError`.
    """
    if type(prompt) not in (str, list, type(None)):
        raise RowError(f"'prompt' is {describe(prompt)}, expected text or messages")
    for name, answer in answers.items():
        if type(answer) not in (str, list, dict):
            raise RowError(f"{name!r} is {describe(answer)}, expected text or messages")
    texts = [name for name, answer in answers.items() if type(answer) is str]
    others = [name for name in answers if name not in texts]
    if text_as_conversation and type(prompt) is str and not others:
        prompt = [{"role": "user", "content": prompt}]
    if type(prompt) is not list and not others:
        return Example("text", prompt, list(answers.values()), list(answers))
    if type(prompt) is list:
        prompt = check_messages(prompt, "prompt")
    elif texts:
        raise RowError(f"{texts[0]!r} is text, {others[0]!r} is messages; they must be alike")
    conversations = []
    for name, answer in answers.items():
        messages = [{"role": "assistant", "content": answer}] if type(answer) is str else answer
        messages = check_messages([messages] if type(messages) is dict else messages, name)
        if type(prompt) is str and not any(message.get("content") == prompt for message in messages[:-1]):
            fix = 'give it as [{"role": "user", "content": ...}]'
            raise RowError(f"'prompt' is text, but not a message of {name!r}; {fix}")
        conversations.append(messages)
    return Example("conversation", prompt if type(prompt) is list else None, conversations, list(answers))


def check_messages(messages: list, name: str) -> list[dict]:
    """The messages without keys that are None. Raises `RowError` unless each has a role and a content."""
    if not messages:
        raise RowError(f"{name!r} is an empty list, expected one message or more")
    for i, message in enumerate(messages):
        if type(message) is not dict:
            raise RowError(f"{name}[{i}] is {describe(message)}, expected a message with role and content")
        if type(message.get("role")) is not str:
            raise RowError(f"{name}[{i}]['role'] is {describe(message.get('role'))}, expected text")
        content = message.get("content")
        if type(content) not in (str, list) and (content is not None or not message.get("tool_calls")):
            raise RowError(f"{name}[{i}]['content'] is {describe(content)}, expected text")
    return without_none(messages)


def template_variables(row: dict[str, Any], chat_template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a row's rendering: its tools, the run's variables, and its own. Raises `RowError`."""
    own = {}
    for name, kind, expected in (("tools", list, "a list"), ("chat_template_kwargs", dict, "an object")):
        value = row.get(name)
        if type(value) is str:
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if type(value) not in (kind, type(None)):
            raise RowError(f"{name!r} is {describe(value)}, expected {expected}")
        own[name] = without_none(value)
    return {"tools": own["tools"] or None, **chat_template_kwargs, **(own["chat_template_kwargs"] or {})}


def label(row: dict[str, Any], column: str) -> str:
    """An id or a subset. Raises `RowError`."""
    if type(row[column]) not in (str, int):
        raise RowError(f"{column!r} is {describe(row[column])}, expected text or a whole number")
    return str(row[column])


def _number(value: Any, name: str, column: Column) -> float:
    if type(value) not in (int, float):
        raise RowError(f"{name!r} is {describe(value)}, expected a number")
    if not (abs(value) <= LARGEST and column.low <= value <= column.high):
        raise RowError(f"{name!r} is {float(value)}, expected {column.expected}")
    return float(value)


def stored_ids(ids: Any, mask: Any, name: str, vocab_size: int) -> np.ndarray:
    """Token ids (int32) without the positions that the attention mask marks as padding. Raises `RowError`."""
    if type(ids) is not list:
        raise RowError(f"{name!r} is {describe(ids)}, expected a list of whole numbers")
    bad = next((i for i, value in enumerate(ids) if type(value) is not int), None)
    if bad is not None:
        raise RowError(f"{name}[{bad}] is {describe(ids[bad])}, expected a whole number")
    if mask is not None and (type(mask) is not list or len(mask) != len(ids) or not set(mask) <= {0, 1}):
        raise RowError(f"{name!r} needs an attention mask of as many 0s and 1s as it has tokens")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise RowError(f"{name!r} has the token id {bad}, the tokenizer 0 to {vocab_size - 1}")
    values = np.array(ids, np.int32)
    return values if mask is None else values[np.array(mask, bool)]


def describe(value: Any) -> str:
    """What a person would call the type of a JSON value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {type(None): "missing (null)", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"a {type(value).__name__}")


def without_none(value: Any) -> Any:
    """Without the keys that are None: `datasets` adds the keys of other rows, and a template would print them."""
    if type(value) is dict:
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if type(value) is list else value
