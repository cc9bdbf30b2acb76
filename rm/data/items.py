"""What can be scored, texts, conversations, a prompt and its answers, pairs or token ids, to trees of token ids.

An item is a dict. The keys that it has tell what it is; the first of these that fits counts, other keys are ignored:

    input_ids_chosen, input_ids_rejected    token ids of a pair, as in training (also by the other names it takes)
    input_ids                               token ids of one sequence
    chosen, rejected, perhaps prompt        a pair, in any format of training
    prompt, responses                       a prompt and N answers
    prompt, response                        a prompt and one answer
    messages                                one conversation
    text                                    one text

What is text is scored as text and what is messages by the chat template, as in training; a prompt and answers of text
are messages too with `text_as_conversation`. To a prompt of messages an answer may be a message, a list of messages, or
the assistant's text; for messages also tools and chat_template_kwargs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm.collate import Tree
from rm.data.formats import TOKEN_COLUMNS
from rm.data.load import one_line
from rm.data.render import SIDES, RowError, check_messages, describe, is_blank, render_conversations, without_none
from rm.data.tokenize import PIECE, shared_prefix_length, truncate_left, with_end

MASKS = {  # keys of token ids -> those of their attention masks
    **{tuple(map(ids.format, SIDES)): tuple(map(mask.format, SIDES)) for ids, mask in TOKEN_COLUMNS},
    ("input_ids",): ("attention_mask",),
}
FORMS = [*MASKS, SIDES, ("prompt", "responses"), ("prompt", "response"), ("messages",), ("text",)]


class ItemError(ValueError):
    """An item that cannot be scored; one line says why."""


def form_of(item: Any) -> str:
    """What an item is: "single", "answers" (N to a prompt) or "pair". Raises `ItemError`."""
    keys = _keys(item)
    return "answers" if "responses" in keys else "pair" if len(keys) == 2 and "prompt" not in keys else "single"


def family_of(item: Any, text_as_conversation: bool = False) -> str:
    """What an item is scored as: "text", "conversation" or "tokenized". Raises `ItemError`."""
    keys = _keys(item)
    if keys in MASKS:
        return "tokenized"
    values = [item.get("prompt") or "", *(item[key] for key in keys if key != "responses")]
    if "responses" in keys and type(item["responses"]) is list:
        values += item["responses"]
    is_made_one = text_as_conversation and item.get("prompt") is not None
    return "text" if all(type(value) is str for value in values) and not is_made_one else "conversation"


def encode_items(
    items: Sequence[Any],
    tokenizer: Any,
    *,
    add_eos: bool = True,
    text_as_conversation: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
    overlength: str = "drop",
    max_positions: int | None = None,
) -> list[Tree | ItemError]:
    """Each item's sequences as a tree, the start that they share once; or what is wrong with the item.

    Args:
        add_eos: append the EOS token to text.
        text_as_conversation: make a prompt of text the user's message, and answers of text to it the assistant's.
        chat_template_kwargs: variables of the chat template.
        max_length, max_positions: tokens of a sequence that are wanted, and that the model can take. None: no limit.
        overlength: what happens to longer ones, an error ("drop"), or `rm.tokenize.truncate_left` ("truncate_left").
    """
    read = [_caught(_read, item, tokenizer, chat_template_kwargs or {}, text_as_conversation) for item in items]
    ids = iter(_token_ids([part for parts in read if type(parts) is list for part in parts], tokenizer, add_eos))
    limits = dict(max_length=max_length, overlength=overlength, max_positions=max_positions)
    sequences = [{part.name: next(ids) for part in parts} if type(parts) is list else parts for parts in read]
    return [_caught(_tree, found, tokenizer, **limits) if type(found) is dict else found for found in sequences]


def _caught(function: Callable, *arguments, **named) -> Any:
    """What the function returns, or what it finds wrong with an item."""
    try:
        return function(*arguments, **named)
    except (ItemError, RowError) as error:
        return ItemError(error.problem if isinstance(error, RowError) else str(error))


@dataclass(frozen=True)
class _Part:
    """One sequence of an item: a whole text, a whole conversation with its template's variables, or token ids."""

    name: str
    content: Any
    variables: dict[str, Any] | None = None  # of a conversation


# ---------------------------------------------------------------- an item to whole sequences


