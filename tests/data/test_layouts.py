"""Every layout of public data: prompt, answers, comparisons, literally; mapping options; what is rejected."""

import logging
import re

import datasets
import pytest
from conftest import ROOT
from examples import GOOD, TALK, decoded, say, write

from rm.config.errors import InputError
from rm.data.formats import read_row
from rm.data.layouts import DATA_LAYOUTS


def examples(data) -> list:
    (part,) = data.sets.values()
    return [read_row(row, part.encoding) for row in part.source.dataset]


def answer(*contents: str) -> list[dict]:
    return say(*contents, first="assistant")


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def rated(*responses: tuple) -> list[dict]:
    names = ("response", "overall_score", "fine_grained_score", "custom_system_prompt")
    return [dict(zip(names, values, strict=True)) for values in responses]


TWO = [(0, 1)]
SWAPPED = [(1, 0)]
POST = {"id": "t", "subreddit": "cats", "title": "a", "post": "x y", "article": None}
RANKED = [{"answer": "b", "rank": 2.0}, {"answer": "c", "rank": 1.0}, {"answer": "d", "rank": 3.0}]
LAYOUTS = {  # name of the case: (row, layout, prompt, answers, comparisons)
    "pair": ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "pair", "a ", ["b", "c"], TWO),
    "question and system": ({"system": "z", "question": "a ", "chosen": "b", "rejected": "c"},
                            "pair", "z\na ", ["b", "c"], TWO),
    "empty system": ({"system": "", "question": "a ", "chosen": "b", "rejected": "c"}, "pair", "a ", ["b", "c"], TWO),
    "system before messages": ({"system": "z", "prompt": say("a"), "chosen": "b", "rejected": "c"}, "pair",
                               [{"role": "system", "content": "z"}, *say("a")], [answer("b"), answer("c")], TWO),
    "alpaca": ({"instruction": "a ", "input": "x ", "chosen": "b", "rejected": "c"}, "pair", "a \nx ", ["b", "c"], TWO),
    "alpaca without input": ({"instruction": "a ", "input": "", "chosen": "b", "rejected": "c"},
                             "pair", "a ", ["b", "c"], TWO),
    "alpaca with history": ({"instruction": "a", "input": "", "history": [["x", "y"]], "chosen": "b", "rejected": "c"},
                            "pair", say("x", "y", "a"), [answer("b"), answer("c")], TWO),
    "prompt with history": ({"query": "a", "history": [["x", "y"]], "response": "b", "rejected_response": "c"},
                            "swift_response", say("x", "y", "a"), [answer("b"), answer("c")], TWO),
    "one chosen and several rejected": ({"prompt": "a ", "chosen": "b", "rejected": ["c", "d"]},
                                        "pair", "a ", ["b", "c", "d"], [(0, 1), (0, 2)]),
    "sharegpt": ({"conversations": [human("a")], "chosen": {"from": "gpt", "value": "b"},
                  "rejected": {"from": "gpt", "value": "c"}}, "pair", say("a"), [answer("b"), answer("c")], TWO),
    "messages are the prompt": ({"messages": say("a"), "chosen": answer("b"), "rejected": answer("c")},
                                "pair", say("a"), [answer("b"), answer("c")], TWO),
    "one message": ({"prompt": say("a"), "chosen": answer("b")[0], "rejected": answer("c")[0]},
                    "pair", say("a"), [answer("b"), answer("c")], TWO),
    "text prompt, message answers": ({"prompt": "a", "chosen": answer("b"), "rejected": answer("c")},
                                     "pair", say("a"), [answer("b"), answer("c")], TWO),
    "prompt is a label": ({"prompt": "x", "conversation": [{"input": "hi", "output": "a"}]} | TALK,
                          "pair", None, [say("hi", "a"), say("hi", "b")], TWO),
    "messages repeat an answer": (TALK | {"messages": TALK["chosen"]},
                                  "pair", None, [say("hi", "a"), say("hi", "b")], TWO),
    "other names": ({"prompt": "a ", "chosen_response": "b", "rejected_response": "c"},
                    "pair_response", "a ", ["b", "c"], TWO),
    "stack exchange pairs": ({"question": "a ", "response_j": "b", "response_k": "c"},
                             "stack_pair", "a ", ["b", "c"], TWO),
    "swift": ({"messages": say("a", "b"), "rejected_response": "c"},
              "swift", say("a"), [answer("b"), answer("c")], TWO),
    "ultrafeedback": ({"instruction": "a ", "completions": rated(("b", 2, 5.0, "z"), ("c", 8.5, 4.0, "z"))},
                      "ultrafeedback", "a ", ["b", "c"], SWAPPED),
    "generations": ({"instruction": "a ", "generations": ["b", "c"], "ratings": [1, 5]},
                    "generations", "a ", ["b", "c"], SWAPPED),
    "nectar": ({"prompt": "\n\nHuman: a\n\nAssistant: ", "answers": RANKED}, "nectar",
               "\n\nHuman: a\n\nAssistant: ", ["b", "c", "d"], [(1, 0), (0, 2), (1, 2)]),
    "stack exchange": ({"question": "a ", "answers": [{"text": "b", "pm_score": 1}, {"text": "c", "pm_score": 4}]},
                       "stack_exchange", "a ", ["b", "c"], SWAPPED),
    "nemo": ({"context": say("a"), "completions": [{"rank": 1, "completion": answer("b")},
                                                   {"rank": 0, "completion": answer("c")}]},
             "nemo", say("a"), [answer("b"), answer("c")], SWAPPED),
    "ranked list": ({"instruction": "a ", "input": "", "output": ["b", "c", "d"]}, "ranked_output",
                    "a ", ["b", "c", "d"], [(0, 1), (0, 2), (1, 2)]),
    "helpsteer2": ({"prompt": "a ", "response_1": "b", "response_2": "c", "preference_strength": 3},
                   "helpsteer2", "a ", ["b", "c"], SWAPPED),
    "helpsteer3": ({"context": say("a"), "response1": "b", "response2": "c", "overall_preference": -1},
                   "helpsteer3", say("a"), [answer("b"), answer("c")], TWO),
    "shp": ({"history": "a ", "human_ref_A": "b", "human_ref_B": "c", "labels": 0, "score_A": 1, "score_B": 9},
            "shp", "a ", ["b", "c"], SWAPPED),
    "pku": ({"prompt": "a ", "response_0": "b", "response_1": "c", "better_response_id": 1, "safer_response_id": 0},
            "pku_saferlhf", "a ", ["b", "c"], SWAPPED),
    "alpaca farm": ({"instruction": "a ", "input": "x ", "output_1": "b", "output_2": "c", "preference": 2},
                    "alpaca_farm", "a \nx ", ["b", "c"], SWAPPED),
    "webgpt": ({"question": {"full_text": "a ", "id": "q"}, "answer_0": "b", "answer_1": "c", "score_0": -0.5,
                "score_1": 0.5}, "webgpt", "a ", ["b", "c"], SWAPPED),
    "arena": ({"conversation_a": say("a", "b"), "conversation_b": say("a", "c"), "winner": "model_b"},
              "arena", None, [say("a", "b"), say("a", "c")], SWAPPED),
    "lmsys": ({"prompt": '["a", "x"]', "response_a": '["b", "y"]', "response_b": '["c", "z"]', "winner_model_a": 0,
               "winner_model_b": 1, "winner_tie": 0}, "lmsys",
              say("a"), [answer("b", "x", "y"), answer("c", "x", "z")], SWAPPED),
    "summaries": ({"info": POST, "summaries": [{"text": " b", "policy": "p"}, {"text": " c", "policy": "q"}],
                   "choice": 1},
                  "summaries", "SUBREDDIT: r/cats\n\nTITLE: a\n\nPOST: x y\n\nTL;DR:", [" b", " c"], SWAPPED),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(data_of, name):
    row, layout, prompt, answers, comparisons = LAYOUTS[name]
    data = data_of([row, row])
    assert data.sets["rows"].encoding.data_layout == layout
    example = examples(data)[1]
    assert (example.prompt, example.answers, example.comparisons) == (prompt, answers, comparisons)


