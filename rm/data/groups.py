"""Groups of answers: merge rows of the token cache that share a prompt; split prompts with too many answers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rm.data.audit import DROPPED, NOTED
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS
from rm.data.tokenize import make_tree

Row = dict[str, Any]  # a row of the token cache, see `rm.data.cache`


def same_prompt(prompts: Sequence[int]) -> list[list[int]]:
    """The rows of each prompt, in order of first appearance. `prompts`: the hash of the prompt of each row."""
    return pd.Series(range(len(prompts))).groupby(np.asarray(prompts), sort=False).agg(list).tolist()


def merge_rows(rows: Sequence[Row]) -> Row:
    """One prompt with all answers and comparisons of `rows`, whose prompts are equal.

    Answers with equal tokens become one answer, with the columns of the first one. All comparisons are kept, including
    duplicate and contradictory ones. `id` and `subset` are those of the first row.
    """
    sequences: dict[int, np.ndarray] = {}  # by hash, in the order of the answers
    place_of: dict[int, int] = {}
    merged: Row = {name: [] for name in ("chosen", "rejected", "row", "answer", "answer_row", *COMPARISON_COLUMNS)}
    merged |= {name: [] for name in ANSWER_COLUMNS}
    for row in rows:
        for n, (content, tokens) in enumerate(zip(row["answer_hash"], row["answer_ids"], strict=True)):
            if content not in sequences:
                place_of[content] = len(sequences)
                sequences[content] = np.array([*row["prefix_ids"], *tokens], np.int32)
                for name in ("answer", "answer_row", *ANSWER_COLUMNS):
                    merged[name].append(row[name][n])
        for side in ("chosen", "rejected"):
            merged[side] += [place_of[row["answer_hash"][n]] for n in row[side]]
        for name in ("row", *COMPARISON_COLUMNS):
            merged[name] += row[name]
    merged |= {name: rows[0][name] for name in ("id", "subset", "prompt")}
    merged |= {count: sum(row[count] for row in rows) for count in (*NOTED, *DROPPED)}
    return merged | with_tree(sequences)


def with_tree(sequences: dict[int, np.ndarray]) -> Row:
    """The token columns of a prompt. `sequences`: {hash: tokens of prompt and answer}."""
    tree = make_tree(list(sequences.values())) if sequences else None
    prefix, answers = (tree.prefix, tree.answers) if tree else (np.zeros(0, np.int32), [])
    lengths = {"prefix_length": len(prefix), "answer_lengths": [len(answer) for answer in answers]}
    return {"prefix_ids": prefix, "answer_ids": answers, "answer_hash": list(sequences)} | lengths


def split_row(row: Row, max_answers: int) -> Iterator[Row]:
    """Split a prompt into parts with at most `max_answers` answers each. The first part gets all audit counts.

    Comparisons between answers of different parts are dropped and counted as "split".
    """
    pairs = list(zip(row["chosen"], row["rejected"], strict=True))
    parts = partition(len(row["answer_ids"]), pairs, max_answers)
    part_of = {n: p for p, part in enumerate(parts) for n in part}
    for p, part in enumerate(parts):
        kept = [c for c, (chosen, rejected) in enumerate(pairs) if part_of[chosen] == part_of[rejected] == p]
        piece = {name: [row[name][n] for n in part] for name in ("answer", "answer_row", *ANSWER_COLUMNS)}
        piece |= {name: [row[name][c] for c in kept] for name in ("row", *COMPARISON_COLUMNS)}
        piece |= {side: [part.index(row[side][c]) for c in kept] for side in ("chosen", "rejected")}
        piece |= {name: row[name] for name in ("subset", "prompt")}
        piece |= {"id": row["id"] if len(parts) == 1 else f"{row['id']}.{p + 1}"}
        piece |= {count: row[count] if p == 0 else 0 for count in (*NOTED, *DROPPED)}
        if p == 0:
            piece["split"] += sum(part_of[chosen] != part_of[rejected] for chosen, rejected in pairs)
        sequences = {row["answer_hash"][n]: np.array([*row["prefix_ids"], *row["answer_ids"][n]]) for n in part}
        yield piece | with_tree(sequences)


def partition(num_answers: int, pairs: Sequence[tuple[int, int]], max_answers: int) -> list[list[int]]:
    """Split the answers into sorted parts of at most `max_answers`. A greedy search keeps compared `pairs` together.

    Each comparison, the most frequent first, unites the sets of its answers if they fit into a part; sets share parts.
    """
    set_of = [[n] for n in range(num_answers)]
    for (one, other), _ in Counter(tuple(sorted(pair)) for pair in pairs).most_common():
        if set_of[one] is not set_of[other] and len(set_of[one]) + len(set_of[other]) <= max_answers:
            united = set_of[one] + set_of[other]
            for n in united:
                set_of[n] = united
    parts: list[list[int]] = []
    for members in sorted({id(s): s for s in set_of}.values(), key=len, reverse=True):  # first-fit decreasing
        home = next((part for part in parts if len(part) + len(members) <= max_answers), None)
        home.extend(members) if home is not None else parts.append(list(members))
    return sorted(sorted(part) for part in parts)
