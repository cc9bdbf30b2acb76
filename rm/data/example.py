"""`Example`, what a raw row becomes, and the checks of its values: prompt, answers, messages, token ids, numbers."""

import ast
import contextlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rm.data.columns import Column

SIDES = ("chosen", "rejected")
LARGEST = float(np.finfo(np.float32).max)
TYPES = {type(None): "missing (null)", bool: "true or false", int: "a number", float: "a number"}
TYPES |= {str: "text", list: "a list", dict: "an object"}
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "observation")}


class RowError(ValueError):
    """A row that cannot be used: what is wrong, in one line."""


@dataclass(slots=True)
class Example:
    """A prompt with N answers and C comparisons.

    kind: "text", "conversation" or "tokens". prompt: text or messages; None where each answer contains it.
    answers: N texts, lists of messages, or token ids. names: N keys, for error messages. comparisons: C pairs
    (chosen, rejected) of answer indices; None: a pair, the first answer is better. columns: C values of each comparison
    column, N of each answer column. num_tied: pairs of answers without a comparison, since their scores are equal.
    variables: keyword arguments of the chat template. id, subset: None where the data have none.
    """

    kind: str
    prompt: Any
    answers: list
    names: Sequence[str] = SIDES
    variables: dict[str, Any] = field(default_factory=dict)
    comparisons: list[tuple[int, int]] | None = None
    columns: dict[str, list[float]] = field(default_factory=dict)
    num_tied: int = 0
    id: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class Encoding:
    """Everything that decides a row's tokens and numbers, besides the row and the tokenizer."""

    format: str = ""
    data_layout: str = ""  # key of `DATA_LAYOUTS`
    roles: dict[str, str] = field(default_factory=dict)  # "prompt", "chosen", ... -> data column
    repeats_prompt: bool = False  # answers of text start with the prompt
    numbers: dict[str, str] = field(default_factory=dict)  # comparison column -> data column
    answer_numbers: dict[str, list[str]] = field(default_factory=dict)  # answer column -> a data column per answer
    add_eos: bool = True
    text_as_conversation: bool = False
    margin_from_scores: bool = False
    equal_scores: str = "drop"
    group_by_prompt: bool = False
    max_answers: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    overlength: str = "drop"
    vocab_size: int = 0

    @property
    def kind(self) -> str:
        return "tokens" if self.format == "tokenized" else self.format.split("_")[0]


def make_example(prompt: Any, answers: dict[str, Any], text_as_conversation: bool = False) -> Example:
    """The example of a prompt (text, messages, None) and its answers {name: text, messages or one message}.

    Messages may be stored as JSON or Python text. Answers of text to a prompt of messages are those of the assistant. A
    prompt of text is a message of the user before an answer of the assistant, or with `text_as_conversation`; beside
    whole conversations it is not used. A prompt that all answers repeat is there once. Raises `RowError`.
    """
    prompt, stored = stored_messages(prompt), {name: stored_messages(answer) for name, answer in answers.items()}
    answers = answers if str in map(type, stored.values()) else stored  # one answer of many may be about messages
    expect(prompt, (str, list, type(None)), "'prompt'", "text or messages")
    for name, answer in answers.items():
        expect(answer, (str, list, dict), repr(name), "text or messages")
        if type(answer) is dict and not {"role", "from"} & answer.keys():
            fields = ", ".join(f"{name}.{key}" for key in without_none(answer))
            raise RowError(f"{name!r} is an object, but no message; name one of its fields by an option: {fields}")
    texts = [name for name, answer in answers.items() if type(answer) is str]
    others = [name for name in answers if name not in texts]
    if text_as_conversation and type(prompt) is str and not others:
        prompt = dialogue_of(prompt)
    if type(prompt) is not list and not others:
        return Example("text", prompt, list(answers.values()), list(answers))
    if type(prompt) is list:
        prompt = check_messages(prompt, "prompt")
    elif texts:
        raise RowError(f"{texts[0]!r} is text, {others[0]!r} is messages; they must be alike")
    conversations = []
    for name, answer in answers.items():
        messages = [{"role": "assistant", "content": answer}] if type(answer) is str else answer
        conversations.append(check_messages([messages] if type(messages) is dict else messages, name))
    if type(prompt) is str and all(messages[0]["role"] == "assistant" for messages in conversations):
        prompt = turns_of([prompt])
    for name, messages in zip(answers, conversations, strict=True) if type(prompt) is str else ():
        if len(messages) == 1:
            fix = 'give it as [{"role": "user", "content": ...}]'
            raise RowError(f"'prompt' is text, {name!r} is one message of {messages[0]['role']}; {fix}")
    prompt = prompt if type(prompt) is list else None
    if prompt and prompt[-1]["role"] == "assistant" and any(is_same(a[0], prompt[-1]) for a in conversations):
        prompt = prompt[:-1]  # the whole chosen conversation
    for start in range(len(prompt or ())):  # the answers may repeat only the last messages of the prompt
        count = len(prompt) - start
        if all(len(a) > count and all(map(is_same, a, prompt[start:])) for a in conversations):
            prompt = prompt[:start] + conversations[0][:count]
            conversations = [messages[count:] for messages in conversations]
            break
    return Example("conversation", prompt, conversations, list(answers))


