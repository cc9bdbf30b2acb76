"""Examples as texts: for the tokenizer, with the chat template, and for people, split into prompt and answers."""

import json
import os
from typing import Any

from rm.data.formats import Example, RowError, without_none
from rm.data.load import one_line

ADDED_CHARACTERS = 1_000_000  # by which a rendered text may be longer than 10 times its messages


def render(examples: list[Example], tokenizer: Any) -> list[list[str] | RowError]:
    """The N texts that are tokenized of each example (kind "text" or "conversation"), prompt included."""
    texts = [[(e.prompt or "") + answer for answer in e.answers] if e.kind == "text" else [] for e in examples]
    owners = [i for i, example in enumerate(examples) if example.kind == "conversation" for _ in example.answers]
    conversations = [(e.prompt or []) + answer for e in examples if e.kind == "conversation" for answer in e.answers]
    rendered = _apply_template(conversations, [examples[i].variables for i in owners], tokenizer)
    for i, text, messages in zip(owners, rendered, conversations, strict=True):
        is_long = isinstance(text, str) and len(text) > ADDED_CHARACTERS
        if is_long and len(text) > ADDED_CHARACTERS + 10 * len(str(messages)):
            text = RowError(f"the chat template makes {len(text):,} characters of {len(str(messages)):,}")
        if isinstance(text, RowError):
            texts[i] = text
        elif isinstance(texts[i], list):
            texts[i].append(text)
    return texts


def _apply_template(conversations: list, variables: list[dict], tokenizer: Any) -> list[str | RowError]:
    if conversations and all(kwargs == variables[0] for kwargs in variables):  # where it fails, rows are found below
        try:
            return tokenizer.apply_chat_template(conversations, tokenize=False, **variables[0])
        except Exception:
            pass
    texts: list[str | RowError] = []
    for conversation, kwargs in zip(conversations, variables, strict=True):
        try:
            texts.append(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
        except Exception as error:  # Jinja's errors, and any that a template causes in Python
            texts.append(RowError(f"the chat template rejects the messages: {one_line(error)}"))
    return texts


def is_blank(answer: Any) -> bool:
    """Whether an answer (text, or messages by their last one) has no content."""
    if isinstance(answer, str):
        return not answer.strip()
    content = answer[-1].get("content") or ""
    return not (content.strip() if isinstance(content, str) else content) and not answer[-1].get("tool_calls")


# ---------------------------------------------------------------- for people


def split_prompt(example: Example) -> tuple[Any, list]:
    """(prompt, answers) of a text or a conversation, also where the answers contain the prompt: where they begin alike.

    The start shared by texts ends after the last turn marker of hh-rlhf in it, or else at white space. Of conversations
    equal leading messages are the prompt; each answer keeps its last message.
    """
    if example.kind == "text" and example.prompt is None:
        shared, marker = os.path.commonprefix(example.answers), "\n\nAssistant:"
        cut = next((i + 1 for i in reversed(range(len(shared))) if shared[i].isspace()), 0)
        cut = shared.rindex(marker) + len(marker) if marker in shared else cut
        return shared[:cut], [answer[cut:] for answer in example.answers]
    if example.kind == "conversation" and example.prompt is None:
        first = example.answers[0]
        limit = min(map(len, example.answers)) - 1
        cut = next((i for i in range(limit) if any(a[i] != first[i] for a in example.answers)), limit)
        return first[:cut], [answer[cut:] for answer in example.answers]
    return example.prompt or "", example.answers


def readable(example: Example) -> tuple[str, list[str]]:
    """Prompt and answers as texts for people; a single message is its content, several are a transcript."""
    prompt, answers = split_prompt(example)
    if example.kind == "text":
        return prompt, answers
    return _transcript(prompt), [_content(a[0]) if len(a) == 1 else _transcript(a) for a in answers]


def _content(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):  # the parts of a multi-modal message
        content = "\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    calls = [json.dumps(call, ensure_ascii=False) for call in without_none(message.get("tool_calls") or [])]
    return "\n".join([content, *calls]) if content else "\n".join(calls)


def _transcript(messages: list[dict]) -> str:
    return "\n".join(f"{message['role']}: {_content(message)}" for message in messages)
