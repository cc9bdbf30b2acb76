"""Token rewards as text: the pieces of an answer, each with the reward of the sequence that ends after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rm.data.tokenize import Tree

TokenRewards = list[list[Any]]  # [[piece of text, reward after it], ...]


def token_rewards(tokenizer: Any, tree: Tree, values: np.ndarray) -> list[TokenRewards]:
    """[[piece of text, reward after it], ...] of every answer of a prompt, from where the answers part.

    The first piece is empty, and its reward that of the common prefix. The last reward is the answer's own; the others
    are the head's values there, which no loss has trained. The pieces together are the rest of the sequence with its
    special tokens; characters that several tokens share are one piece.

    Args:
        values: the reward of every beginning of each answer's sequence (`score_prompts` with `every_token`).
    """
    found, start = [], len(tree.prefix)
    while start and _decode(tokenizer, tree.prefix[max(start - 4, 0) : start]).endswith("\ufffd"):  # inside a character
        start -= 1
    sequences = tree.sequences()
    for ids, rewards in zip(sequences, np.split(values, np.cumsum(list(map(len, sequences)))[:-1]), strict=True):
        first = [["", round(float(rewards[start - 1]), 6)]] if start else []
        found.append(first + [[piece, round(float(rewards[i]), 6)] for piece, i in _pieces(tokenizer, ids, start)])
    return found


def _pieces(tokenizer: Any, ids: Sequence[int], start: int) -> Iterator[tuple[str, int]]:
    """(piece of text, its last token) from token `start` on.

    A token adds to the text the difference between decoding with it and without it, after the piece before it, since
    tokenizers may drop a first space. Tokens that end inside a character (they decode to U+FFFD) go to the next piece.
    """
    before, done = max(start - 1, 0), start
    for i in range(start, len(ids)):
        known, text = _decode(tokenizer, ids[before:done]), _decode(tokenizer, ids[before : i + 1])
        if (len(text) > len(known) and not text.endswith("\ufffd")) or i + 1 == len(ids):
            yield text[len(known) :], i
            before, done = done, i + 1


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
