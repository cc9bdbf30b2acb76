"""Raw rows to the texts that are tokenized: check every value, render conversations with the chat template.

It runs in the workers of a `datasets` map, so a wrong row raises `RowError`, which survives the way back.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rm.data.load import one_line

SIDES = ("chosen", "rejected")
FROM_TEXT = "conversation_from_text"  # the format of text_explicit_prompt that is made a conversation
RENDER_SECONDS = 20  # for the texts of one side of one piece (`rm.data.tokenize.PIECE`); a real template takes 0.1
RENDER_BYTES = 4 << 30  # which a template may add to the process
ADDED_CHARACTERS = 1_000_000  # by which a text may be longer than 10 times its messages


class OutOfTime(BaseException):
    """The template runs too long. No `Exception`, so that nothing on the way catches it."""


class RowError(Exception):
    """A wrong row: its number in the data set that is mapped, and what is wrong with it."""

    def __init__(self, row: int, problem: str):
        super().__init__(row, problem)  # both as args, or unpickling fails and the main process waits for ever
        self.row, self.problem = row, problem


@dataclass(frozen=True)
class Recipe:
    """All that decides, besides the row and the tokenizer, what a row's tokens are: the cache key is made of it."""

    format: str
    columns: dict[str, str]  # what it is -> the column that holds it
    numbers: tuple[str, ...]  # numeric columns
    add_eos: bool
    max_length: int | None
    overlength: str
    chat_template_kwargs: dict[str, Any]
    vocab_size: int
    share_prefix: bool  # `can_share_prefix(tokenizer)`

    @property
    def read(self) -> set[str]:
        """The columns that rendering looks at."""
        return {*self.columns.values(), "tools", "chat_template_kwargs"}


# ---------------------------------------------------------------- checked columns


def column_values(batch, column: str) -> list:
    values = batch[column]
    return values.to_pylist() if isinstance(values, pa.ChunkedArray) else values


