"""The head's value at every token of an answer: how the reward moves along it. For causal models.

Shape suffixes: N sequences, R rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rm.collate import COLUMNS, Batch, collate
from rm.data.mixture import PairSets
from rm.data.plan import PairLengths, plan_micro_batches
from rm.forward import score_batch
from rm.model.attention import block_size
from rm.model.reward_model import RewardModel

MAX_TRACES = 64  # pairs of one call that get a trace, so that showing every pair costs no second evaluation
LONGEST_PIECE = 48  # tokens in a piece, where a text is full of U+FFFD itself, of three bytes: 16 whole ones

Trace = list[list[Any]]  # [[piece of text, reward after it], ...]


def trace_pairs(
    model: nn.Module,
    accelerator: Accelerator,
    pairs: PairSets,
    rows: Sequence[int],
    *,
    layout: str,
    micro_batch_tokens: int,
    pad_token_id: int,
) -> list[tuple[Trace, Trace] | None]:
    """The traces (chosen, rejected) of the pairs `rows`: [[piece of text, reward after it], ...] along each answer.

    The first piece is empty, and its reward that of the prompt's end (there is none before a sequence's first token).
    The last reward is the answer's own; the others are what the head says there, which no loss has seen. The texts of
    the pieces make up the answer with its special tokens; characters that several tokens share are one piece. It begins
    where the answer does, or where the two sequences part if the tokens do not hold the answer's text as it was given
    (one that was cut to length, or that has several messages).

    Collective: every process must call it. Only the main process gets the list, with None for the rows after the first
    `MAX_TRACES`; an encoder has no such values, and the list is empty.
    """
    core: RewardModel = getattr(model, "module", model)
    if not core.is_causal or len(rows) == 0:
        return []
    traced = list(rows)[:MAX_TRACES]
    dataset = pairs.dataset.select(traced)
    options = {"layout": layout, "micro_batch_tokens": micro_batch_tokens, "pad_token_id": pad_token_id}
    values = token_rewards(model, accelerator, dataset, **options)  # collective
    if not accelerator.is_main_process:
        return []
    (tokenizer, *_) = (part.tokenizer for part in pairs.sets.values())
    traces: list[tuple[Trace, Trace] | None] = []
    for i, row in enumerate(traced):
        ids, texts = [dataset[i][f"input_ids_{side}"] for side in ("chosen", "rejected")], pairs.texts(row)
        start = answer_start(tokenizer, ids, (texts["chosen"], texts["rejected"]), dataset[i]["prefix_length"])
        traces.append(tuple(make_trace(tokenizer, *side, start) for side in zip(ids, values[i], strict=True)))
    return traces + [None] * (len(rows) - len(traced))


@torch.no_grad()
def token_rewards(
    model: nn.Module,
    accelerator: Accelerator,
    dataset,
    *,
    layout: str,
    micro_batch_tokens: int,
    pad_token_id: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The head's value at every token of both sequences of every pair, float32 [length] each. Collective: every rank.

    As in `rm.evaluate.evaluator.evaluate_rewards`, and by the same forward pass: every token is named as the end of a sequence.
    The value at a token is the reward of the sequence if it ended there.
    """
    counts = np.array([[row[f"length_{side}"] for side in ("chosen", "rejected")] for row in dataset])
    costs = PairLengths(*counts.T, np.asarray(dataset["prefix_length"][:])).cost(layout)
    plans = plan_micro_batches(
        np.arange(len(costs)), costs, layout, micro_batch_tokens, accelerator.num_processes, block_size(model)
    )
    ends = np.cumsum(counts.flatten())
    table = torch.zeros(int(ends[-1]), device=accelerator.device)
    dataset = dataset.with_format("numpy", columns=COLUMNS)
    was_training = model.training
    model.eval()
    for micro_batch in plans[accelerator.process_index]:
        batch = collate(dataset, micro_batch, layout, pad_token_id).to(accelerator.device)
        places = [tokens_of(batch, n) for n in range(len(batch.end_row_N))]
        end_row = [row.expand(len(index)) for row, index in zip(batch.end_row_N, places, strict=True)]
        values = score_batch(model, replace(batch, end_row_N=torch.cat(end_row), end_index_N=torch.cat(places)))
        values = values.view(len(values), -1)[:, 0]  # of a head with several outputs the first one is the reward
        if not micro_batch.is_filler:
            sequences = [2 * i + side for i in batch.index_B.tolist() for side in (0, 1)]
            for n, part in zip(sequences, values.split([len(index) for index in places]), strict=True):
                table[ends[n] - len(part) : ends[n]] = part
    model.train(was_training)
    table = accelerator.reduce(table, "sum").cpu().numpy()  # collective; each value is on one process, 0 on the others
    sequences = np.split(table, ends[:-1])
    return list(zip(sequences[::2], sequences[1::2], strict=True))


def tokens_of(batch: Batch, n: int) -> Tensor:
    """Where the tokens of sequence `n` stand in their row, from its first to its last, int64 [length]."""
    row, end = batch.end_row_N[n], batch.end_index_N[n]
    if not batch.is_packed:
        return torch.arange(int(end) + 1, device=end.device)
    tree_L, branch_L = batch.tree_RL[row], batch.branch_RL[row]
    is_own_L = (tree_L == tree_L[end]) & ((branch_L == 0) | (branch_L == branch_L[end]))
    return is_own_L.nonzero()[:, 0]


def answer_start(tokenizer: Any, ids: Sequence[Sequence[int]], answers: Sequence[str], prefix_length: int) -> int:
    """The token at which both answers begin: the last one, of those that the sequences `ids` share, from which on each
    sequence holds its answer's text (white space and case aside); else where they part, at a whole character."""

    def squashed(text: str) -> str:
        return "".join(text.split()).casefold()

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def is_whole(start: int) -> bool:
        return all(squashed(text) in squashed(decode(side[start:])) for text, side in zip(answers, ids, strict=True))

    low, high = 0, prefix_length  # by bisection: a whole answer stays whole if it begins earlier
    if is_whole(high):
        return high
    if not is_whole(low):
        while high and decode(ids[0][max(high - 4, 0) : high]).endswith("\ufffd"):  # inside a character of 4 bytes
            high -= 1
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_whole(middle) else (low, middle)
    return low


def make_trace(tokenizer: Any, ids: Sequence[int], values: np.ndarray, start: int) -> Trace:
    """[[piece, reward after it], ...] of the tokens from `start` on, the rewards to six decimals."""
    first = [["", round(float(values[start - 1]), 6)]] if start else []
    return first + [[piece, round(float(values[i]), 6)] for piece, i in pieces(tokenizer, ids, start)]


def pieces(tokenizer: Any, ids: Sequence[int], start: int) -> Iterator[tuple[str, int]]:
    """(piece of text, its last token) from token `start` on; the pieces make up the text, special tokens included.

    A token adds to the text what decoding with it shows more than without it, beside the piece before, since tokenizers
    may drop a first space. Tokens that end inside a character (bytes, which decode to U+FFFD) go to the next piece.
    """

    def decode(begin: int, end: int) -> str:
        return tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)

    before, done = max(start - 1, 0), start
    for i in range(start, len(ids)):
        known, text = decode(before, done), decode(before, i + 1)
        is_open = len(text) <= len(known) or text.endswith("\ufffd")
        if is_open and i + 1 < len(ids) and i + 1 - done < LONGEST_PIECE:
            continue
        yield text[len(known) :], i
        before, done = done, i + 1