def _keys(item: Any) -> tuple[str, ...]:
    if type(item) is not dict:
        raise ItemError(f"is {describe(item)}, expected an object with keys")
    for keys in FORMS:
        if all(item.get(key) is not None for key in keys):
            return keys
    if {"response", "responses"} & set(item) and item.get("prompt") is None:
        raise ItemError("there is a response, but no 'prompt'; give one, or the whole as text or messages")
    null = [key for key, value in item.items() if value is None and any(key in keys for keys in FORMS)]
    lacks = f"{null[0]!r} is missing (null)" if null else f"nothing to score (keys: {', '.join(item) or 'none'})"
    raise ItemError(f"{lacks[:200]}; give text, messages, prompt and response or responses, or chosen and rejected")


def _read(item: Any, tokenizer: Any, chat_template_kwargs: dict[str, Any], text_as_conversation: bool) -> list[_Part]:
    keys = _keys(item)
    if keys in MASKS:
        return [
            _Part(key, _stored_ids(item, key, mask, tokenizer)) for key, mask in zip(keys, MASKS[keys], strict=True)
        ]
    prompt, answers = item.get("prompt"), {key: item[key] for key in keys if key != "prompt"}
    if "responses" in keys:
        if type(item["responses"]) is not list or not item["responses"]:
            what = "an empty list" if item["responses"] == [] else describe(item["responses"])
            raise ItemError(f"'responses' is {what}, expected a list of one answer or more")
        answers = {f"responses[{i}]": answer for i, answer in enumerate(item["responses"])}
    if keys in (("text",), ("messages",)):
        prompt, (key,) = None, keys
        if type(item[key]) is not {"text": str, "messages": list}[key]:
            expected = "text" if key == "text" else "a list of messages"
            raise ItemError(f"{key!r} is {describe(item[key])}, expected {expected}")
    if type(prompt) not in (str, list, type(None)):
        raise ItemError(f"'prompt' is {describe(prompt)}, expected text or a list of messages")
    for name, answer in answers.items():
        if type(answer) not in (str, list, dict):
            raise ItemError(f"{name!r} is {describe(answer)}, expected text or messages")
    if text_as_conversation and type(prompt) is str and all(type(answer) is str for answer in answers.values()):
        prompt = [{"role": "user", "content": prompt}]
    if type(prompt) is list or not all(type(answer) is str for answer in answers.values()):
        variables = _variables(item, chat_template_kwargs)
        return [_Part(name, messages, variables) for name, messages in _conversations(prompt, answers).items()]
    for name, answer in answers.items():
        if not answer.strip():
            raise ItemError(f"{name!r} is blank")
    return [_Part(name, (prompt or "") + answer) for name, answer in answers.items()]


def _conversations(prompt: str | list | None, answers: dict[str, Any]) -> dict[str, list[dict]]:
    """Whole conversations. A prompt of text beside messages must be one of theirs, as in training."""
    is_text = type(prompt) is str
    if type(prompt) is list:
        check_messages([prompt], "prompt", [0])
    conversations = {}
    for name, answer in answers.items():
        if type(answer) is str and type(prompt) is not list:
            raise ItemError(f"{name!r} is text, another answer is messages; they must be alike")
        messages = [{"role": "assistant", "content": answer}] if type(answer) is str else answer
        messages = [messages] if type(messages) is dict else messages
        check_messages([messages], name, [0])
        if is_blank(messages[-1]):
            raise ItemError(f"{name!r} is blank")
        if is_text and not any(message.get("content") == prompt for message in messages[:-1]):
            fix = 'give it as [{"role": "user", "content": ...}]'
            raise ItemError(f"'prompt' is text, but not a message of {name!r}; {fix}")
        conversations[name] = without_none((prompt if type(prompt) is list else []) + messages)
    return conversations


