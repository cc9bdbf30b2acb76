"""The evaluation table: its columns, prompts, and the file."""

import json

import numpy as np
import pandas as pd
import pytest
from runs import ROOT, mixture
from tables import table
from transformers import AutoTokenizer

from rm.config.cli import parse_config
from rm.data.mixture import load_evaluation_data
from rm.evaluate.table import TEXT_COLUMNS, evaluation_table, worst

HH = "\n\nHuman: which tea?\n\nAssistant:"
X, Y, Z, A, B, C = "tea ", "rice ", "bread ", "close", "give", "wash"  # words that the tokenizer knows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny_llama")


@pytest.fixture
def load(tokenizer):
    """load(eval_dataset_name) → evaluation data."""

    def run(name):
        options = ["dataset_name=toy", "model_name_or_path=tiny", f"eval_dataset_name={name}"]
        return load_evaluation_data(tokenizer, parse_config(options), False)

    return run


def message(text, role="user"):
    return {"role": role, "content": text}


def test_comparisons_of_one_prompt_have_one_number(load, tmp_path):
    def prompts(rows) -> list[int]:
        path = tmp_path / f"{abs(hash(str(rows)))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        numbers = evaluation_table(load(str(path)))["prompt"]
        assert numbers.dtype == np.int64
        return [numbers.tolist().index(number) for number in numbers]  # the first row with the same prompt

    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ((X, A, B), (X, B, C), (Y, A, B), (X, A, C))]
    assert prompts(rows) == [0, 0, 2, 0]
    rows = [{"chosen": HH + c, "rejected": HH + r} for c, r in ([" close.", " give."], [" wash!", " wash, my"])]
    rows += [{"chosen": "\n\nHuman: and" + HH + " tea", "rejected": "\n\nHuman: and" + HH + " rice"}]
    assert prompts(rows) == [0, 0, 2]  # though two answers begin alike
    talk = [[message(X), message(answer, "assistant")] for answer in (A, B, C)]
    other = [[message(Y), message(answer, "assistant")] for answer in (A, B)]
    rows = [{"chosen": c, "rejected": r} for c, r in (talk[:2], other, talk[1:])]
    assert prompts(rows) == [0, 1, 0]
    assert prompts([{"prompt": row["chosen"][:1], **{k: v[1:] for k, v in row.items()}} for row in rows]) == [0, 1, 0]
    rows = [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8]}, {"chosen_ids": [5, 9], "rejected_ids": [5, 4]}]
    assert prompts([*rows, {"chosen_ids": [5, 6, 9], "rejected_ids": [5, 6, 4]}]) == [0, 1, 0]
    dropped = [{"prompt": X, "chosen": A, "rejected": A}]
    assert prompts(dropped + [{"prompt": p, "chosen": A, "rejected": B} for p in (Y, Z, Y)]) == [0, 1, 0]


def test_the_columns(load, tmp_path, monkeypatch):
    data = load(json.loads(mixture(tmp_path)[-1].partition("=")[2].replace("'", '"')))
    monkeypatch.setitem(TEXT_COLUMNS, "words", lambda texts: len(texts["chosen"].split()))
    frame = evaluation_table(data)
    assert frame["set"].tolist() == ["plain"] * 12 + ["talk"] * 18
    assert frame["row"].tolist() == [*range(12), *range(18)]
    assert frame["id"].tolist() == [name.split("/")[1] for name in data.ids(range(30))]
    assert (frame[["reward_chosen", "reward_rejected"]] == 0).all(axis=None)
    for name in ("length_chosen", "length_rejected", "prefix_length"):
        assert frame[name].tolist() == data.comparisons[name].tolist()
    assert frame["margin"].tolist() == [0.25] * 12 + [0.0] * 18
    assert (frame[["share", "weight", "p_chosen"]] == 1).all(axis=None)
    assert frame[["true_margin", "subset"]].notna().all(axis=1).tolist() == [False] * 12 + [True] * 18
    assert frame["words"].tolist() == [len(data.comparison_texts(i)["chosen"].split()) for i in range(30)]
    texts = data.comparison_texts(12)
    assert (texts["chosen"], texts["rejected"]) == tuple(data.texts(12)["answers"]) and texts["prompt"]
    frame.to_parquet(tmp_path / "step-3.parquet", index=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "step-3.parquet"), frame)


def test_the_worst_comparisons():
    frame = table([[1, 0], [0, 3], [2, 2], [0, 1], [5, 6.5], [0, 9]], p_chosen=[1, 1, 1, 1, 1, 0.5])
    assert worst(frame, 2).tolist() == [1, 4] and worst(frame, 20).tolist() == [1, 4, 3]
