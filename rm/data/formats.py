"""From a raw row to an `Example`: a prompt, its answers, and the comparisons between them.

The layout of the data is found from the names of its columns; a new layout is one entry of `DATA_LAYOUTS`. Layout and
types give the format, which is in the log and in data_report.json; docs/data.md lists the formats. Optional columns:
those of `rm.data.columns`, score_chosen and score_rejected, id, subset; of conversations also tools and
chat_template_kwargs.
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
TYPES = {type(None): "missing (null)", bool: "true or false", int: "a number", float: "a number"}
TYPES |= {str: "text", list: "a list", dict: "an object"}


class RowError(ValueError):
    """A row that cannot be used: what is wrong, in one line."""


@dataclass(slots=True)
class Example:
    """A prompt with N answers and C comparisons.

    kind: "text", "conversation" or "tokens". prompt: text or messages; None where each answer contains it.
    answers: N texts, lists of messages, or token ids. names: N keys, for error messages. comparisons: C pairs
    (chosen, rejected) of answer indices. columns: C values of each comparison column, N of each answer column.
    variables: keyword arguments of the chat template. id, subset: None where the data have none.
    """

    kind: str
    prompt: Any
    answers: list
    names: Sequence[str] = SIDES
    variables: dict[str, Any] = field(default_factory=dict)
    comparisons: list[tuple[int, int]] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    id: str | None = None
    subset: str | None = None


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
    expect(row.get("prompt", ""), (str, list), "'prompt'", "text or messages")
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
        mask_values = (row[mask] or []) if mask in row else None
        ids.append(stored_ids(row[name], mask_values, name, encoding.vocab_size))
    return Example("tokens", None, ids, names)


DATA_LAYOUTS = {  # name -> layout; the first one whose columns exist is used
    **{
        names[0]: DataLayout(names, partial(read_tokens, names=names, masks=masks), optional=masks)
        for names, masks in TOKEN_COLUMNS.items()
    },
    "pair": DataLayout(SIDES, read_pair, optional=("prompt",)),
}


def detect_format(source: Source, config: Any, tokenizer: Any, text_as_conversation: bool) -> Encoding:
    """The format of a data set by its columns and the types in its first row, and the options that decide its tokens.

    Raises:
        InputError: unknown columns, or a wrong first row.
    """
    features = source.dataset.features
    layout = next((name for name, known in DATA_LAYOUTS.items() if features.keys() >= set(known.columns)), None)
    if layout is None:
        raise InputError(
            f"{source.name}: needs the columns 'chosen' and 'rejected' (text or messages), or 'input_ids_chosen' and "
            f"'input_ids_rejected'; its columns are {', '.join(features)}"
        )
    pairs = {name: [f"{name}_{side}" for side in SIDES] for name in ANSWER_COLUMNS}
    encoding = Encoding(
        data_layout=layout,
        numbers=columns_to_read(features, config, source.name),
        answer_numbers={name: columns for name, columns in pairs.items() if features.keys() >= set(columns)},
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
    if example.comparisons:
        encoding = replace(encoding, answer_numbers={})
        if config.margin_from_scores:
            raise InputError(f"{source.name}: margin_from_scores is for pairs, and rows have several answers")
    name = layout
    if layout == "pair":
        without_lists = "implicit_prompt" if example.prompt is None else "explicit_prompt"
        name = "lists" if example.comparisons else without_lists
    encoding = replace(encoding, format="tokenized" if example.kind == "tokens" else f"{example.kind}_{name}")
    if text_as_conversation and example.kind == "text" and example.prompt is not None:
        encoding = replace(encoding, format="conversation_from_text", text_as_conversation=True)
    if config.text_as_conversation and encoding.format == "text_implicit_prompt":
        fix = "give the prompts in a column of their own, or set text_as_conversation to false"
        raise InputError(f"{source.name}: text without a column 'prompt' cannot be made a conversation; {fix}")
    has_date = encoding.kind == "conversation" and "strftime_now" in str(tokenizer.chat_template)
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
    example.id, example.subset = _label(row, "id"), _label(row, "subset")
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
        for column in encoding.answer_numbers["score"]:
            expect(row[column], (int, float), repr(column), "a number")
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
    expect(prompt, (str, list, type(None)), "'prompt'", "text or messages")
    for name, answer in answers.items():
        expect(answer, (str, list, dict), repr(name), "text or messages")
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
        expect(message, (dict,), f"{name}[{i}]", "a message with role and content")
        expect(message.get("role"), (str,), f"{name}[{i}]['role']", "text")
        if message.get("content") is not None or not message.get("tool_calls"):
            expect(message.get("content"), (str, list), f"{name}[{i}]['content']", "text")
    return without_none(messages)


def template_variables(row: dict[str, Any], chat_template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a row's rendering: its tools, the run's variables, and its own. Raises `RowError`."""
    own = {}
    for name, kind, expected in (("tools", list, "a list"), ("chat_template_kwargs", dict, "an object")):
        value = row.get(name)
        if type(value) is str:
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        expect(value, (kind, type(None)), repr(name), expected)
        own[name] = without_none(value)
    return {"tools": own["tools"] or None, **chat_template_kwargs, **(own["chat_template_kwargs"] or {})}


def _label(row: dict[str, Any], column: str) -> str | None:
    if column not in row:
        return None
    expect(row[column], (str, int), repr(column), "text or a whole number")
    text = str(row[column])
    return text if text.strip() else "(empty)"


def _number(value: Any, name: str, column: Column) -> float:
    expect(value, (int, float), repr(name), "a number")
    if not (abs(value) <= LARGEST and column.low <= value <= column.high):
        raise RowError(f"{name!r} is {float(value)}, expected a finite number from {column.low:g} to {column.high:g}")
    return float(value)


def stored_ids(ids: Any, mask: Any, name: str, vocab_size: int) -> np.ndarray:
    """Token ids (int32) without the positions that the attention mask marks as padding. Raises `RowError`."""
    if type(ids) is not list or not set(map(type, ids)) <= {int}:
        raise RowError(f"{name!r} is not a list of whole numbers")
    if mask is not None and (type(mask) is not list or len(mask) != len(ids) or not set(mask) <= {0, 1}):
        raise RowError(f"{name!r} needs an attention mask of as many 0s and 1s as it has tokens")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RowError(f"{name!r} has token ids from {min(ids)} to {max(ids)}, the tokenizer 0 to {vocab_size - 1}")
    values = np.array(ids, np.int32)
    return values if mask is None else values[np.array(mask, bool)]


def expect(value: Any, types: tuple[type, ...], name: str, expected: str) -> None:
    """Raise `RowError` unless the value has one of the types."""
    if type(value) not in types:
        raise RowError(f"{name} is {describe(value)}, expected {expected}")


def describe(value: Any) -> str:
    """What a person would call the type of a JSON value."""
    return TYPES.get(type(value), f"a {type(value).__name__}")


def without_none(value: Any) -> Any:
    """Without the keys that are None: `datasets` adds the keys of other rows, and a template would print them."""
    if type(value) is dict:
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if type(value) is list else value