def test_ties_are_dropped_and_counted_or_soft_labels(data_of):
    rows = [
        {"prompt": "a ", "response_1": "b", "response_2": "c", "preference_strength": strength} for strength in (0, 2)
    ]
    data = data_of(rows)
    assert (data.audit["tied"], data.audit["kept"], data.audit["total"]) == (1, 1, 2)
    data = data_of(rows, equal_scores="tie")
    assert data.comparisons[["chosen", "rejected", "p_chosen"]].values.tolist() == [[0, 1, 0.5], [1, 0, 1]]
    for winner, kept in (("tie", 1), ("tie (bothbad)", 1), ("model_a", 2)):
        row = {"conversation_a": say("a", "b"), "conversation_b": say("a", "c")}
        assert data_of([row | {"winner": "model_a"}, row | {"winner": winner}]).audit["kept"] == kept


def test_the_strength_of_a_preference_is_a_margin_or_a_weight(data_of):
    rows = [{"prompt": "a ", "response_1": "b", "response_2": "c", "preference_strength": s} for s in (-3, 2)]
    assert data_of(rows).comparisons[["margin", "weight"]].values.tolist() == [[0, 1], [0, 1]]
    data = data_of(rows, weight_column="preference_strength")
    assert data.comparisons[["chosen", "margin", "weight"]].values.tolist() == [[0, 0, 3], [1, 0, 2]]
    data = data_of(rows, margin_column="preference_strength", equal_scores="tie")
    assert data.comparisons["margin"].tolist() == [3, 2]


