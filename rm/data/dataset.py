"""`PreferenceData`: the usable prompts of one or several data sets, tokenized, on disk."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from rm.config.errors import InputError
from rm.data.audit import DROPPED, NOTED, audit_counts
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS
from rm.data.example import SIDES, Encoding, Example, content_text, without_none
from rm.data.formats import read_row
from rm.data.load import Source
from rm.data.plan import Layout
from rm.data.tokenize import Tree


@dataclass(frozen=True)
class DataSet:
    """One of the data sets in `PreferenceData`: where its rows are from, and what became of them."""

    source: Source
    encoding: Encoding
    audit: dict[str, int | float]
    fingerprint: str
    size: int  # prompts in `PreferenceData.dataset`


@dataclass(frozen=True)
class PreferenceData:
    """The usable prompts of one or several data sets, set after set.

    Columns of `dataset`, one row per prompt with N answers and C comparisons: `id`, `subset` (None where the data have
    none), `prompt` (`prompt_hash`), `prefix_ids`, `answer_ids` (N lists), `prefix_length`, `answer_lengths` (tokens),
    `answer_row`, `answer` (N: row in the source, and which of its answers), `answer_hash` (N, of the whole sequences),
    `row` (C, in the source), `chosen`, `rejected` (C answer indices), and the registered columns (C or N float32).
    """

    dataset: Dataset
    sets: dict[str, DataSet]
    audit: dict[str, int | float]
    fingerprint: str  # sha256 over tokens, comparisons and registered columns; the same on every machine
    tokenizer: Any = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    # ------------------------------------------------------------ for the model

    def costs(self, layout: Layout) -> np.ndarray:
        """Tokens of every prompt in a batch of `layout`, int64 [n]."""
        counts, lengths = ragged(self.dataset, "answer_lengths")
        prefix, starts = flat(self.dataset, "prefix_length"), np.cumsum(counts) - counts
        if layout.name == "concatenated" and not layout.by_tree:  # padded to the longest answer
            return counts * (prefix + np.maximum.reduceat(lengths, starts))
        copies = 1 if layout.name == "shared_prefix" else counts
        return copies * prefix + np.add.reduceat(lengths, starts, dtype=np.int64)

    @cached_property
    def num_answers(self) -> np.ndarray:
        """N of every prompt, int64 [n]."""
        return ragged(self.dataset, "answer_lengths")[0]

    @cached_property
    def _tokens(self) -> Dataset:
        return self.dataset.with_format("arrow", columns=["prefix_ids", "answer_ids"])

    @cached_property
    def _labels(self) -> Dataset:
        return self.dataset.with_format("arrow", columns=["chosen", "rejected", *COMPARISON_COLUMNS, *ANSWER_COLUMNS])

    def trees(self, indices: Sequence[int]) -> list[Tree]:
        """The token trees of these prompts."""
        table = self._tokens[indices]
        prefixes = [ids.values.to_numpy() for ids in table["prefix_ids"]]
        answers = [[ids.values.to_numpy() for ids in row.values] for row in table["answer_ids"]]
        return [Tree(prefix, branches) for prefix, branches in zip(prefixes, answers, strict=True)]

    def labels(self, indices: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """C of each of these prompts, int64 [n]; and `chosen`, `rejected` and every registered column of all of them,
        prompt by prompt."""
        table = self._labels[indices]
        columns = {name: values_of(table[name]) for name in table.column_names}
        return columns["chosen"][0], {name: values for name, (_, values) in columns.items()}

    def check_rankings(self) -> None:
        """Raise `InputError` unless the scores of the answers decide every comparison, without further numbers."""
        frame, (counts, score) = self.comparisons, ragged(self.dataset, "score")
        first = (np.cumsum(counts) - counts)[frame["index"]]
        is_ranked = score[first + frame["chosen"]] > score[first + frame["rejected"]]
        is_plain = (frame["margin"] == 0) & (frame["weight"] == 1) & (frame["p_chosen"] == 1)
        if len(bad := np.flatnonzero(~(is_ranked & is_plain))):
            (name,) = self.ids(frame["index"].iloc[bad[:1]])
            needs = "scores or ranks that decide every comparison, and no margins, weights or ties"
            raise InputError(f"loss_type=plackett_luce: prompt {name} needs {needs}")

    # ------------------------------------------------------------ for people and for the evaluation table

    @property
    def are_several(self) -> bool:
        return len(self.sets) > 1

    @cached_property
    def set_names(self) -> np.ndarray:
        """The name of the set that each prompt is from, object [n]."""
        return np.repeat(np.array(list(self.sets), object), [part.size for part in self.sets.values()])

    def ids(self, indices: Sequence[int]) -> list[str]:
        """The ids of these prompts, "SET/ID" where there are several sets."""
        ids = self.dataset.select(indices)["id"][:]
        return [f"{self.set_names[i]}/{n}" for i, n in zip(indices, ids, strict=True)] if self.are_several else ids

    def first_of_each(self, count: int) -> np.ndarray:
        """The first `count` prompts of each set; -1: all."""
        numbers = pd.Series(self.set_names).groupby(self.set_names).cumcount()
        return np.flatnonzero((numbers < count) | (count == -1))

    def texts(self, i: int) -> dict[str, Any]:
        """Prompt `i` for people: "prompt", and "answers" without the prompt (N texts), as the data give them."""
        row, part = self.dataset[int(i)], self.sets[self.set_names[i]]
        if part.encoding.kind == "tokens":
            (tree,) = self.trees([int(i)])
            prompt, *answers = map(self.tokenizer.decode, (tree.prefix, *tree.answers))
            return {"prompt": prompt, "answers": answers}
        rows = dict.fromkeys(row["answer_row"])
        given = {n: readable(read_row(part.source.dataset[n], part.encoding)) for n in rows}
        answers = [given[n][1][number] for n, number in zip(row["answer_row"], row["answer"], strict=True)]
        return {"prompt": given[row["answer_row"][0]][0], "answers": answers}

    def comparison_texts(self, row: int) -> dict[str, str]:
        """Row `row` of `comparisons` for people: "prompt", "chosen", "rejected"."""
        index, chosen, rejected = self.comparisons.iloc[row][["index", "chosen", "rejected"]].astype(int)
        prompt, answers = self.texts(index).values()
        return {"prompt": prompt, "chosen": answers[chosen], "rejected": answers[rejected]}

    @cached_property
    def answers(self) -> pd.DataFrame:
        """One row per answer: `index` (of the prompt), `answer` (in the prompt), the answer columns, `length` (tokens
        of the whole sequence), `row` (in the source), `number` (among the answers of that row)."""
        counts, lengths = ragged(self.dataset, "answer_lengths")
        index, first = np.repeat(np.arange(len(self)), counts), np.repeat(np.cumsum(counts) - counts, counts)
        frame = {"index": index, "answer": np.arange(len(index)) - first}
        frame |= {name: ragged(self.dataset, name)[1].astype(np.float64) for name in ANSWER_COLUMNS}
        frame |= {"length": lengths + flat(self.dataset, "prefix_length")[index]}
        columns = {"row": "answer_row", "number": "answer"}
        return pd.DataFrame(frame | {name: ragged(self.dataset, column)[1] for name, column in columns.items()})

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """One row per comparison: `index` (of the prompt), `row` (in the source), `chosen`, `rejected` (answers of the
        prompt), the comparison columns, `share` (1/C), `length_chosen`, `length_rejected`, `prefix_length` (tokens)."""
        counts = ragged(self.dataset, "row")[0]
        index = np.repeat(np.arange(len(self)), counts)
        names = ("row", "chosen", "rejected", *COMPARISON_COLUMNS)
        frame = pd.DataFrame({"index": index} | {name: ragged(self.dataset, name)[1] for name in names})
        num_answers, lengths = ragged(self.dataset, "answer_lengths")
        first, prefix = (np.cumsum(num_answers) - num_answers)[index], flat(self.dataset, "prefix_length")[index]
        for side in SIDES:
            frame[f"length_{side}"] = lengths[first + frame[side]] + prefix
        frame = frame.assign(prefix_length=prefix, share=(1 / counts)[index])
        return frame.astype(dict.fromkeys(COMPARISON_COLUMNS, np.float64))


def concatenate(parts: dict[str, PreferenceData]) -> PreferenceData:
    """The prompts of several sets, set after set."""
    first = next(iter(parts.values()))
    if len(parts) == 1:
        return first
    dataset = datasets.concatenate_datasets([part.dataset for part in parts.values()])
    dropped = {reason: sum(part.audit[reason] for part in parts.values()) for reason in DROPPED}
    digest = json.dumps([[name, part.fingerprint] for name, part in parts.items()])
    sets = {name: part.sets[name] for name, part in parts.items()}
    audit = audit_counts(arrays_of(dataset), dropped)
    return PreferenceData(dataset, sets, audit, hashlib.sha256(digest.encode()).hexdigest(), first.tokenizer)


# ---------------------------------------------------------------- where the prompt ends
def prompt_hash(example: Example, prefix_ids: np.ndarray) -> int:
    """A signed 64-bit hash, equal for equal rendered prompts, the same on every machine.

    Without a prompt of their own the prompt is where the answers begin alike (of token ids `prefix_ids`), so
    that one prompt may get several numbers. Answers without a common start are a prompt of their own.
    """
    if example.kind == "tokens":
        content = prefix_ids.astype("<i4").tobytes()
    else:
        prompt, answers = split_prompt(example)
        prompt = prompt or [[], *answers]
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        if variables := {key: value for key, value in example.variables.items() if value}:
            text += json.dumps(variables, sort_keys=True, default=str)
        content = text.encode("utf-8", "backslashreplace")
    return int(np.uint64(xxhash.xxh64_intdigest(content)).view(np.int64))


def split_prompt(example: Example) -> tuple[Any, list]:
    """(prompt, answers) of a text or a conversation, also where the answers contain the prompt: where they begin alike.

    The start shared by texts ends after the last turn marker of hh-rlhf in it, or else at white space. Of conversations
    equal leading messages are the prompt; each answer keeps its last message.
    """
    if example.prompt is not None or not example.answers:
        return example.prompt or "", example.answers
    first = example.answers[0]
    if example.kind == "text":
        shared, marker = os.path.commonprefix(example.answers), "\n\nAssistant:"
        cut = next((i + 1 for i in reversed(range(len(shared))) if shared[i].isspace()), 0)
        cut = shared.rindex(marker) + len(marker) if marker in shared else cut
    else:
        limit = min(map(len, example.answers)) - 1
        cut = next((i for i in range(limit) if any(a[i] != first[i] for a in example.answers)), limit)
    return first[:cut], [answer[cut:] for answer in example.answers]


def readable(example: Example) -> tuple[str, list[str]]:
    """Prompt and answers as texts for people; a single message is its content, several are a transcript."""
    prompt, answers = split_prompt(example)
    if example.kind == "conversation":
        prompt = _transcript(prompt)
        answers = [_content(messages[0]) if len(messages) == 1 else _transcript(messages) for messages in answers]
    return prompt, answers


def _content(message: dict) -> str:
    content = content_text(message.get("content"))
    calls = [json.dumps(call, ensure_ascii=False) for call in without_none(message.get("tool_calls") or [])]
    return "\n".join(filter(None, [content, *calls]))


def _transcript(messages: list[dict]) -> str:
    return "\n".join(f"{message['role']}: {_content(message)}" for message in messages)


# ---------------------------------------------------------------- columns as arrays
def flat(dataset: Dataset, name: str) -> np.ndarray:
    """A whole column of numbers, [n]."""
    column = dataset.data.column(name)
    return (column if dataset._indices is None else column.take(dataset._indices.column(0))).to_numpy()


def ragged(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A whole column of lists of numbers: the length of every list, int64 [n], and all values one after the other."""
    column = dataset.data.column(name)
    return values_of(column if dataset._indices is None else column.take(dataset._indices.column(0)))


