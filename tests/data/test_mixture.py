"""rm/mixture.py: what an epoch of several data sets holds, their names, evaluation sets with metrics of their own."""

import io
import json
import logging

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console
from test_data import HH, decoded, say, word_tokenizer, write

from rm.config.errors import InputError
from rm.data.audit import audit_table, data_report
from rm.data.mixture import draw, load_pairs, name_sets
from rm.evaluate.evaluator import pairs_metrics
from rm.evaluate.metrics import evaluation_metrics
from rm.evaluate.table import pair_table

LETTERS = "a b c d e f g x y z".split()
TEXT = [{"chosen": f"{a} yes", "rejected": f"{a} no", "margin": 0.5} for a in LETTERS]  # 10 pairs
TALK = [
    {"prompt": say(a), "chosen": say("hi", first="assistant"), "rejected": say("no", first="assistant")}
    | {"id": f"t{i}", "subset": "st"[i % 2], "true_margin": i - 1.5}
    for i, a in enumerate(LETTERS[:4])
]
IDS = [{"chosen_ids": [8, 9, i], "rejected_ids": [8, i]} for i in (10, 11, 12)]
NO_LOSS = {"center_rewards_coefficient": None, "label_smoothing": 0.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def files(tmp_path) -> list[str]:
    rows = {"text": TEXT, "talk": TALK, "ids": IDS}
    return [write(tmp_path / f"{name}.jsonl", rows[name]) for name in rows]


@pytest.fixture
def load(tokenizer, files, tmp_path):
    """load(weights, **options) → (mixture of text, talk and ids, the test pairs)."""
    test = write(tmp_path / "test.jsonl", [HH])

    def run(weights=None, **options):
        options = {"dataset_name": files, "eval_dataset_name": test} | options
        return load_pairs(tokenizer, dataset_weights=weights, **options)

    return run


# ---------------------------------------------------------------- what an epoch holds


def test_draw():
    assert draw(5, 1, [42, 0]).tolist() == [0, 1, 2, 3, 4]
    assert draw(3, 2, [42, 0]).tolist() == [0, 0, 1, 1, 2, 2]
    half, one_and_half = draw(10, 0.5, [42, 0]), draw(10, 1.5, [42, 0])
    assert half.tolist() == [0, 3, 5, 6, 7]  # the same on every machine
    assert sorted([*range(10), *half]) == one_and_half.tolist()
    assert draw(10, 0.5, [43, 0]).tolist() != half.tolist() != draw(10, 0.5, [42, 1]).tolist()
    assert len(draw(10, 0.04, [42, 0])) == 0 and len(draw(10, 0.26, [42, 0])) == 3


def test_three_formats_and_their_columns_in_one(load, tokenizer):
    train, _ = load([1, 1.5, 2])
    assert [pairs.format.split("_")[0] for pairs in train.sets.values()] == ["text", "conversation", "tokenized"]
    assert {name: (rows.start, rows.stop) for name, rows in train.rows().items()} == {
        "text": (0, 10), "talk": (10, 16), "ids": (16, 22),
    }  # fmt: skip
    assert train.dataset["margin"][:] == [0.5] * 10 + [0.0] * 12
    assert not {"subset", "true_margin"} & set(train.dataset.column_names)
    assert train.ids([0, 21, 9]) == ["text/0", "ids/2", "text/9"]
    talk = draw(4, 1.5, [0, 1]).tolist()
    assert train.ids(range(10, 16)) == [f"talk/t{i}" for i in talk]
    got = decoded(train, tokenizer)
    assert got[:10] == [(f"{a} yes <eos>", f"{a} no <eos>") for a in LETTERS]
    assert got[10:16] == [decoded(train.sets["talk"], tokenizer)[i] for i in talk]
    assert got[16:] == [("a b c", "a c")] * 2 + [("a b d", "a d")] * 2 + [("a b e", "a e")] * 2
    assert train.texts(10) == {"prompt": f"user: {LETTERS[talk[0]]}", "chosen": "hi", "rejected": "no"}
    assert train.texts(21) == {"prompt": "a", "chosen": "b e", "rejected": "e"}


def test_tokens_stay_on_disk(load):
    train, _ = load([1, 1.5, 0.5])
    blocks = [block for row in train.dataset.data.blocks for block in row]
    assert {type(block).__name__ for block in blocks} == {"MemoryMappedTable"}
    assert len(train.dataset.cache_files) == 3


def test_one_data_set_is_as_it_was_but_for_a_weight(load, files, tokenizer):
    plain, test = load(dataset_name=files[1])
    (pairs,) = plain.sets.values()
    assert plain.dataset is pairs.dataset and plain.fingerprint == pairs.fingerprint and plain.audit is not None
    assert plain.ids([1]) == ["t1"] and "weight" not in plain.audit and list(data_report(plain, test)["train"])
    assert "sets" not in data_report(plain, test)["train"]
    twice, test = load([2], dataset_name=[files[1]])
    assert twice.ids(range(8)) == [f"t{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    report = data_report(twice, test)["train"]
    assert (report["weight"], report["drawn"], report["kept"]) == (2, 8, 4)
    assert report["fingerprint"] == twice.fingerprint != plain.fingerprint


def test_the_fingerprint_covers_the_mixture(load, files, tokenizer, tmp_path):
    first = load([1, 1.5, 2])[0].fingerprint
    assert load([1, 1.5, 2])[0].fingerprint == first
    others = [load([1, 2, 1.5]), load([1, 1, 1]), load(None), load([1, 1.5, 2], dataset_name=files[::-1])]
    others += [load([1, 1.5, 2], seed=seed) for seed in (1, 2, 3)]
    assert first not in {train.fingerprint for train, _ in others}
    assert load([1, 1, 1])[0].fingerprint == load(None)[0].fingerprint
    moved = [write(tmp_path / f"moved-{i}.jsonl", rows) for i, rows in enumerate((TEXT, TALK, IDS))]
    assert load([1, 1.5, 2], dataset_name=moved)[0].fingerprint == first  # it may lie elsewhere
    write(tmp_path / "text.jsonl", TEXT[1:])
    assert load([1, 1.5, 2])[0].fingerprint != first


def test_a_weight_that_draws_nothing(load):
    with pytest.raises(InputError, match=r"ids.jsonl: dataset_weights=0.1 draws none of 3 pairs"):
        load([1, 1, 0.1])


def test_a_wrong_row_is_named_by_its_file(load, files, tmp_path):
    write(tmp_path / "talk.jsonl", [*TALK, TALK[0] | {"rejected": None}])
    with pytest.raises(InputError, match=r"talk.jsonl, row 4: 'rejected' is missing"):
        load()


def test_samples_are_of_each_data_set_and_a_configuration_may_be_of_each(load, files):
    train, _ = load([1, 1, 2], max_train_samples=2, dataset_config=["default", None, None])
    assert [len(pairs.dataset) for pairs in train.sets.values()] == [2, 2, 2] and len(train.dataset) == 8
    assert list(train.sets) == ["text-default", "talk", "ids"]


# ---------------------------------------------------------------- evaluation sets


def test_the_held_out_part_of_each_comes_before_the_weights(load):
    train, test = load([2, 0.5, 1], eval_dataset_name=None, eval_fraction=0.3)
    assert list(test.sets) == ["text", "talk", "ids"]
    assert [len(pairs.dataset) for pairs in test.sets.values()] == [3, 1, 1]
    assert [len(pairs.dataset) for pairs in train.sets.values()] == [7, 3, 2] and len(train.dataset) == 14 + 2 + 2
    assert [pairs.audit["in_train"] for pairs in test.sets.values()] == [0, 0, 0]
    assert test.ids(range(5)) == [f"{name}/{pairs.dataset['id'][i]}" for name, pairs in test.sets.items()
                                  for i in range(len(pairs.dataset))]  # fmt: skip
    alone = load([2, 0.5, 1], eval_dataset_name=None, eval_fraction=0.3, only_evaluation=True)
    assert alone[0] is None and alone[1].fingerprint == test.fingerprint


def test_the_test_split_of_each(tokenizer, tmp_path):
    for name in ("one", "two"):
        splits = DatasetDict(train=Dataset.from_list(TEXT[:6]), test=Dataset.from_list(TEXT[6:]))
        splits.save_to_disk(tmp_path / name)
    train, test = load_pairs(tokenizer, dataset_name=["one", "two"], dataset_weights=[0.5, 2])
    assert list(test.sets) == ["one", "two"] and len(test.dataset) == 8 and len(train.dataset) == 15


def test_in_train_of_each_set_is_counted_against_what_is_trained_on(load, tmp_path, caplog):
    sets = {"seen": write(tmp_path / "1.jsonl", TEXT[:3]), "half": write(tmp_path / "2.jsonl", TEXT)}
    sets["new"] = write(tmp_path / "3.jsonl", [HH])
    caplog.set_level(logging.WARNING)
    train, test = load([2, 1, 1], eval_dataset_name=sets, max_train_samples=5)
    assert [pairs.audit["in_train"] for pairs in test.sets.values()] == [3, 5, 0] and test.audit["in_train"] == 8
    assert "1.jsonl: 3 of the 3 test pairs" in caplog.text and "3.jsonl" not in caplog.text
    few = load([0.4, 1, 1], eval_dataset_name=sets)[1]
    assert few.sets["half"].audit["in_train"] == 4  # of the ten only these are drawn


def test_metrics_of_each_set_and_of_all(load, files):
    _, test = load(eval_dataset_name={"a": files[0], "b": files[1]})
    rewards = np.random.default_rng(0).normal(size=(14, 2))
    metrics = pairs_metrics(pair_table(test, rewards), **NO_LOSS)
    plain = pair_table(test, rewards).drop(columns=["subset", "true_margin"])
    assert plain["data_margin"].tolist() == [0.5] * 10 + [0.0] * 4
    want = evaluation_metrics(plain)
    want |= evaluation_metrics(plain[:10], prefix="eval/a")
    talk = {"subset": list("stst"), "true_margin": [row["true_margin"] for row in TALK]}
    want |= evaluation_metrics(plain[10:].assign(**talk), prefix="eval/b")
    assert metrics == pytest.approx(want, nan_ok=True)
    assert metrics["eval/pairs"] == 14 and metrics["eval/b/s/pairs"] == 2
    assert "eval/accuracy_ceiling" not in metrics and "eval/b/accuracy_ceiling" in metrics
    assert "eval/s/accuracy" not in metrics and "eval/a/spearman_true_margin" not in metrics
    _, known = load(eval_dataset_name={"a": files[1], "b": files[1]})
    assert "eval/accuracy_ceiling" in pairs_metrics(pair_table(known, rewards[:8]), **NO_LOSS)


def test_one_set_is_evaluated_as_before(load, files):
    rewards = np.random.default_rng(0).normal(size=(4, 2))
    for name in (files[1], [files[1]], {"mine": files[1]}):
        metrics = pairs_metrics(pair_table(load(eval_dataset_name=name)[1], rewards), **NO_LOSS)
        assert "eval/s/accuracy" in metrics and not any(key.startswith(("eval/talk", "eval/mine")) for key in metrics)


def test_the_names_of_evaluation_sets_are_part_of_their_fingerprint(load, files):
    prints = [
        load(eval_dataset_name=dict(zip(names, files, strict=False)))[1].fingerprint for names in ("ab", "ab", "ba")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_first_pairs_of_each_set(load, files):
    _, test = load(eval_dataset_name={"a": files[0], "b": files[1]})
    assert test.first_of_each(2).tolist() == [0, 1, 10, 11]
    assert test.first_of_each(6).tolist() == [*range(6), 10, 11, 12, 13]
    assert test.first_of_each(-1).tolist() == list(range(14)) and len(test.first_of_each(0)) == 0
    assert [test.set_of(i) for i in (0, 9, 10, 13)] == ["a", "a", "b", "b"]


# ---------------------------------------------------------------- audit


def test_audit_of_each_and_of_all(load, files, tmp_path):
    more = [{"chosen": "d no", "rejected": "d yes"}, {"chosen": "a", "rejected": "a"}]
    write(tmp_path / "talk.jsonl", [*TEXT[:2], *(row | {"margin": 0} for row in more)])
    train, test = load([1, 1.5, 2], eval_dataset_name=files[:2])
    report = json.loads(json.dumps(data_report(train, test)))["train"]
    together = {"total": 17, "identical": 1, "kept": 16, "drawn": 10 + 5 + 6, "duplicate": 2, "contradictory": 2}
    assert {name: report[name] for name in together} == together
    assert report["max_tokens"] == 3 and report["mean_tokens"] == pytest.approx((13 * 3 + 3 * 2.5) / 16, abs=0.01)
    assert [(part["weight"], part["drawn"]) for part in report["sets"].values()] == [(1, 10), (1.5, 5), (2, 6)]
    assert report["sets"]["talk"]["source"] == files[1] and report["sets"]["talk"]["duplicate"] == 0
    assert report["fingerprint"] == train.fingerprint
    assert (report["source"], report["format"]) == (", ".join(files), "text_implicit_prompt, tokenized")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(audit_table(train, test))
    text = console.export_text()
    rows = [[cell.strip() for cell in line.strip("┃│\n").split("│")] for line in text.replace("┃", "│").splitlines()]
    assert ["count", "text", "talk", "ids", "all", "meaning"] in rows and [
        "count",
        "text",
        "talk",
        "all",
        "meaning",
    ] in rows
    assert any(row[:5] == ["weight", "1", "1.5", "2", ""] for row in rows)
    assert any(row[:5] == ["drawn", "10", "5", "6", "21"] for row in rows)
    assert any(row[:4] == ["in_train", "10", "3", "13"] for row in rows)


def test_a_table_for_each_split_if_one_has_several_sets(load):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(audit_table(*load()))
    text = console.export_text()
    assert "Data audit: train" in text and "Data audit: test" in text and text.count(" all ") == 1


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "configs", "names"),
    [
        ("Anthropic/hh-rlhf", None, ["hh-rlhf"]),
        (["Anthropic/hh-rlhf", "toy", "data/my.pairs.jsonl.gz"], None, ["hh-rlhf", "toy", "my.pairs"]),
        (["one/pairs", "two/pairs"], None, ["one-pairs", "two-pairs"]),
        (["data/one/test.jsonl", "data/two/test.jsonl", "toy"], None, ["one-test", "two-test", "toy"]),
        (["org/pairs", "org/pairs", "toy"], ["a", "b", None], ["pairs-a", "pairs-b", "toy"]),
        (["my pairs.csv", "toy"], None, ["my_pairs", "toy"]),
        ({"x": "a.jsonl", "y": "a.jsonl"}, None, ["x", "y"]),
    ],
)
def test_names(given, configs, names):
    assert list(name_sets("dataset_name", given, configs)) == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a/x.jsonl", "toy", "a/x.jsonl"], "eval_dataset_name: a/x.jsonl is given twice; give it once"),
        ({"a/b": "toy", "c": "toy"}, "eval_dataset_name: 'a/b' is no name for a set"),
        ({"": "toy", "c": "toy"}, "eval_dataset_name: '' is no name for a set"),
        ({"accuracy": "toy", "c": "toy"}, "eval_dataset_name: a set cannot be named 'accuracy', which is a metric"),
        ({"spearman_true_margin": "toy", "c": "toy"}, "which is a metric"),
        (["loss.jsonl", "toy"], "a set cannot be named 'loss', which is a metric; give another name, in a dict"),
    ],
)
def test_wrong_names(given, message):
    with pytest.raises(InputError, match=message):
        name_sets("eval_dataset_name", given)
