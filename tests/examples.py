"""Small data for tests: a tokenizer of a few words, files, options, and data without files."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rm.config.options import RewardConfig
from rm.data.audit import DROPPED, NOTED
from rm.data.cache import _features, _hash
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS
from rm.data.dataset import DataSet, PreferenceData
from rm.data.mixture import load_evaluation_data
from rm.data.tokenize import make_tree

SPECIAL = ["<unk>", "<pad>", "<eos>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = "a b c d e f g x y z hi no yes ok Human : Assistant city tool date plain".split()  # a is token 8
TEMPLATE = (
    "{%- if tools %}tool {{ tools[0]['name'] }} {% endif %}{%- if style %}{{ style }} {% endif %}"
    "{%- for m in messages %}{%- if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{%- if m.tool_calls and 'k' in m.tool_calls[0] %}date {% endif %}"
    "<|{{ m.role }}|> {{ m.content }}{% if m.tool_calls is defined %} tool{% endif %} <|end|>{% endfor %}"
)
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes a", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
GOOD = {"chosen": "a", "rejected": "b"}
IDS = {"chosen_ids": [8, 9], "rejected_ids": [8, 10]}


def word_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """A tokenizer of `SPECIAL` and `WORDS` with the chat template `TEMPLATE`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    extra = {"additional_special_tokens": SPECIAL[4:]}
    return PreTrainedTokenizerFast(tokenizer_object=words, **(names | extra | kwargs))


def say(*contents: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


TALK = {"chosen": say("hi", "a"), "rejected": say("hi", "b")}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(**changes) -> RewardConfig:
    return RewardConfig(**changes)


def read(name: str, tokenizer, **changes) -> PreferenceData:
    """One data set, tokenized."""
    return load_evaluation_data(tokenizer, options(**({"eval_dataset_name": name} | changes)), False)


def decoded(data: PreferenceData, tokenizer) -> list[tuple[str, ...]]:
    """The sequences of every prompt as text."""
    return [tuple(map(tokenizer.decode, tree.sequences())) for tree in data.trees(range(len(data)))]


def preference_data(prompts: list[list], comparisons: list[list[tuple[int, int]]] | None = None, **columns):
    """`PreferenceData` of prompts of N token sequences each; comparisons: all answers with the last one by default.

    columns: values of registered columns, a list for each prompt.
    """
    rows = []
    for i, sequences in enumerate(prompts):
        tree = make_tree([np.array(ids, np.int32) for ids in sequences])
        pairs = comparisons[i] if comparisons else [(n, len(sequences) - 1) for n in range(len(sequences) - 1)]
        row = {name: [column.default] * len(pairs) for name, column in COMPARISON_COLUMNS.items()}
        row |= {name: [column.default] * len(sequences) for name, column in ANSWER_COLUMNS.items()}
        row |= {"id": str(i), "subset": None, "prompt": i, "prefix_ids": tree.prefix, "answer_ids": tree.answers}
        row |= {"row": [i] * len(pairs), "answer_row": [i] * len(sequences)}
        row |= {"prefix_length": len(tree.prefix), "answer_lengths": [len(ids) for ids in tree.answers]}
        row |= {"answer": range(len(sequences)), "answer_hash": list(map(_hash, tree.sequences()))}
        row |= {"chosen": [chosen for chosen, _ in pairs], "rejected": [rejected for _, rejected in pairs]}
        rows.append(row | dict.fromkeys((*NOTED, *DROPPED), 0) | {name: values[i] for name, values in columns.items()})
    dataset = Dataset.from_list(rows, features=_features())
    part = DataSet(None, None, {}, "", len(rows))
    return PreferenceData(dataset, {"test": part}, {}, "", None)