def describe(value: Any) -> str:
    """What a person would call the type of a JSON value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {type(None): "missing (null)", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"a {type(value).__name__}")


def expect(values: list, kinds: tuple[type, ...], column: str, rows: list[int], expected: str) -> list:
    """`values`; raises `RowError` for the first that is not of one of the types."""
    for row, value in zip(rows, values, strict=True):
        if type(value) not in kinds:
            raise RowError(row, f"{column!r} is {describe(value)}, expected {expected}")
    return values


def numbers(batch, column: str, rows: list[int]) -> np.ndarray:
    values = np.array(expect(column_values(batch, column), (int, float), column, rows, "a number"), dtype=np.float64)
    if not (good := np.abs(values) <= np.finfo(np.float32).max).all():
        bad = int(good.argmin())
        raise RowError(rows[bad], f"{column!r} is {values[bad]}, expected a finite number")
    return values


def labels(batch, column: str, rows: list[int]) -> list[str]:
    values = expect(column_values(batch, column), (str, int), column, rows, "text or a whole number")
    return [str(value) for value in values]


# ---------------------------------------------------------------- rows to texts


def render(batch, rows: list[int], tokenizer, recipe: Recipe) -> tuple[list[list[str]], list[bool]]:
    """The texts of both sides, prompt included, and for each pair whether an answer is blank. Raises `RowError`."""
    if recipe.format.startswith("text"):
        return _texts(batch, rows, recipe)
    return _rendered(batch, rows, tokenizer, recipe)


def _texts(batch, rows: list[int], recipe: Recipe) -> tuple[list[list[str]], list[bool]]:
    """The texts of both sides, prompt included, and for each pair whether an answer is blank."""
    expected = "text, as in the other rows"
    parts = {name: expect(column_values(batch, name), (str,), name, rows, expected) for name in recipe.columns}
    texts = [parts[side] for side in SIDES]
    blank = [not chosen.strip() or not rejected.strip() for chosen, rejected in zip(*texts, strict=True)]
    if "prompt" in parts:
        texts = [[prompt + answer for prompt, answer in zip(parts["prompt"], side, strict=True)] for side in texts]
    return texts, blank


def _rendered(batch, rows: list[int], tokenizer, recipe: Recipe) -> tuple[list[list[str]], list[bool]]:
    """The conversations of both sides as the chat template renders them, and whether an answer is blank."""
    parts = {name: column_values(batch, name) for name in recipe.columns}
    if recipe.format == FROM_TEXT:
        parts = {name: _messages_of(parts[name], name, rows) for name in parts}
    names = parts if recipe.format in ("conversation_explicit_prompt", FROM_TEXT) else SIDES
    for name in names:
        check_messages(parts[name], name, rows)
        parts[name] = [without_none(messages) for messages in parts[name]]
    conversations = [parts[side] for side in SIDES]
    blank = [is_blank(chosen[-1]) or is_blank(rejected[-1]) for chosen, rejected in zip(*conversations, strict=True)]
    if "prompt" in names:
        conversations = [[a + b for a, b in zip(parts["prompt"], side, strict=True)] for side in conversations]
    elif "prompt" in parts:
        _check_redundant_prompt(parts, rows)
    variables = _template_variables(batch, rows, recipe)
    return [render_conversations(side, variables, rows, tokenizer) for side in conversations], blank


def _messages_of(texts: list, name: str, rows: list[int]) -> list[list[dict]]:
    """Every text as a conversation of one message, the user's if `name` is the prompt, or else the assistant's."""
    role = "user" if name == "prompt" else "assistant"
    return [
        [{"role": role, "content": text}] for text in expect(texts, (str,), name, rows, "text, as in the other rows")
    ]


def check_messages(column: list, name: str, rows: list[int]) -> None:
    """Raise `RowError` unless every value is a list of one message or more, each with a role and a content."""
    expect(column, (list,), name, rows, "a list of messages, as in the other rows")
    for row, messages in zip(rows, column, strict=True):
        if not messages:
            raise RowError(row, f"{name!r} is an empty list, expected one message or more")
        for i, message in enumerate(messages):
            if type(message) is not dict:
                raise RowError(row, f"{name}[{i}] is {describe(message)}, expected a message with role and content")
            if type(message.get("role")) is not str:
                raise RowError(row, f"{name}[{i}]['role'] is {describe(message.get('role'))}, expected text")
            content = message.get("content")
            if type(content) not in (str, list) and (content is not None or not message.get("tool_calls")):
                raise RowError(row, f"{name}[{i}]['content'] is {describe(content)}, expected text")


def _check_redundant_prompt(parts: dict[str, list], rows: list[int]) -> None:
    """A prompt of text beside whole conversations (UltraFeedback) is ignored, but only where they do contain it."""
    expect(parts["prompt"], (str,), "prompt", rows, "text, as in the other rows")
    for row, prompt, *sides in zip(rows, parts["prompt"], parts["chosen"], parts["rejected"], strict=True):
        if not all(any(message.get("content") == prompt for message in messages[:-1]) for messages in sides):
            fix = 'give it as [{"role": "user", "content": ...}]'
            raise RowError(row, f"'prompt' is text, but not a message of 'chosen' and 'rejected'; {fix}")


def is_blank(message: dict) -> bool:
    content = message.get("content") or ""
    return not (content.strip() if isinstance(content, str) else content) and not message.get("tool_calls")


def without_none(value: Any) -> Any:
    """Without the keys that are None: `datasets` adds the keys of other rows so, and a template would print them."""
    if type(value) is dict:
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if type(value) is list else value


def _template_variables(batch, rows: list[int], recipe: Recipe) -> list[dict]:
    """For each row the keyword arguments of its rendering: its tools, the run's variables, and the row's own."""
    columns = []
    for name, kind, expected in (("tools", list, "a list"), ("chat_template_kwargs", dict, "an object")):
        values = column_values(batch, name) if name in batch else [None] * len(rows)
        with contextlib.suppress(ValueError):  # not JSON: then text is what `_expect` complains about
            values = [json.loads(value) if isinstance(value, str) else value for value in values]
        values = [kind() if value is None else without_none(value) for value in values]
        columns.append(expect(values, (kind,), name, rows, expected))
    return [{"tools": tools or None, **recipe.chat_template_kwargs, **own} for tools, own in zip(*columns, strict=True)]


def render_conversations(conversations: list, variables: list[dict], rows: list[int], tokenizer) -> list[str]:
    """The texts. A template comes with the model and may loop or grow for ever: it gets a time and a memory."""
    try:
        with memory_limit(RENDER_BYTES), time_limit(RENDER_SECONDS):  # so that no alarm comes while memory is set back
            return _render_all(conversations, variables, rows, tokenizer)
    except OutOfTime:
        fix = "give another one by chat_template_path"
        why = f"the chat template takes more than {RENDER_SECONDS} s for the {len(rows)} conversations from here; {fix}"
        raise RowError(rows[0], why) from None


def _render_all(conversations: list, variables: list[dict], rows: list[int], tokenizer) -> list[str]:
    texts = None
    if all(kwargs == variables[0] for kwargs in variables):  # all in one call
        with contextlib.suppress(Exception):  # it comes again below, and there the row is known
            texts = tokenizer.apply_chat_template(conversations, tokenize=False, **variables[0])
    if texts is None:
        texts = []
        for row, conversation, kwargs in zip(rows, conversations, variables, strict=True):
            try:
                texts.append(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
            except MemoryError:
                raise RowError(row, f"the chat template needs more than {RENDER_BYTES >> 20} MiB of memory") from None
            except Exception as error:  # what Jinja raises, and what a template can make Python raise
                raise RowError(row, f"the chat template refuses the messages: {one_line(error)}") from error
    for row, text, *given in zip(rows, texts, conversations, variables, strict=True):
        if len(text) > ADDED_CHARACTERS and len(text) > ADDED_CHARACTERS + 10 * len(str(given)):
            raise RowError(row, f"the chat template makes {len(text):,} characters of {len(str(given)):,}")
    return texts


class time_limit:  # noqa: N801
    """Raise `OutOfTime` inside after `seconds`. Only the main thread can have that, and not on Windows.

    A class and not a generator: only so can the handler tell an alarm that comes during its own entry or exit, where it
    would leave the alarm on for the rest of the program.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.acts = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.acts:
            self.before = signal.signal(signal.SIGALRM, self._stop)
            # and again: Python drops what is raised in a destructor
            signal.setitimer(signal.ITIMER_REAL, self.seconds, 1)

    def __exit__(self, *_) -> None:
        if self.acts:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before or signal.SIG_DFL)  # None: a library's, which Python cannot set

    def _stop(self, _, frame) -> None:
        own = (time_limit.__enter__.__code__, time_limit.__exit__.__code__)
        if frame is None or frame.f_code not in own:
            raise OutOfTime


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Have allocations that would add more than `extra` bytes to the process raise `MemoryError`. Linux only.

    What is limited is data (writable private memory), and not address space, of which CUDA and idle threads take a lot.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + extra
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# ---------------------------------------------------------------- for a person to read


def shared_text(chosen: str, rejected: str) -> int:
    """Where the start that two texts share ends: after hh-rlhf's last turn marker in it, or else at white space."""
    shared, marker = os.path.commonprefix([chosen, rejected]), "\n\nAssistant:"
    if marker in shared:
        return shared.rindex(marker) + len(marker)
    return next((i + 1 for i in reversed(range(len(shared))) if shared[i].isspace()), 0)


def shared_messages(chosen: list[dict], rejected: list[dict]) -> int:
    """Number of equal leading messages, leaving each side its last one."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


def _content(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):  # the parts of a multi-modal message
        content = "\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    calls = [json.dumps(call, ensure_ascii=False) for call in without_none(message.get("tool_calls") or [])]
    return "\n".join([content, *calls]) if content else "\n".join(calls)


def transcript(messages: list[dict]) -> str:
    return "\n".join(f"{message['role']}: {_content(message)}" for message in messages)


def answer(messages: list[dict]) -> str:
    return _content(messages[0]) if len(messages) == 1 else transcript(messages)