def test_options_choose_between_columns_of_a_layout(data_of, caplog):
    caplog.set_level(logging.INFO)
    row = LAYOUTS["ultrafeedback"][0]
    assert examples(data_of([row], scores_column="fine_grained_score"))[0].comparisons == TWO
    assert "layout ultrafeedback: instruction is prompt, completions.response is responses" in caplog.text
    assert "text that is not read: completions.custom_system_prompt" in caplog.text
    assert examples(data_of([LAYOUTS["pku"][0]], preference_column="safer_response_id"))[0].comparisons == TWO
    assert data_of([row], margin_from_scores=True).comparisons["margin"].tolist() == [6.5]
    assert data_of([LAYOUTS["shp"][0]], margin_from_scores=True).comparisons["margin"].tolist() == [8]  # votes


def test_mapping_options(data_of, tokenizer):
    row = {"about": {"topic": "a ", "rules": "z"}, "good": "b", "bad": "c", "all": ["b", "c"], "points": [1, 2]}
    pair = {"chosen_column": "good", "rejected_column": "bad"}
    assert decoded(data_of([row], prompt_column="about.topic", **pair), tokenizer) == [("a b <eos>", "a c <eos>")]
    data = data_of([row], prompt_column="about.topic", system_column="about.rules", **pair)
    assert examples(data)[0].prompt == "z\na " and data.sets["rows"].encoding.roles["system"] == "about.rules"
    group = {"responses_column": "all", "prompt_column": "about.topic"}
    assert examples(data_of([row], scores_column="points", **group))[0].comparisons == SWAPPED
    assert examples(data_of([row], ranks_column="points", **group))[0].comparisons == TWO
    for more in ({}, {"scores": [1, 2]}):  # the best answer is the first
        assert examples(data_of([row | more], ranks_column="", **group))[0].comparisons == TWO
    both = row | {"chosen": "x", "rejected": "y", "prompt": "d "}
    assert examples(data_of([both], prompt_column="about.topic", **pair))[0].answers == ["b", "c"]
    assert examples(data_of([both]))[0].answers == ["x", "y"]


AMBIGUOUS = GOOD | {"prompt": "x ", "responses": ["a", "b"], "scores": [1, 2]}


def test_two_layouts_need_an_option(data_of):
    fix = "chosen_column=chosen rejected_column=rejected or responses_column=responses scores_column=scores"
    with pytest.raises(InputError, match=rf"match several layouts \(pair, group_scores\); set {fix}$"):
        data_of([AMBIGUOUS])
    assert examples(data_of([AMBIGUOUS], chosen_column="chosen"))[0].comparisons == TWO
    assert examples(data_of([AMBIGUOUS], responses_column="responses"))[0].comparisons == SWAPPED
    two = GOOD | {"question": "x y z ", "query": "d e f "}
    with pytest.raises(InputError, match="question, query may be the prompt; choose one with prompt_column=question"):
        data_of([two])
    assert examples(data_of([two], prompt_column="query"))[0].prompt == "d e f "


def test_a_prompt_in_an_unknown_column(data_of, caplog):
    caplog.set_level(logging.INFO)
    row = {"topic": "x y z", "model": "m", "chosen": "a b c", "rejected": "d e f"}
    with pytest.raises(InputError, match="topic is not read; set prompt_column=topic, or prompt_column= "):
        data_of([row])
    assert examples(data_of([row], prompt_column="topic"))[0].prompt == "x y z"
    assert examples(data_of([row], prompt_column=""))[0].prompt is None
    assert "rows.jsonl: text that is not read: topic, model" in caplog.text
    contained = {"question": "x y", "chosen": "x y z a", "rejected": "x y z b"}  # the answers contain it
    assert examples(data_of([contained]))[0].prompt is None
    later = {"conversations": [], "chosen": "a b", "rejected": "d e"}  # the first row has none
    with pytest.raises(InputError, match="row 1: 'prompt' is an empty list"):
        data_of([later, later | {"conversations": say("x")}])
    nested = {"meta": {"topic": "x y", "by": "z"}, "chosen": "a b", "rejected": "d e"}
    with pytest.raises(InputError, match=r"meta\.topic is not read; set prompt_column=meta\.topic"):
        data_of([nested])
    for turns in (["x y"], [{"speaker": "user", "text": "x y"}]):
        with pytest.raises(
            InputError, match="the answers begin differently, and dialog is not read; set prompt_column"
        ):
            data_of([{"dialog": turns, "chosen": "a b", "rejected": "d e", "tags": ["p", "q"]}])
        with pytest.raises(InputError, match=r"row 1: prompt\[0\]"):  # a known name
            data_of([{"query": turns, "chosen": "a b", "rejected": "d e"}])
    with pytest.raises(InputError, match="topic is not read; set prompt_column=topic, or prompt_column= "):
        data_of([row | {"system": "be kind"}])  # which both answers would begin with


