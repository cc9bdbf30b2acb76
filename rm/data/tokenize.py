"""Examples to texts to token ids, for training, evaluation and scoring: chat template, sequences, trees, truncation."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from rm.data.example import Encoding, Example, RowError, content_text, in_form
from rm.data.load import one_line


@dataclass(frozen=True)
class Tree:
    """N token sequences with a common prefix: sequence n is `prefix + answers[n]`."""

    prefix: np.ndarray
    answers: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.answers))

    def sequences(self) -> list[np.ndarray]:
        return [np.concatenate([self.prefix, answer]) for answer in self.answers]


def make_tree(sequences: Sequence[np.ndarray]) -> Tree:
    """The tree of N sequences: their common prefix once; each answer has at least one token."""
    if not sequences:
        return Tree(np.zeros(0, np.int32), [])
    cut = shared_prefix_length(*sequences)
    return Tree(sequences[0][:cut], [ids[cut:] for ids in sequences])


def encode_examples(
    examples: Sequence[Example | RowError], tokenizer: Any, encoding: Encoding
) -> list[list[np.ndarray] | RowError]:
    """The N token sequences (int32) of each example, or what is wrong with it. No limit of length is applied.

    Text is prompt + answer as one string with the tokenizer's special tokens, then EOS (`add_eos`); none of them twice.
    A conversation is rendered as a whole by the chat template, which writes its own special tokens; text that the
    template has already rendered gets the same tokens. Token ids are taken as they are.
    """
    good = [example for example in examples if isinstance(example, Example)]
    try:
        encoded = _encode(good, tokenizer, encoding)
    except RowError as error:  # of one of them: the tokenizer does not say which
        one_by_one = ([example] for example in good)
        encoded = [error] if len(good) == 1 else [encode_examples(e, tokenizer, encoding)[0] for e in one_by_one]
    rest = iter(encoded)
    return [next(rest) if isinstance(example, Example) else example for example in examples]


def _encode(examples: list[Example], tokenizer: Any, encoding: Encoding) -> list[list[np.ndarray]]:
    found = [example.answers for example in examples]
    texts = {i: render(example, tokenizer) for i, example in enumerate(examples) if example.kind != "tokens"}
    for is_rendered in (False, True):
        places = [i for i, (_, rendered) in texts.items() if rendered == is_rendered]
        every = [text for i in places for text in texts[i][0]]
        ids = iter(_token_ids(every, tokenizer, not is_rendered, encoding.add_eos and not is_rendered) if every else [])
        for i in places:
            found[i] = [next(ids) for _ in found[i]]
    return found


def _token_ids(texts: list[str], tokenizer: Any, add_special_tokens: bool, add_eos: bool) -> list[np.ndarray]:
    """The token ids of every text, then EOS unless they end with it; an empty text stays empty. Raises `RowError`."""
    if add_eos and tokenizer.eos_token_id is None:
        raise RowError("the tokenizer has no EOS token to append to text; set add_eos to false")
    try:
        added = tokenizer("")["input_ids"]  # also resets padding and truncation, which an earlier call may have set
        if hasattr(tokenizer, "backend_tokenizer"):  # without the offsets, which take a third of the time
            encode = tokenizer.backend_tokenizer.encode_batch_fast
            found = [encoding.ids for encoding in encode(texts, add_special_tokens=add_special_tokens)]
        else:
            found = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # half of a surrogate pair, for example
        raise RowError(f"the tokenizer cannot read the text: {one_line(error)}") from None
    end = [tokenizer.eos_token_id]
    if add_special_tokens and added:  # not twice, where a text has them already
        found = [ids[1:] if ids[:2] == [added[0]] * 2 else ids for ids in found]
        found = [ids[:-1] if ids[-2:] == [added[-1]] * 2 else ids for ids in found]
    return [np.array(ids + end if add_eos and ids and ids[-1:] != end else ids, np.int32) for ids in found]


def render(example: Example, tokenizer: Any) -> tuple[list[str], bool]:
    """(the N texts that are tokenized of an example of kind "text" or "conversation", prompt included; whether the
    chat template has written them, with the special tokens).

    Text that begins as the template does gets BOS if the template writes it, and the end of the template once.

    Raises:
        RowError: the tokenizer has no chat template, or it rejects the messages.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or "\0"
    writes_bos, starts, end, reads_text, reads_parts = _read_template(tokenizer, str(tokenizer.chat_template))
    if example.kind == "text":
        texts = [(example.prompt or "") + answer for answer in example.answers]
        if not all(text.removeprefix(bos).lstrip().startswith(starts) for text in texts):
            return [text.rstrip() if text.rstrip().endswith(eos) else text for text in texts], False
        texts, space = [text.removeprefix(bos).rstrip() for text in texts], end[len(end.rstrip()) :]
        ends = [space if text.endswith(end.strip()) else end for text in texts]
        return [bos * writes_bos + text + end for text, end in zip(texts, ends, strict=True)], True
    if not tokenizer.chat_template:
        fix = "set chat_template_path, or give the data as text"
        raise RowError(f"conversations need a chat template, the tokenizer has none; {fix}")
    conversations = [(example.prompt or []) + answer for answer in example.answers]
    if not reads_parts or not reads_text:
        conversations = [[in_form(message, reads_parts) for message in messages] for messages in conversations]
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, **example.variables), True
    except Exception as error:  # Jinja's errors, and any that a template causes in Python
        raise RowError(f"the chat template rejects the messages: {one_line(error)}") from None