def values_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The length of every list in an Arrow column, int64 [n], and all values one after the other."""
    return pc.list_value_length(column).to_numpy().astype(np.int64), pc.list_flatten(column).to_numpy()


def arrays_of(dataset: Dataset) -> dict[str, np.ndarray]:
    """What the audit and the fingerprint are made of: flat arrays over rows, answers and comparisons."""
    counts, hashes = ragged(dataset, "answer_hash")
    num_comparisons, chosen = ragged(dataset, "chosen")
    first = np.repeat(np.cumsum(counts) - counts, num_comparisons)
    prefix, rejected = flat(dataset, "prefix_length"), ragged(dataset, "rejected")[1]
    lengths = ragged(dataset, "answer_lengths")[1] + np.repeat(prefix, counts)
    columns = {name: ragged(dataset, name)[1] for name in (*COMPARISON_COLUMNS, *ANSWER_COLUMNS)}
    columns |= {name: flat(dataset, name) for name in NOTED}
    return columns | {
        "hash_chosen": hashes[first + chosen],
        "hash_rejected": hashes[first + rejected],
        "num_answers": counts,
        "num_comparisons": num_comparisons,
        "prefix_length": prefix,
        "length": lengths,
        "pair_length": lengths[first + chosen] + lengths[first + rejected] - np.repeat(prefix, num_comparisons),
        "prompt": flat(dataset, "prompt"),
    }
