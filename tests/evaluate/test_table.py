"""The table of an evaluation: prompts, sets, what is missing, and the file."""

import json

import numpy as np
import pandas as pd
import pytest
from runs import ROOT, mixture

from rm.data.load import load_raw
from rm.data.mixture import load_pairs
from rm.data.rows import tokenize_pairs
from rm.evaluate.table import pair_table, read_table, sets_of, with_rewards, without_missing, worst, write_table
from rm.model.load import load_tokenizer

HH = "\n\nHuman: which tea?\n\nAssistant:"
X, Y, Z, A, B, C = "tea ", "rice ", "bread ", "close", "give", "wash"  # words that the tokenizer knows


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "configs" / "tiny_llama"))


def prompts(rows, tokenizer, path, **options) -> list[int]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tokenize_pairs(load_raw(str(path), split="train"), tokenizer, **options)
    numbers = pairs.prompts()
    assert numbers.dtype == np.int64
    return [numbers.tolist().index(number) for number in numbers]  # the first pair with the same prompt


def message(text, role="user"):
    return {"role": role, "content": text}


def test_pairs_of_one_prompt_have_one_number(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ((X, A, B), (X, B, C), (Y, A, B), (X, A, C))]
    assert prompts(rows, tokenizer, path) == [0, 0, 2, 0]
    rows = [{"chosen": HH + c, "rejected": HH + r} for c, r in ([" close.", " give."], [" wash!", " wash, my"])]
    rows += [{"chosen": "\n\nHuman: and" + HH + " tea", "rejected": "\n\nHuman: and" + HH + " rice"}]
    assert prompts(rows, tokenizer, path) == [0, 0, 2]  # though two answers begin alike
    talk = [[message(X), message(answer, "assistant")] for answer in (A, B, C)]
    other = [[message(Y), message(answer, "assistant")] for answer in (A, B)]
    rows = [{"chosen": c, "rejected": r} for c, r in (talk[:2], other, talk[1:])]
    assert prompts(rows, tokenizer, path) == [0, 1, 0]
    rows = [{"prompt": row["chosen"][:1], **{k: v[1:] for k, v in row.items()}} for row in rows]
    assert prompts(rows, tokenizer, path) == [0, 1, 0]
    rows = [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8]}, {"chosen_ids": [5, 9], "rejected_ids": [5, 4]}]
    rows += [{"chosen_ids": [5, 6, 9], "rejected_ids": [5, 6, 4]}]
    assert prompts(rows, tokenizer, path) == [0, 1, 0]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": X, "chosen": A, "rejected": A}] + [
        {"prompt": p, "chosen": A, "rejected": B} for p in (Y, Z, Y)]))  # fmt: skip
    kept = tokenize_pairs(load_raw(str(path), split="train"), tokenizer).prompts()
    assert len(kept) == 3 and kept[0] == kept[2] != kept[1]  # of the kept pairs, in their order


def test_the_columns(tokenizer, tmp_path):
    options = mixture(tmp_path)
    names = json.loads(options[-1].partition("=")[2].replace("'", '"'))
    _, pairs = load_pairs(tokenizer, dataset_name="toy", eval_dataset_name=names, only_evaluation=True)
    rewards = np.arange(60.0).reshape(30, 2)
    table = pair_table(pairs, rewards)
    assert table["set"].tolist() == ["plain"] * 12 + ["talk"] * 18
    assert table["row"].tolist() == [*range(12), *range(18)] and table["id"].tolist()[:2] == ["0", "1"]
    assert table["id"].tolist() == [name.split("/")[1] for name in pairs.ids(range(30))]
    assert table[["reward_chosen", "reward_rejected"]].to_numpy().tolist() == rewards.tolist()
    for name in ("length_chosen", "length_rejected", "prefix_length"):
        assert table[name].tolist() == list(pairs.dataset[name])
    assert table["data_margin"].tolist() == [0.25] * 12 + [0.0] * 18
    plain, talk = sets_of(table).values()
    assert "true_margin" not in plain and "subset" not in plain and "true_margin" in talk and "subset" in talk
    whole = without_missing(table)
    assert "true_margin" not in whole and "subset" in whole  # the one is needed of all pairs, the other of some
    write_table(table, tmp_path / "eval" / "step-3.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "eval" / "step-3.parquet"), table)
    assert not list((tmp_path / "eval").glob(".*"))


def test_the_worst_pairs():
    rewards = np.array([[1, 0], [0, 3], [2, 2], [0, 1], [5, 6.5]])
    table = with_rewards(pd.DataFrame({"id": list("abcde")}), rewards)
    assert worst(table, 2).tolist() == [1, 4] and worst(table, 20).tolist() == [1, 4, 3]