def test_the_prompt_beside_a_system_message(data_of):
    row = {"system": "z", "messages": say("a"), "chosen": answer("b"), "rejected": answer("c")}
    example = examples(data_of([row]))[0]
    assert (example.prompt, example.answers) == (
        [{"role": "system", "content": "z"}, *say("a")],
        [answer("b"), answer("c")],
    )


def test_an_image_in_a_later_row(data_of):
    with pytest.raises(InputError, match="rows.jsonl, row 2: images, audio or video: only text is read"):
        data_of([GOOD | {"images": []}, GOOD | {"images": ["a.png"]}])


H, A = "\n\nHuman: a\n\nAssistant:", "\n\nHuman:  a\nAssistant:"  # the same but for white space


@pytest.mark.parametrize(("row", "prompt", "answers"), [
    ({"prompt": H, "chosen": f"{H} b", "rejected": f"{H} c"}, H, [" b", " c"]),
    ({"prompt": f"{H} ", "chosen": f"{H} b", "rejected": f"{H} c"}, H, [" b", " c"]),
    ({"prompt": H, "chosen": f"{A}b", "rejected": f"{A}c"}, A, ["b", "c"]),
    ({"prompt": H, "system": "z", "chosen": f"{H} b", "rejected": f"{H} c"}, f"z\n{H}", [" b", " c"]),
    ({"prompt": H, "chosen": f"{H} b", "rejected": " c"}, H, [f"{H} b", " c"]),
    ({"prompt": say("hi"), **TALK}, say("hi"), [answer("a"), answer("b")]),
    ({"prompt": say("hi \n"), **TALK}, say("hi"), [answer("a"), answer("b")]),
    ({"messages": say("hi", "a"), "chosen": "a", "rejected": "b"}, say("hi"), [answer("a"), answer("b")]),
    ({"prompt": [*say("x", "y"), *say("hi")], **TALK}, say("x", "y", "hi"), [answer("a"), answer("b")]),
])  # fmt: skip
def test_a_repeated_prompt_is_there_once(data_of, row, prompt, answers):
    example = examples(data_of([row, row]))[0]
    assert (example.prompt, example.answers) == (prompt, answers)


def test_text_that_begins_like_its_prompt_by_chance(data_of):
    rows = [{"prompt": "hi", "chosen": "hi a", "rejected": "hi b"}] + [
        {"prompt": "x", "chosen": "a", "rejected": "b"}
    ] * 2
    assert examples(data_of(rows))[0].answers == ["hi a", "hi b"]


def test_turns_of_text_become_messages_with_text_as_conversation(data_of):
    row = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", "answers": RANKED}
    example = examples(data_of([row], text_as_conversation=True))[0]
    assert (example.prompt, example.answers[0]) == (say("a", "b", "c"), answer("b"))