def is_rendered(prompt: str, tokenizer: Any) -> bool:
    """Whether a prompt of text has special tokens already: it begins with BOS, or as the chat template does."""
    starts = _read_template(tokenizer, str(tokenizer.chat_template))[1]
    return prompt.startswith(tokenizer.bos_token or "\0") or prompt.lstrip().startswith(starts)


@lru_cache(maxsize=8)
def _read_template(tokenizer: Any, template: str) -> tuple[bool, tuple[str, ...], str, bool, bool]:
    """Of the `template`: whether it writes BOS; the first line behind it, without and with a system message;
    what is behind the last message; whether it reads contents that are text, and contents that are lists of parts."""
    mark, other, bos = "mark-7261", "other-7261", tokenizer.bos_token or ""

    def rendered(content: Any) -> list[str]:
        texts = []
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            messages = [{"role": role, "content": content} for role in roles]
            with contextlib.suppress(Exception):  # it rejects a role or a list, or cannot be used
                texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        return [text for text in texts if mark in text]

    texts, lists = rendered(mark), rendered([{"type": "text", "text": mark, "other": other}])
    lists = [text for text in lists if other not in text]  # a list that is printed is not read
    plain = (texts or lists or [""])[0]
    begins = [text.removeprefix(bos).partition(mark)[0].strip() for text in texts or lists]
    starts = filter(None, [begin.partition("\n")[0] for begin in begins])  # further lines may hold a date
    return plain.startswith(bos), tuple(starts), plain.rpartition(mark)[2], bool(texts), bool(lists)


def is_blank(answer: Any) -> bool:
    """Whether an answer (text, or messages by their last one) has no content."""
    if isinstance(answer, str):
        return not answer.strip()
    return not content_text(answer[-1].get("content")).strip() and not answer[-1].get("tool_calls")


def shared_prefix_length(*sequences: np.ndarray) -> int:
    """Number of equal leading tokens, such that each sequence keeps at least one token of its own."""
    limit = max(min(map(len, sequences)) - 1, 0)
    table = np.stack([ids[:limit] for ids in sequences])
    differ = (table != table[0]).any(axis=0)
    return int(differ.argmax()) if differ.any() else limit