def _variables(item: dict, chat_template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an item's rendering: its tools, the run's variables, and its own."""
    for name, kind, wanted in (("tools", list, "a list"), ("chat_template_kwargs", dict, "an object")):
        if type(item.get(name)) not in (kind, type(None)):
            raise ItemError(f"{name!r} is {describe(item[name])}, expected {wanted}")
    own = without_none(item.get("chat_template_kwargs") or {})
    return {"tools": without_none(item.get("tools")) or None, **chat_template_kwargs, **own}


def _stored_ids(item: dict, name: str, mask_name: str, tokenizer: Any) -> np.ndarray:
    """Token ids without the positions that the attention mask calls padding."""
    ids, mask = item[name], item.get(mask_name)
    if type(ids) is not list or not ids:
        raise ItemError(f"{name!r} is {'an empty list' if ids == [] else describe(ids)}, expected a list of integers")
    if bad := next((f"{name}[{i}] is {value!r}"[:100] for i, value in enumerate(ids) if type(value) is not int), None):
        raise ItemError(f"{bad}, expected a whole number")
    if mask is not None and (type(mask) is not list or len(mask) != len(ids) or not set(map(str, mask)) <= {"0", "1"}):
        raise ItemError(f"{name!r} needs an attention mask of as many 0s and 1s as it has tokens")
    last = max(tokenizer.get_vocab().values())
    if bad := [i for i in ids if not 0 <= i <= last]:
        raise ItemError(f"{name!r} has the token id {bad[0]}, the tokenizer 0 to {last}")
    return np.array([i for i, kept in zip(ids, mask or [1] * len(ids), strict=True) if kept], np.int64)


# ---------------------------------------------------------------- sequences to token ids


def _token_ids(parts: list[_Part], tokenizer: Any, add_eos: bool) -> list[np.ndarray | ItemError]:
    """The token ids of every part, or what is wrong with it."""
    found = [part.content for part in parts]
    talks = [i for i, part in enumerate(parts) if part.variables is not None]
    texts = [i for i, part in enumerate(parts) if type(part.content) is str]
    for start in range(0, len(talks), PIECE):
        piece = talks[start : start + PIECE]
        for i, text in zip(piece, _all_or_each(_render, [parts[i] for i in piece], tokenizer), strict=True):
            found[i] = text
    end = [tokenizer.eos_token_id] if add_eos else []
    for places, is_text in ((talks, False), (texts, True)):  # a chat template writes its own special tokens
        places = [i for i in places if type(found[i]) is str]
        ids = _all_or_each(_tokenize, [found[i] for i in places], tokenizer, is_text, end if is_text else [])
        for i, values in zip(places, ids, strict=True):
            found[i] = values
    return found


def _all_or_each(function: Callable, values: list, *arguments) -> list:
    """The function's results for all values in one call; if that fails, for each alone, or what is wrong with it."""
    try:
        return function(values, *arguments) if values else []
    except (ItemError, RowError):
        alone = (_caught(function, [value], *arguments) for value in values)
        return [result if isinstance(result, ItemError) else result[0] for result in alone]


def _render(parts: list[_Part], tokenizer: Any) -> list[str]:
    if not tokenizer.chat_template:
        raise ItemError("messages need a chat template, and the model's tokenizer has none; give text")
    conversations, variables = [part.content for part in parts], [part.variables for part in parts]
    return render_conversations(conversations, variables, list(range(len(parts))), tokenizer)


def _tokenize(texts: list[str], tokenizer: Any, add_special_tokens: bool, end: list[int | None]) -> list[np.ndarray]:
    if end == [None]:
        raise ItemError("the tokenizer has no EOS token to append to text; set add_eos to false")
    quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    try:
        ids = tokenizer(texts, add_special_tokens=add_special_tokens, **quiet)["input_ids"]
    except Exception as error:
        half = re.search("[\ud800-\udfff]", "".join(texts))
        why = f"it holds half of a surrogate pair, {ascii(half[0])}" if half else one_line(error)
        raise ItemError(f"the tokenizer cannot read the text: {why}") from error
    return [with_end(values, end) for values in ids]


def _tree(
    sequences: dict[str, np.ndarray | ItemError],
    tokenizer: Any,
    *,
    max_length: int | None,
    overlength: str,
    max_positions: int | None,
) -> Tree:
    limit = min(max_length or math.inf, max_positions or math.inf)
    for name, ids in sequences.items():
        if isinstance(ids, ItemError):
            raise ids if len(sequences) == 1 else ItemError(f"{name}: {ids}")
        if not len(ids):
            raise ItemError(f"{name!r} has no tokens")
        if len(ids) > limit and overlength == "drop":
            whose = "max_length allows" if limit == max_length else "the model has positions for"
            raise ItemError(f"{name!r} has {len(ids)} tokens, {whose} {limit}; overlength=truncate_left cuts the start")
    values = list(sequences.values())
    if max(map(len, values)) > limit:
        values = truncate_left(values, int(limit), tokenizer.bos_token_id)
    cut = shared_prefix_length(*values)
    return Tree(values[0][:cut], [ids[cut:] for ids in values])
