"""The prompt and the system message of a row: where they are, and that they are there once."""

import json
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rm.config.errors import InputError
from rm.data.example import Encoding, Example, RowError, expect, make_example, turns_of

Row = dict[str, Any]
PROMPTS = ("question", "instruction", "query", "problem", "context", "history", "input", "post", "messages")
PROMPTS += ("conversations", "conversation")  # known names of the column, besides prompt
INSTRUCTION = ("input", "history")  # columns beside an instruction


# ---------------------------------------------------------------- one row
def field_of(value: Any, path: str) -> Any:
    """The value of a column, or of a field in it ("info.post"; "answers.text": of each entry). Raises `RowError`."""
    if type(value) is list:
        return [field_of(entry, path) for entry in value]
    if type(value) is dict and path in value:
        return value[path]
    name, _, rest = path.partition(".")
    if type(value) is not dict or name not in value or not rest:
        raise RowError(f"there is no field {path!r}")
    return field_of(value[name], rest)


def value_of(row: Row, role: str, encoding: Encoding) -> Any:
    """The value of a role in a row; None where the data have no column for it."""
    return field_of(row, encoding.roles[role]) if role in encoding.roles else None


def example_of(row: Row, answers: dict[str, Any], encoding: Encoding, prompt: Any = None) -> Example:
    """The example of answers {name: value} to the prompt of the row, with its system message. Raises `RowError`."""
    if "prompt" in encoding.roles:
        prompt = value_of(row, "prompt", encoding)
        expect(prompt, (str, list, dict), repr(encoding.roles["prompt"]), "text or messages")
        prompt = [prompt] if type(prompt) is dict else prompt
    if text := value_of(row, "input", encoding):
        prompt = f"{prompt}\n{text}"
    if earlier := value_of(row, "history", encoding):  # [[question, answer], ...]
        expect(prompt, (str,), "'prompt'", "text, as there is a history")
        prompt = turns_of([text for turn in earlier for text in turn]) + turns_of([prompt])
    if encoding.repeats_prompt:
        prompt, answers = split_repeated_prompt(prompt, answers)
    example = make_example(prompt, answers, encoding.text_as_conversation)
    if system := value_of(row, "system", encoding):
        expect(system, (str,), repr(encoding.roles["system"]), "text")
        add_system(example, system)
    return example


def split_repeated_prompt(prompt: Any, answers: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(prompt, answers) of texts without the prompt in the answers, if all of them start with it."""
    ends = [end_of_prompt(prompt, text) for text in answers.values()]
    if not ends or not all(ends):
        return prompt, answers
    starts_at = dict(zip(answers, ends, strict=True))
    return next(iter(answers.values()))[: ends[0]], {name: text[starts_at[name] :] for name, text in answers.items()}


def end_of_prompt(prompt: Any, answer: Any) -> int:
    """Where the prompt ends in an answer that starts with it, perhaps with other white space; 0: it does not."""
    end = 0
    for word in prompt.split() if type(prompt) is type(answer) is str else ():
        start = answer.find(word, end)
        if start < 0 or answer[end:start].strip():
            return 0
        end = start + len(word)
    return end


def add_system(example: Example, system: str) -> None:
    """Put a system message (of a text: the text and a line break) in front, unless the example starts with one."""
    if not example.answers:
        return
    first = example.answers[0] if example.prompt is None else example.prompt
    if example.kind == "text":
        front, is_there = f"{system}\n", first.startswith(system)
    else:
        front, is_there = [{"role": "system", "content": system}], first[0]["role"] == "system"
    if example.prompt is None and not is_there:
        example.answers = [front + answer for answer in example.answers]
    elif not is_there:
        example.prompt = front + example.prompt


# ---------------------------------------------------------------- columns of a data set
def is_text(value: Any) -> bool:
    """Whether a value is text, a message, or messages."""
    message = value[0] if type(value) is list and value else value
    return type(value) is str or (type(message) is dict and bool({"role", "from"} & message.keys()))


def text_columns(row: Row, used: Collection[str] = ()) -> list[str]:
    """The columns with text or messages, also in the fields of objects, without those that are used."""
    plain = {column: value for column, value in row.items() if column not in used}
    objects = {column: value for column, value in plain.items() if type(value) is dict and not is_text(value)}
    fields = {f"{column}.{name}": inner for column, value in objects.items() for name, inner in value.items()}
    return [column for column, value in (plain | fields).items() if is_text(value) and column not in used]


def find_prompt(name: str, rows: Sequence[Row], examples: Sequence[Example], used: set[str]) -> dict[str, str]:
    """The roles of the prompt in the data set `name` whose layout names none: of its first rows, read without a prompt.

    A column with a known name is the prompt unless the answers contain it. used: other columns that are read.

    Raises:
        InputError: several columns may be the prompt; or none has a known name, and the answers begin differently.
    """
    first = {column: next((row[column] for row in rows if row[column]), None) for column in rows[0]}
    fix = "prompt_column= (empty) if the answers contain all, or there is no prompt"
    if "prompt" in first and "prompt" not in used:
        return {"prompt": "prompt"}
    pairs = [(row, e) for row, e in zip(rows, examples, strict=True) if e.answers and e.prompt is None]
    bare = [(row, e) for row, e in pairs if e.kind == "text" or e.answers[0][0]["role"] == "assistant"]
    if 2 * len(bare) <= len(rows):
        return {}
    texts, known = text_columns(first, used), {column for path in used for column in (path, path.partition(".")[0])}
    lists = [c for c, v in first.items() if type(v) is list and type(v[0]) is not list and c not in known.union(texts)]
    found = [c for c in PROMPTS if c in (*texts, *lists) and _is_mostly(_lacks(e, row[c]) for row, e in bare)]
    if "instruction" in found:
        found = [column for column in found if column not in INSTRUCTION]
    if len(found) > 1:
        fix = f"choose one with prompt_column={found[0]}, or {fix}"
        raise InputError(f"{name}: {', '.join(found)} may be the prompt; {fix}")
    if found:
        return {"prompt": found[0]}
    values = {c: [field_of(first, c)] if "." in c else [row[c] for row in rows] for c in texts}  # names are no prompts
    texts = [c for c in texts if _is_mostly(is_text(v) and (type(v) is not str or " " in v.strip()) for v in values[c])]
    texts += [c for c in lists if " " in json.dumps(first[c], separators=(",", ":"), default=str)]  # in its texts
    if texts and _is_mostly(_begins_differently(example) for _, example in bare):
        problem = f"the answers begin differently, and {', '.join(texts)} is not read"
        raise InputError(f"{name}: {problem}; set prompt_column={texts[0]}, or {fix}")
    return {}


def _is_mostly(values: Iterable[bool]) -> bool:
    values = list(values)
    return 2 * sum(values) > len(values)


def _lacks(example: Example, value: Any) -> bool:
    """Whether the answers do not contain a value that may be their prompt."""
    is_plain = type(value) is str and example.kind == "text"
    return not is_plain or " ".join(value.split()) not in " ".join(example.answers[0].split())


def _begins_differently(example: Example) -> bool:
    if example.kind == "conversation":
        return True
    return len(os.path.commonprefix(example.answers)) < 0.1 * min(map(len, example.answers))
