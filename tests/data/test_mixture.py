"""Several data sets: what an epoch has of each, their names, evaluation sets, text and conversations together."""

import logging

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from examples import HH, decoded, options, say, write

from rm.config.errors import InputError
from rm.data.audit import data_report
from rm.data.mixture import draw, load_data, load_evaluation_data, name_sets
from rm.data.plan import Layout

LETTERS = "a b c d e f g x y z".split()
TEXT = [{"chosen": f"{a} yes", "rejected": f"{a} no", "margin": 0.5} for a in LETTERS]  # 10 pairs
TALK = [
    {"prompt": say(a), "chosen": say("hi", first="assistant"), "rejected": say("no", first="assistant")}
    | {"id": f"t{i}", "subset": "st"[i % 2], "true_margin": i - 1.5}
    for i, a in enumerate(LETTERS[:4])
]
IDS = [{"chosen_ids": [8, 9, i], "rejected_ids": [8, i]} for i in (10, 11, 12)]


@pytest.fixture
def files(tmp_path, own_cache, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rows = {"text": TEXT, "talk": TALK, "ids": IDS}
    return [write(tmp_path / f"{name}.jsonl", rows[name]) for name in rows]


@pytest.fixture
def load(tokenizer, files, tmp_path):
    """load(weights, **options) → (mixture of text, talk and ids, the evaluation data)."""
    test = write(tmp_path / "test.jsonl", [HH])

    def run(weights=None, **changes):
        changes = {"dataset_name": files, "eval_dataset_name": test} | changes
        return load_data(tokenizer, options(dataset_weights=weights, **changes))

    return run


def sizes(data) -> list[int]:
    return [part.size for part in data.sets.values()]


# ---------------------------------------------------------------- what an epoch has


def test_draw():
    assert draw(5, 1, [42, 0]).tolist() == [0, 1, 2, 3, 4]
    assert draw(3, 2, [42, 0]).tolist() == [0, 0, 1, 1, 2, 2]
    half, one_and_half = draw(10, 0.5, [42, 0]), draw(10, 1.5, [42, 0])
    assert half.tolist() == [0, 3, 5, 6, 7]  # the same on every machine
    assert sorted([*range(10), *half]) == one_and_half.tolist()
    assert draw(10, 0.5, [43, 0]).tolist() != half.tolist() != draw(10, 0.5, [42, 1]).tolist()
    assert len(draw(10, 0.04, [42, 0])) == 0 and len(draw(10, 0.26, [42, 0])) == 3


def test_three_formats_in_one_on_disk(load, tokenizer):
    train, _ = load([1, 1.5, 2])
    assert [part.encoding.kind for part in train.sets.values()] == ["text", "conversation", "tokens"]
    assert sizes(train) == [10, 6, 6] and len(train) == 22
    assert train.set_names[[0, 9, 10, 15, 16, 21]].tolist() == ["text", "text", "talk", "talk", "ids", "ids"]
    talk = draw(4, 1.5, [42, 1]).tolist()
    table = train.comparisons
    assert table["margin"].tolist() == [0.5] * 10 + [0.0] * 12
    assert np.array_equal(table["true_margin"], [np.nan] * 10 + [i - 1.5 for i in talk] + [np.nan] * 6, equal_nan=True)
    assert train.dataset["subset"][:] == [None] * 10 + ["st"[i % 2] for i in talk] + [None] * 6
    assert train.ids([0, 21, 9]) == ["text/0", "ids/2", "text/9"]
    assert train.ids(range(10, 16)) == [f"talk/t{i}" for i in talk]
    got = decoded(train, tokenizer)
    assert got[:10] == [(f"{a} yes <eos>", f"{a} no <eos>") for a in LETTERS]
    start = [f"<|user|> {LETTERS[i]} <|end|> <|assistant|>" for i in talk]
    assert got[10:16] == [(f"{text} hi <|end|>", f"{text} no <|end|>") for text in start]
    assert got[16:] == [("a b c", "a c")] * 2 + [("a b d", "a d")] * 2 + [("a b e", "a e")] * 2
    assert train.texts(10) == {"prompt": f"user: {LETTERS[talk[0]]}", "answers": ["hi", "no"]}
    assert train.texts(21) == {"prompt": "a", "answers": ["b e", "e"]}
    hashes = train.dataset["prompt"][:]
    assert len(set(hashes[:10])) == 10 and hashes[10] == hashes[11] and len(set(hashes[16:])) == 1  # the token a
    assert train.costs(Layout("shared_prefix", 0))[[0, 16]].tolist() == [5, 4]
    assert train.costs(Layout("concatenated", 0))[[0, 16]].tolist() == [6, 6]
    blocks = [block for row in train.dataset.data.blocks for block in row]
    assert {type(block).__name__ for block in blocks} == {"MemoryMappedTable"} and len(train.dataset.cache_files) == 3


def test_one_data_set_is_as_it_is_but_for_a_weight(load, files):
    plain, test = load(dataset_name=files[1])
    assert plain.ids([1]) == ["t1"] and plain.dataset["subset"][:] == list("stst")
    report = data_report(plain, test)["train"]
    assert "weight" not in report and "sets" not in report and report["fingerprint"] == plain.fingerprint
    twice, test = load([2], dataset_name=[files[1]])
    assert twice.ids(range(8)) == [f"t{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    report = data_report(twice, test)["train"]
    assert (report["weight"], report["drawn"], report["kept"]) == (2, 8, 4)
    assert report["fingerprint"] == twice.fingerprint != plain.fingerprint


def test_an_option_may_name_a_column_of_each_set(load, tmp_path, tokenizer):
    good = {"topic": "a ", "good": "b", "bad": "c", "strength": 2.0}
    files = [
        write(tmp_path / "good.jsonl", [good]),
        write(tmp_path / "plain.jsonl", [{"chosen": "d", "rejected": "e"}]),
    ]
    test = {"good-test": files[0], "plain-test": files[1]}
    columns = {"prompt": "topic", "chosen": "good", "rejected": "bad", "margin": "strength"}
    by_set = {f"{role}_column": dict.fromkeys(("good", "good-test"), column) for role, column in columns.items()}
    mixture, evaluation = load(dataset_name=files, eval_dataset_name=test, **by_set)
    expected = [("a b <eos>", "a c <eos>"), ("d <eos>", "e <eos>")]
    assert decoded(mixture, tokenizer) == decoded(evaluation, tokenizer) == expected
    assert mixture.comparisons["margin"].tolist() == [2, 0]
    with pytest.raises(InputError, match="^chosen_column: there is no data set 'god'; there are good, plain, test$"):
        load(dataset_name=files, chosen_column={"god": "good"})


def test_the_fingerprint_covers_the_mixture(load, files, tmp_path):
    first = load([1, 1.5, 2])[0].fingerprint
    moved = [write(tmp_path / f"moved-{i}.jsonl", rows) for i, rows in enumerate((TEXT, TALK, IDS))]
    assert load([1, 1.5, 2], dataset_name=moved)[0].fingerprint == first  # the files may be elsewhere
    others = [load([1, 2, 1.5]), load([1, 1, 1]), load([1, 1.5, 2], dataset_name=files[::-1])]
    others += [load([1, 1.5, 2], seed=seed) for seed in (1, 3)]
    assert len({first, *(train.fingerprint for train, _ in others)}) == 6
    assert load(None)[0].fingerprint == others[1][0].fingerprint
    write(tmp_path / "text.jsonl", TEXT[1:])
    assert load([1, 1.5, 2])[0].fingerprint != first


def test_wrong_weights_and_rows_name_their_file(load, tmp_path):
    with pytest.raises(InputError, match=r"ids.jsonl: dataset_weights=0.1 draws none of 3 pairs$"):
        load([1, 1, 0.1])
    write(tmp_path / "talk.jsonl", [*TALK, TALK[0] | {"rejected": None}])
    with pytest.raises(InputError, match=r"talk.jsonl, row 5: 'rejected' is missing"):
        load()


def test_samples_are_of_each_data_set_and_a_configuration_may_be_of_each(load):
    train, _ = load([1, 1, 2], max_train_samples=2, dataset_config=["default", None, None])
    assert list(train.sets) == ["text-default", "talk", "ids"] and sizes(train) == [2, 2, 4]


# ---------------------------------------------------------------- evaluation sets


def test_the_held_out_part_of_each_comes_before_the_weights(load, tokenizer, files):
    held_out = {"dataset_name": files[:2], "eval_dataset_name": None, "eval_fraction": 0.3}
    train, test = load([2, 0.5], **held_out)
    assert list(test.sets) == ["text", "talk"] and sizes(test) == [3, 1]
    assert sizes(train) == [14, 2] and [part.audit["kept"] for part in train.sets.values()] == [7, 3]
    assert [part.audit["in_train"] for part in test.sets.values()] == [0, 0]
    assert not set(test.dataset["prompt"][:]) & set(train.dataset["prompt"][:])
    alone = load_evaluation_data(tokenizer, options(**held_out), False)
    assert alone.fingerprint == test.fingerprint


def test_the_test_split_of_each(tokenizer, files, tmp_path):
    for name in ("one", "two"):
        splits = DatasetDict(train=Dataset.from_list(TEXT[:6]), test=Dataset.from_list(TEXT[6:]))
        splits.save_to_disk(tmp_path / name)
    train, test = load_data(tokenizer, options(dataset_name=["one", "two"], dataset_weights=[0.5, 2]))
    assert list(test.sets) == ["one", "two"] and sizes(test) == [4, 4] and sizes(train) == [3, 12]


def test_in_train_of_each_set_is_counted_against_what_is_trained_on(load, tmp_path, caplog):
    sets = {"seen": write(tmp_path / "1.jsonl", TEXT[:3]), "half": write(tmp_path / "2.jsonl", TEXT)}
    sets["new"] = write(tmp_path / "3.jsonl", [HH])
    caplog.set_level(logging.WARNING)
    _, test = load([2, 1, 1], eval_dataset_name=sets, max_train_samples=5)
    assert [part.audit["in_train"] for part in test.sets.values()] == [3, 5, 0] and test.audit["in_train"] == 8
    assert "1.jsonl: 3 of the 3 test pairs" in caplog.text and "3.jsonl" not in caplog.text
    _, few = load([0.4, 1, 1], eval_dataset_name=sets)
    assert few.sets["half"].audit["in_train"] == 4  # of the ten only these are drawn


def test_the_names_of_evaluation_sets_are_part_of_their_fingerprint(load, files):
    named = [load(eval_dataset_name=dict(zip(names, files, strict=False)))[1] for names in ("ab", "ab", "ba")]
    assert named[0].fingerprint == named[1].fingerprint != named[2].fingerprint


def test_the_first_prompts_of_each_set(load, files):
    _, test = load(eval_dataset_name={"a": files[0], "b": files[1]})
    assert test.first_of_each(2).tolist() == [0, 1, 10, 11]
    assert test.first_of_each(6).tolist() == [*range(6), 10, 11, 12, 13]
    assert test.first_of_each(-1).tolist() == list(range(14)) and len(test.first_of_each(0)) == 0


PROMPTED = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
AS_TEXT, AS_TALK = ("a b <eos>", "a c <eos>"), tuple(f"<|user|> a <|end|> <|assistant|> {end} <|end|>" for end in "bc")


@pytest.mark.parametrize(("option", "train_on", "want"), [
    (None, "talk", AS_TALK), (None, "text", AS_TEXT), (False, "talk", AS_TEXT), (True, "prompted", AS_TALK),
])  # fmt: skip
def test_text_is_evaluated_as_what_is_trained_on(load, tokenizer, tmp_path, caplog, option, train_on, want):
    caplog.set_level(logging.INFO)
    name = write(tmp_path / "prompted.jsonl", PROMPTED)
    changes = {"dataset_name": str(tmp_path / f"{train_on}.jsonl"), "eval_dataset_name": name}
    _, test = load(text_as_conversation=option, **changes)
    assert decoded(test, tokenizer) == [want]
    assert ("text_as_conversation=false keeps it text" in caplog.text) == (option is None and want is AS_TALK)
    alone = load_evaluation_data(tokenizer, options(text_as_conversation=option, **changes), train_on == "talk")
    assert decoded(alone, tokenizer) == decoded(test, tokenizer)


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
    ("option", "given", "message"),
    [
        ("eval_dataset_name", ["a/x.jsonl", "toy", "a/x.jsonl"], "a/x.jsonl is given twice; give it once"),
        ("dataset_name", ["a", "a"], r"a is given twice; give it once \(dataset_weights can repeat its rows\)$"),
        ("eval_dataset_name", {"a/b": "toy", "c": "toy"}, "'a/b' is not a name for a set; use letters, digits and . _"),
        ("eval_dataset_name", {"": "toy", "c": "toy"}, "'' is not a name for a set"),
    ],
)
def test_wrong_names(option, given, message):
    with pytest.raises(InputError, match=f"^{option}: {message}"):
        name_sets(option, given)