@pytest.mark.parametrize(("row", "options", "message"), [
    ({"prompt": "a ", "completion": "b", "label": True}, {}, r"unpaired labels \(KTO\): each row has one answer; "),
    ({"conversations": say("which is better?", "A")}, {}, "judge prompts: both answers are in one prompt; "),
    (GOOD | {"images": ["a.png"]}, {}, "images, audio or video: only text is read; "),
    ({"q": "x", "good": "a", "bad": "b", "n": 1}, {},
     r"unknown layout; its columns are q \(text\), good \(text\), bad \(text\), n \(a number\); map them with options, "
     "perhaps chosen_column=good rejected_column=bad prompt_column=q$"),
    ({"data": {"q": "x", "win": "a", "loss": "b"}}, {},
     "unknown layout; .*chosen_column=data.win rejected_column=data.loss prompt_column=data.q$"),
    ({"query": say("x"), "texts": ["a", "b"], "points": [1, 2]}, {},
     r"unknown layout; its columns are query \(messages\), texts \(a list\), points \(a list\); .*"
     "responses_column=texts scores_column=points prompt_column=query$"),
    ({"prompt": "a ", "response": "b", "rating": 4}, {}, "unpaired labels"),
    ({"prompt": "a ", "pos_resp": "b", "neg_resp": "c"}, {}, ".*chosen_column=pos_resp rejected_column=neg_resp "),
    ({"all": [{"by": "m", "says": "a b", "points": 2}]}, {}, ".*responses_column=all.says scores_column=all.points$"),
    ({"q": "x", "texts": ["a", "b"]}, {},
     ".*responses_column=texts ranks_column= prompt_column=q if the best answer is the first$"),
    ({"q": "x", "texts": ["a", "b"], "label": 1}, {}, ".*label .a number.; docs/data.md has the layouts"),
    ({"q": "x", "texts": ["a", "b"], "ranking": [2, 1]}, {}, ".*ranking .a list.; docs/data.md has the layouts"),
    ({"data": [{"q": "x", "chosen": "b", "rejected": "c"}]}, {}, ".*data .a list.; docs/data.md has the layouts"),
    ({"instruction": "x", "output": ["a", "b"], "score": [1, 2]}, {},
     ".*responses_column=output scores_column=score prompt_column=instruction$"),
    ({"q": "x", "good one": "a", "bad": "b"}, {}, ".*'chosen_column=good one' rejected_column=bad prompt_column=q$"),
    (LAYOUTS["helpsteer2"][0] | {"preference_strength": 5}, {},
     "row 1: 'preference_strength' is 5.0, expected a finite number from -3 to 3$"),
    ({"q": "x", "a": "b", "b": "c", "winner": "a"}, {}, ".*; docs/data.md has the layouts, the mapping options, and "),
    ({"chosen": {"text": "a", "n": 1}, "rejected": {"text": "b", "n": 2}}, {},
     "row 1: 'chosen' is an object, but no message; name one of its fields by an option: chosen.text, chosen.n$"),
    (GOOD, {"prompt_column": "q"}, "prompt_column=q: there is no such column; there are chosen, rejected$"),
    (GOOD, {"chosen_column": "q"}, "chosen_column=q: there is no such column; there are chosen, rejected$"),
    (LAYOUTS["pku"][0] | {"better_response_id": 2}, {}, "row 1: 'better_response_id' is 2, expected one of 0, 1$"),
    (LAYOUTS["lmsys"][0] | {"response_a": "b"}, {}, "row 1: 'response_a' is not a JSON list of texts$"),
    (GOOD | {"system": 5}, {}, "row 1: 'system' is a number, expected text$"),
])  # fmt: skip
def test_rejected(data_of, row, options, message):
    with pytest.raises(InputError, match=rf"rows.jsonl[:,] {message}") as error:
        data_of([row, row], **options)
    assert "\n" not in str(error.value)


def test_every_layout_is_documented():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.M)
    assert set(DATA_LAYOUTS) <= set(rows)


RECIPES = [  # (rows, rows that the recipe makes)
    ([{"prompt": "a ", "completion": c, "label": c == "b"} for c in "bc"],
     [{"prompt": "a ", "responses": ["b", "c"], "scores": [1, 0]}]),
    ([{"prompt": "a ", "response": c, "helpfulness": n} for n, c in enumerate("bc")],
     [{"prompt": "a ", "responses": ["b", "c"], "scores": [0.0, 1.0]}]),
    ([{"conversations": say("[CONTEXT]a [RESPONSE A]b[RESPONSE B]c", "B")}],
     [{"prompt": "a ", "chosen": "c", "rejected": "b"}]),
    ([GOOD | {"images": ["a.png"]}, GOOD | {"images": []}], [GOOD]),
    ([{"prompt": "a ", "reference": "b", "samples": ["c", "d"]}],
     [{"prompt": "a ", "chosen": ["b"], "rejected": ["c", "d"]}]),
    ([{"prompt": "a ", "answer_a": "b", "answer_b": "c", "winner": winner} for winner in "AB"],
     [{"prompt": "a ", "chosen": "b", "rejected": "c"}, {"prompt": "a ", "chosen": "c", "rejected": "b"}]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipes_of_the_documentation(data_of, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("### Recipes")[2]
    rows, expected = RECIPES[number]
    write(tmp_path / "rows.jsonl", rows)
    names = {"dataset": datasets.load_dataset("json", data_files="rows.jsonl")["train"]}
    exec(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)[number], names)
    assert names["dataset"].to_list() == expected
    data_of(expected)