def is_same(one: dict, other: dict) -> bool:
    """Whether two messages are equal, apart from white space in text."""
    texts = [content_text(message.get("content")).split() for message in (one, other)]
    return texts[0] == texts[1] and one | {"content": ""} == other | {"content": ""}


def turns_of(texts: Sequence[str], first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant") if first == "user" else ("assistant", "user"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def dialogue_of(prompt: str) -> list[dict]:
    """The messages of a prompt of text: of the turns after "Human:" and "Assistant:", or one of the user."""
    before, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", prompt.strip())
    if before.strip() or turns[:1] != ["Human"]:
        return turns_of([prompt])
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[turns[i]], "content": turns[i + 1].strip()} for i in range(0, len(turns), 2)]
    return messages if messages[-1]["content"] else messages[:-1]


def stored_messages(value: Any) -> Any:
    """The messages in JSON or Python text (also as NumPy prints them, without commas); any other value itself."""
    if type(value) is not str or not re.match(r"""\s*\[?\s*\{\s*(?=["']).*["'](role|from)["']\s*:""", value, re.DOTALL):
        return value
    for parse, text in ((json.loads, value), (ast.literal_eval, re.sub(r"\}\s*\n\s*\{", "}, {", value))):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = parse(text)
            messages = [parsed] if type(parsed) is dict else parsed
            return messages if all(map(_is_message, messages)) else value
    return value


def _is_message(value: Any) -> bool:
    role = value.get("role", value.get("from")) if type(value) is dict else None
    return type(role) is str and role.lower() in ROLES and bool({"content", "value", "tool_calls"} & value.keys())


def check_messages(messages: list, name: str) -> list[dict]:
    """The messages with the keys role and content (for from and value) and no keys that are None; human is user, gpt
    assistant. Raises `RowError` for a wrong message, and for parts of its content that are not text."""
    if not messages:
        raise RowError(f"{name!r} is an empty list, expected one message or more")
    checked = []
    for i, message in enumerate(messages):
        expect(message, (dict,), f"{name}[{i}]", "a message with role and content")
        message = without_none(message)
        if "role" not in message and "from" in message:
            message = {"role": message.pop("from"), "content": message.pop("value", None)} | message
        role, content = message.get("role"), message.get("content")
        expect(role, (str,), f"{name}[{i}]['role']", "text (keys: role and content, or from and value)")
        if content is not None or not message.get("tool_calls"):
            expect(content, (str, list), f"{name}[{i}]['content']", "text")
        for part in content if type(content) is list else ():
            kind = part.get("type", "text") if type(part) is dict else f"just {describe(part)}"
            if kind != "text" or type(part.get("text")) is not str:
                problem = f'has a part ({kind}) other than {{"type": "text", "text": ...}}; leave out such rows'
                raise RowError(f"{name}[{i}]['content'] {problem}")
        checked.append(message | {"role": ROLES.get(role.lower(), role)})
    return checked


def content_text(content: str | list[dict] | None) -> str:
    """A message's content as text: of a list its parts, a line each."""
    return "\n".join(part["text"] for part in content) if type(content) is list else content or ""


def in_form(message: dict, as_parts: bool) -> dict:
    """The message with its content as a list of parts, or as text; one without content as it is."""
    content = message.get("content")
    if type(content) is not (str if as_parts else list):
        return message
    return message | {"content": [{"type": "text", "text": content}] if as_parts else content_text(content)}


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


def number_of(value: Any, name: str, column: Column) -> float:
    expect(value, (int, float), repr(name), "a number")
    if not (abs(value) <= LARGEST and column.low <= value <= column.high):
        raise RowError(f"{name!r} is {float(value)}, expected a finite number from {column.low:g} to {column.high:g}")
    return float(value)


def numbers_of(values: Any, name: str, column: Column, count: int) -> list[float]:
    """A list with a number for each answer."""
    expect(values, (list,), repr(name), "a list of a number for each answer")
    if len(values) != count:
        raise RowError(f"{name!r} has {len(values)} numbers for {count} answers; give one for each answer")
    return [number_of(value, f"{name}[{n}]", column) for n, value in enumerate(values)]


def label_of(row: dict[str, Any], column: str) -> str | None:
    if column not in row:
        return None
    expect(row[column], (str, int), repr(column), "text or a whole number")
    text = str(row[column])
    return text if text.strip() else "(empty)"


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
