"""Every count of the audit, its table and report, and the fingerprint."""

import io
import json

import pytest
from examples import IDS, options, preference_data, write
from rich.console import Console

from rm.config.errors import InputError
from rm.data.audit import audit_table, data_report, fingerprint
from rm.data.dataset import arrays_of
from rm.data.mixture import load_data


def table(*data) -> list[list[str]]:
    """The cells of the table, without the meanings."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(audit_table(*data))
    lines = console.export_text().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")[:-1]] for line in lines if "│" in line]


def test_every_count(tokenizer, own_cache, tmp_path, caplog):
    train = [
        ("a b c", "a b d"),
        ("a b c", "a b d"),  # duplicate
        ("a b d", "a b c"),  # contradicts both
        ("x y", "x y"),  # identical
        ("x  y", "x y"),  # identical as tokens
        ("x", " \n"),  # empty
        ("a b c d e f", "a"),  # over_length
        ("x", "y"),
    ]
    test = [("y", "x"), ("a", "b"), ("a b c", "a b d"), ("x", "x")]
    names = [
        write(tmp_path / f"{name}.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows])
        for name, rows in (("train", train), ("test", test))
    ]
    config = options(dataset_name=names[0], eval_dataset_name=names[1], max_length=4)
    both = load_data(tokenizer, config)
    assert both[0].audit == {
        "total": 8, "empty": 1, "identical": 2, "over_length": 1, "tied": 0, "split": 0, "kept": 4, "truncated": 0,
        "truncated_answer": 0, "ends_with_user": 0,
        "duplicate": 1, "contradictory": 3, "mean_tokens": 3.5, "max_tokens": 4, "mean_shared_prefix": 1.5,
    }  # fmt: skip
    assert both[0].dataset["row"][:] == [[0], [1], [2], [7]] and both[0].texts(3)["answers"] == ["x", "y"]
    assert (both[1].audit["in_train"], both[1].audit["identical"], both[1].audit["kept"]) == (2, 1, 3)
    assert "test.jsonl: 2 of the 3 test pairs are in the train set too" in caplog.text
    assert [data.audit for data in load_data(tokenizer, config)] == [data.audit for data in both]  # from the cache

    report = json.loads(json.dumps(data_report(*both)))
    about = {"source": names[0], "format": "text_implicit_prompt", "fingerprint": both[0].fingerprint}
    about |= {"layout": "pair", "columns": {"chosen": "chosen", "rejected": "rejected"}}
    assert report["train"] == both[0].audit | about
    rows = table(*both)
    assert ["identical", "2", "1"] in rows and ["in_train", "", "2"] in rows and ["over_length", "1", "0"] in rows
    assert not any("truncated" in row for row in rows)


def test_audit_of_several_sets(tokenizer, own_cache, tmp_path):
    text = [{"chosen": f"{a} yes", "rejected": f"{a} no", "margin": 0.5} for a in "abcdefgxyz"]
    more = [{"chosen": "d no", "rejected": "d yes"}, {"chosen": "a", "rejected": "a"}]
    rows = {"text": text, "more": [*text[:2], *(row | {"margin": 0} for row in more)]}
    rows["ids"] = [{"chosen_ids": [8, 9, i], "rejected_ids": [8, i]} for i in (10, 11, 12)]
    files = [write(tmp_path / f"{name}.jsonl", rows[name]) for name in rows]
    config = options(dataset_name=files, dataset_weights=[1, 1.5, 2], eval_dataset_name=files[:2])
    train, test = load_data(tokenizer, config)
    report = json.loads(json.dumps(data_report(train, test)))["train"]
    together = {"total": 17, "identical": 1, "kept": 16, "drawn": 10 + 5 + 6, "duplicate": 2, "contradictory": 2}
    assert {name: report[name] for name in together} == together
    assert report["max_tokens"] == 3 and report["mean_tokens"] == pytest.approx((13 * 3 + 3 * 2.5) / 16, abs=0.01)
    assert [(part["weight"], part["drawn"]) for part in report["sets"].values()] == [(1, 10), (1.5, 5), (2, 6)]
    assert report["sets"]["more"]["source"] == files[1] and report["sets"]["more"]["duplicate"] == 0
    assert report["fingerprint"] == train.fingerprint
    assert (report["source"], report["format"]) == (", ".join(files), "text_implicit_prompt, tokenized")
    cells = table(train, test)
    assert cells[0] == "count train/text train/more train/ids train test/text test/more test".split()
    assert ["weight", "1", "1.5", "2", *[""] * 4] in cells and ["drawn", "10", "5", "6", "21", *[""] * 3] in cells
    assert ["in_train", *[""] * 4, "10", "3", "13"] in cells
    one = load_data(tokenizer, options(dataset_name=files[0], eval_dataset_name=files[:2]))
    assert table(*one)[0] == ["count", "train", "test/text", "test/more", "test"]


def test_no_pair_left(data_of):
    rows = [{"chosen": "a", "rejected": "a"}, {"chosen": "a b c", "rejected": "d"}]
    problem = r"rows.jsonl: no pair is left of 2 \(1 over_length, 1 identical\); raise max_length or fix the data$"
    with pytest.raises(InputError, match=problem):
        data_of(rows, max_length=2)


def test_fingerprint_is_of_the_kept_pairs_and_the_same_everywhere(data_of):
    known = "cc2190b7957352af9f247c7783f834b76ecf925104c758e050d87f10bc125956"
    other = IDS | {"rejected_ids": [8, 11]}
    assert data_of([IDS, other]).fingerprint == known
    assert data_of([IDS, IDS | {"rejected_ids": [8, 9]}, other]).fingerprint == known  # one is dropped
    group, pairs = [[[8], [9], [10]]], [[[8], [9]], [[9], [10]]]
    made = [fingerprint(arrays_of(preference_data(prompts, comparisons).dataset)) for prompts, comparisons in (
        (group, [[(0, 1), (1, 2)]]), (group, [[(0, 1)]]), (pairs, None))]  # fmt: skip
    assert len(set(made)) == 3
    assert len({data_of(rows).fingerprint for rows in ([IDS, other], [other, IDS], [IDS, IDS], [IDS])}) == 4