def truncate_left(sequences: Sequence[np.ndarray], max_length: int, bos: int | None) -> list[np.ndarray]:
    """All sequences of a prompt at most `max_length` tokens long, cut at the start, so that the answers stay.

    The same number of tokens of the shared prefix is removed from all, enough for the longest: the rest of the prompt
    is the same for all. Where the prefix is used up, a sequence that is still too long keeps its last tokens. A BOS
    token that all start with stays in front.
    """
    keep = int(bos is not None and max_length > 1 and all(ids[0] == bos for ids in sequences))
    spare = max(shared_prefix_length(*sequences) - keep, 0)
    start = keep + min(spare, max(map(len, sequences)) - max_length)
    return [np.concatenate([ids[:keep], ids[start:][keep - max_length :]]) for ids in sequences]


@dataclass
class Usable:
    """What is left of an example, and what was dropped.

    answers: the kept answers, as indices into the example's; sequences: their tokens, prompt included.
    comparisons: (chosen, rejected) as indices into the kept answers; kept: the kept comparisons, as indices into the
    example's. dropped: comparisons by reason. noted: 1 for each of `rm.data.audit.NOTED` that holds; a part of an
    answer is what the answers do not share.
    """

    sequences: list[np.ndarray]
    answers: list[int]
    comparisons: list[tuple[int, int]]
    kept: list[int]
    dropped: dict[str, int]
    noted: dict[str, int] = field(default_factory=dict)


def usable_part(example: Example, sequences: list[np.ndarray], encoding: Encoding, bos: int | None) -> Usable:
    """Drop empty, over-length and repeated answers with their comparisons; or truncate (`overlength`).

    A comparison is dropped as "empty" (a blank answer, or one without tokens), "identical" (both answers have the same
    tokens) or "over_length". Answers with the same tokens are one answer.
    """
    limit = encoding.max_length or math.inf
    is_empty = [not len(ids) for ids in sequences]
    if example.kind != "tokens":
        is_empty = [is_blank(answer) or empty for answer, empty in zip(example.answers, is_empty, strict=True)]
    is_long = [len(ids) > limit for ids in sequences]
    is_talk = example.kind == "conversation"
    noted = {"ends_with_user": int(is_talk and any(m[-1]["role"] == "user" for m in example.answers))}
    if encoding.overlength == "truncate_left" and any(is_long):
        present = [n for n in range(len(sequences)) if not is_empty[n]]
        given = [sequences[n] for n in present]
        cut = truncate_left(given, int(limit), bos)
        lost = max(len(before) - len(after) for before, after in zip(given, cut, strict=True))
        spare = shared_prefix_length(*given) - int(cut[0][0] == bos)  # BOS is kept
        noted["truncated_answer" if lost > spare else "truncated"] = 1
        for n, ids in zip(present, cut, strict=True):
            sequences[n] = ids
        is_long = [False] * len(sequences)
    first: dict[bytes, int] = {}
    same = [first.setdefault(ids.tobytes(), n) for n, ids in enumerate(sequences)]  # the first with these tokens
    dropped, kept = {"empty": 0, "identical": 0, "over_length": 0}, []
    for c, (chosen, rejected) in enumerate(example.comparisons):
        if is_empty[chosen] or is_empty[rejected]:
            dropped["empty"] += 1
        elif same[chosen] == same[rejected]:
            dropped["identical"] += 1
        elif is_long[chosen] or is_long[rejected]:
            dropped["over_length"] += 1
        else:
            kept.append(c)
    if not kept:
        return Usable([], [], [], [], dropped)
    answers = [n for n in range(len(sequences)) if same[n] == n and not is_empty[n] and not is_long[n]]
    place = {n: i for i, n in enumerate(answers)}
    compared = [example.comparisons[c] for c in kept]
    pairs = [(place[same[chosen]], place[same[rejected]]) for chosen, rejected in compared]
    return Usable([sequences[n] for n in answers], answers, pairs, kept, dropped, noted)
