"""RewardBench's scores by hand; whole evaluations of small files in the forms of RewardBench 1 and 2."""

import json
import logging
import math
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from runs import reset_accelerate

from rm.config.errors import InputError
from rm.evaluate import __main__ as evaluate
from rm.evaluate import rewardbench
from rm.evaluate.rewardbench import PUBLISHED_PAIRS, SECTIONS, best_of_n_metrics, best_share, rewardbench_metrics


def table(**margins: list[float]) -> pd.DataFrame:
    """Pairs of the named subsets (`_` for `-`) with these reward differences."""
    rows = [(name.replace("_", "-"), margin) for name, values in margins.items() for margin in values]
    return pd.DataFrame({"subset": [n for n, _ in rows], "reward_chosen": [m for _, m in rows], "reward_rejected": 0.0})


@pytest.fixture(autouse=True)
def say_again():
    rewardbench._warn_once.cache_clear()


def test_sections_have_the_published_weights():
    """rewardbench.constants of version 0.1.4."""
    sizes = {name: sum(weights.values()) for name, weights in SECTIONS.items()}
    assert sizes == {"chat": 358, "chat_hard": 456, "safety": 740, "reasoning": 984 * 2}
    assert sum(PUBLISHED_PAIRS.values()) == 2985 and len(PUBLISHED_PAIRS) == 23


def test_reasoning_by_hand(caplog):
    """math-prm weighs 984, each language 164; a tie is wrong."""
    code = {f"hep_{name}": [1.0] for name in ("cpp", "go", "java", "js", "python")}
    metrics, intervals = rewardbench_metrics(table(math_prm=[1, -1, 0, 2], **code, hep_rust=[0, 0]))
    want = (984 * 2 / 4 + 5 * 164 * 1 + 164 * 0) / (984 + 6 * 164)
    assert metrics == {"eval/rewardbench/reasoning": pytest.approx(want), "eval/rewardbench/pairs": 11}
    (interval,) = intervals.values()
    # math-prm's four pairs: a mean of 4 draws of 1/2 is 0 with probability 1/16; what all agree on is not certain
    assert interval[0] < 5 / 12 < want < interval[1] < 5 / 12 + 1 / 2
    assert "chat_hard: no score, for want of the subsets mt-bench-hard, " in caplog.text
    missing = 447 + 6 * 164 - 11
    assert f"{missing} of the published pairs of math-prm, hep-cpp, hep-go, ... are not there" in caplog.text


def whole(right: dict[str, float]) -> pd.DataFrame:
    """Four pairs of every subset, of which a section's share is right."""
    share = {name: right[section] for section, weights in SECTIONS.items() for name in weights}
    return table(**{name: [1] * round(4 * p) + [-1] * round(4 - 4 * p) for name, p in share.items()})


def test_the_score_is_the_mean_of_the_sections():
    right = {"chat": 1.0, "chat_hard": 0.25, "safety": 0.5, "reasoning": 0.75}
    metrics, intervals = rewardbench_metrics(whole(right), prefix="eval/rb")
    assert {f"eval/rb/rewardbench/{name}": value for name, value in right.items()}.items() <= metrics.items()
    assert metrics["eval/rb/rewardbench/score"] == pytest.approx(0.625) and metrics["eval/rb/rewardbench/pairs"] == 92
    low, high = intervals["eval/rb/rewardbench/score"]
    assert 0.45 < low < 0.625 < high < 0.75
    low, high = intervals["eval/rb/rewardbench/chat"]  # all 20 pairs are right
    assert 0.7 < low < 0.95 and high == 1


def test_prior_sets_have_half_a_weight():
    """As in analysis/get_benchmark_results.py: weights 2, 2, 2, 2, 1."""
    sections = whole(dict.fromkeys(SECTIONS, 1.0))
    prior = pd.concat([table(x=[1, -1, -1, -1]).assign(subset=name) for name in rewardbench.PRIOR_SETS])
    unused = table(x=[-1]).assign(subset="anthropic_harmless")
    metrics, _ = rewardbench_metrics(pd.concat([sections, prior, unused]))
    assert metrics["eval/rewardbench/prior_sets"] == 0.25
    assert metrics["eval/rewardbench/score"] == pytest.approx((2 * 4 * 1 + 0.25) / 9)
    metrics, _ = rewardbench_metrics(pd.concat([sections, prior[prior["subset"] != "shp"]]))
    assert metrics["eval/rewardbench/score"] == 1 and "eval/rewardbench/prior_sets" not in metrics


def test_other_data_are_not_rewardbench():
    assert rewardbench_metrics(table(brief=[1.0], detailed=[1.0])) == ({}, {})
    mixed = pd.concat([whole(dict.fromkeys(SECTIONS, 1.0)), table(brief=[1.0])])
    assert rewardbench_metrics(mixed) == ({}, {})
    assert rewardbench_metrics(mixed.drop(columns="subset")) == ({}, {})


def test_whole_prompts_are_resampled():
    """Twenty pairs of one prompt are as little evidence as one."""
    one = table(donotanswer=[1.0] * 10 + [-1.0] * 10)
    others = {name.replace("-", "_"): [1.0] * 400 for name in SECTIONS["safety"] if name != "donotanswer"}
    rest = table(**others)
    spread = []
    for prompts in (np.arange(20), np.arange(20) // 10):
        both = pd.concat([one.assign(prompt=prompts), rest.assign(prompt=99 + np.arange(len(rest)))])
        low, high = rewardbench_metrics(both)[1]["eval/rewardbench/safety"]
        spread.append(high - low)
    assert spread[1] == pytest.approx(136 / 740, rel=0.05) and spread[0] < 0.6 * spread[1]


# ---------------------------------------------------------------- several answers a prompt


@pytest.mark.parametrize(
    ("rewards", "num_correct", "share"),
    [([3, 1, 2], 1, 1), ([1, 3, 2], 1, 0), ([3, 3, 3, 1], 1, 1 / 3), ([3, 3, 1], 2, 1), ([2, 3, 3], 2, 1 / 2)],
)
def test_best_share(rewards, num_correct, share):
    assert best_share(rewards, num_correct) == pytest.approx(share)


def answers(*rows: tuple) -> pd.DataFrame:
    rows = [(name, subset, np.array(rewards, float), correct) for name, subset, rewards, correct in rows]
    return pd.DataFrame(rows, columns=["id", "subset", "rewards", "num_correct"])


TIES = (  # gap and spread of each: tied 1.0 and 0.5, ref 0.25
    ("tied:7", "Ties", [3.5, 3.0, 2.0, 1.0], 2),
    ("ref:7", "Ties", [2.25, 2.0, 1.0], 1),
    # tied 1.0 and 2.0, ref -1.0
    ("tied:8", "Ties", [4.0, 2.0, 1.0], 2),
    ("ref:8", "Ties", [1.0, 2.0], 1),
)


def test_ties_by_hand():
    metrics, _ = best_of_n_metrics(answers(*TIES))
    accuracy = {"tied": 2 / 2, "ref": 1 / 2}
    preferred, preferred_hard = 1 / 2, 0 / 2
    margin = (math.tanh(0.25 / 0.5 - 1) + math.tanh(-1.0 / 2.0 - 1)) / 2
    want = 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * (preferred + preferred_hard) + 0.01 * margin
    assert metrics["eval/rewardbench2/ties"] == pytest.approx(want)
    assert metrics["eval/Ties/accuracy"] == 3 / 4  # the best answer is a correct one
    assert "eval/rewardbench2/score" not in metrics


def test_ties_that_lack_a_part():
    """Equal correct rewards have no ratio; a question asked once counts where it can."""
    same, alone = ("tied:1", "Ties", [3.0, 3.0, 2.0], 2), ("tied:2", "Ties", [1.0, 0.5, 2.0], 2)
    metrics, _ = best_of_n_metrics(answers(same, ("ref:1", "Ties", [3.0, 2.0], 1), alone))
    assert metrics["eval/rewardbench2/ties"] == pytest.approx(0.3 * 1 / 2 + 0.3 * 1 + 0.2 + 0.2)
    with pytest.raises(InputError, match="id '5' must be ref:NUMBER or tied:NUMBER"):
        best_of_n_metrics(answers(("5", "Ties", [1.0, 2.0], 1)))


def test_rewardbench_2_by_hand(caplog):
    four = [("Factuality", [4, 1, 2, 3]), ("Factuality", [1, 4, 2, 3]), ("Precise IF", [1, 4, 2, 3])]
    four += [("Math", [2, 2, 1, 1]), ("Safety", [3, 0, 0, 0]), ("Focus", [3, 0, 0, 0])]
    rows = [(str(i), subset, rewards, 1) for i, (subset, rewards) in enumerate(four)]
    metrics, intervals = best_of_n_metrics(answers(*rows, *TIES))
    want = {"factuality": 0.5, "precise_if": 0.0, "math": 0.5, "safety": 1.0, "focus": 1.0}
    want["ties"] = metrics["eval/rewardbench2/ties"]
    want["score"] = sum(want.values()) / 6
    for name, value in want.items():
        assert metrics[f"eval/rewardbench2/{name}"] == pytest.approx(value), name
        low, high = intervals[f"eval/rewardbench2/{name}"]
        assert 0 <= low <= value <= high <= 1.01, name
    assert intervals["eval/rewardbench2/factuality"] == (0, 1)
    assert metrics["eval/Precise IF/prompts"] == 1 and metrics["eval/prompts"] == 10
    best_of_n_metrics(answers(*rows))
    assert "RewardBench 2 without ties: no score of the whole" in caplog.text


def test_any_best_of_n():
    metrics, intervals = best_of_n_metrics(answers(("a", "mine", [2, 1], 1), ("b", "yours", [2, 1, 3, 0, 0], 2)))
    assert metrics == {
        "eval/accuracy": 0.5, "eval/mine/accuracy": 1.0, "eval/yours/accuracy": 0.0,
        "eval/prompts": 2, "eval/mine/prompts": 1, "eval/yours/prompts": 1,
    }  # fmt: skip
    assert intervals["eval/accuracy"] == (0, 1)
    alone, _ = best_of_n_metrics(answers(("a", "mine", [2, 1], 1)).drop(columns="subset"))
    assert alone == {"eval/accuracy": 1.0, "eval/prompts": 1}


# ---------------------------------------------------------------- whole evaluations


def asked(i: int) -> str:
    return f"be brief. tell me how to make tea {'please ' * (i % 3)}."


SAID = ("gladly, boil water.", "no.", "what a silly question.", "boil water.")


def write(file, rows: list[dict]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def conversation(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on conversations."""
    from runs import SMALL

    import train_rm

    folder = tmp_path_factory.mktemp("trained") / "out"
    reset_accelerate()
    train_rm.main(["dataset_name=toy", *SMALL, f"--output_dir={folder}"])
    return folder


def evaluated(folder, file, *options: str) -> dict:
    reset_accelerate()
    return evaluate.main([f"--model={folder}", f"--dataset_name={file}", *options])


def rewardbench_rows() -> list[dict]:
    """Two pairs of every subset, in RewardBench's columns; ids are its integers, the same in several subsets."""
    rows = []
    for i, name in enumerate([*PUBLISHED_PAIRS, *PUBLISHED_PAIRS]):
        said = {"chosen": SAID[i % 2], "rejected": SAID[2 + i % 2]}
        rows.append({"prompt": asked(i), **said, "subset": name, "id": i % 7})
    return rows


def test_rewardbench_of_a_model(trained, tmp_path, caplog):
    """The package's way: the chat template over a user's and an assistant's message, by transformers alone."""
    from transformers import AutoTokenizer, pipeline

    caplog.set_level(logging.INFO)
    rows = rewardbench_rows()
    metrics = evaluated(trained, write(tmp_path / "rb.jsonl", rows))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    score = pipeline("text-classification", model=str(trained), function_to_apply="none")
    sides = {}
    for side in ("chosen", "rejected"):
        texts = [tokenizer.apply_chat_template(conversation(r["prompt"], r[side]), tokenize=False) for r in rows]
        sides[f"reward_{side}"] = [found["score"] for found in score(texts)]
    assert metrics["eval/reward_chosen"] == pytest.approx(np.mean(sides["reward_chosen"]), abs=1e-5)
    assert metrics["eval/reward_rejected"] == pytest.approx(np.mean(sides["reward_rejected"]), abs=1e-5)
    want, _ = rewardbench_metrics(pd.DataFrame({"subset": [row["subset"] for row in rows], **sides}))
    assert len(want) == 6 and want.items() <= metrics.items()
    assert "scored as conversations: the model was trained on conversations" in caplog.text
    as_text = evaluated(trained, tmp_path / "rb.jsonl", "--text_as_conversation=false")
    assert as_text["eval/reward_chosen"] != pytest.approx(metrics["eval/reward_chosen"], abs=1e-3)


def test_rewardbench_beside_another_set_in_training(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sets = {"rb": write(tmp_path / "rb.jsonl", rewardbench_rows()), "toy": "toy"}
    summary, folder = train("out", f"--eval_dataset_name={sets}", "--max_eval_samples=none")
    assert "eval/rb/rewardbench/score" in summary and summary["eval/rb/rewardbench/pairs"] == 46
    assert not any("rewardbench" in name for name in summary if "/rb/" not in name)
    assert "evaluation data of text were made conversations, as the training data are" in caplog.text
    shown = [json.loads(line) for line in (folder / "samples" / "step-4.jsonl").read_text().splitlines()]
    assert (shown[0]["prompt"], shown[0]["chosen"]) == (asked(0), SAID[0])
    again = evaluated(folder, sets["rb"])
    assert again["eval/rewardbench/score"] == summary["eval/rb/rewardbench/score"]


def test_a_model_trained_on_text_reads_text(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write(tmp_path / "rb.jsonl", rewardbench_rows())
    summary, folder = train("out", f"--dataset_name={file}", "--eval_fraction=0.25", "--max_train_samples=none")
    assert evaluated(folder, file)["eval/pairs"] == 46
    assert "scored as text: the model was trained on text" in caplog.text
    _, folder = train("talk", f"--dataset_name={file}", "--eval_fraction=0.25", "--text_as_conversation=true")
    data = json.loads((folder / "results.json").read_text())["data"]
    assert {part["format"] for part in data.values()} == {"conversation_from_text"}
    assert "apply_chat_template" in (folder / "README.md").read_text()
    evaluated(folder, file)
    assert "scored as conversations: text_as_conversation=true" in caplog.text


def test_a_model_from_elsewhere_is_read_by_its_chat_template(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in trained.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors") and path.name != "results.json":
            (elsewhere / path.name).write_bytes(path.read_bytes())
    file = write(tmp_path / "rb.jsonl", rewardbench_rows())
    assert evaluated(elsewhere, file) == pytest.approx(evaluated(trained, file))
    assert "scored as conversations: the tokenizer has a chat template" in caplog.text


def test_text_without_a_prompt_is_no_conversation(trained, tmp_path, fails):
    file = write(tmp_path / "hh.jsonl", [{"chosen": "tell me. no.", "rejected": "tell me. gladly."}] * 3)
    assert evaluated(trained, file)["eval/pairs"] == 3  # what is decided here leaves it text
    error = fails(f"--dataset_name={file}", "--eval_fraction=0.3", "--text_as_conversation=true")
    assert error == (
        f"{file}: text without a column 'prompt' cannot be made a conversation; give the prompts in a column of their "
        "own, or set text_as_conversation to false"
    )


def best_of_four() -> list[dict]:
    rows = []
    for i, subset in enumerate(["Factuality", "Precise IF", "Math", "Safety", "Focus"] * 2):
        said = [SAID[(i + k) % 4] for k in range(4)]
        rows.append({"id": str(i), "prompt": asked(i), "chosen": said[:1], "rejected": said[1:], "subset": subset})
    for i in range(2):
        for kind, n in (("ref", 1), ("tied", 2)):
            row = {"id": f"{kind}:{i}", "prompt": asked(i), "chosen": list(SAID[:n]), "rejected": list(SAID[2:])}
            rows.append(row | {"subset": "Ties"})
    for row in rows:
        n, m = len(row["chosen"]), len(row["rejected"])
        row |= {"num_correct": n, "num_incorrect": m, "total_completions": n + m, "models": ["a"] * (n + m)}
    return rows


@pytest.mark.parametrize("options", [[], ["--text_as_conversation=false"]], ids=["conversations", "text"])
def test_rewardbench_2_of_a_model(trained, tmp_path, capsys, monkeypatch, options):
    """The rewards of all answers are those of pairs with the same prompt and answers."""
    rows, tables = best_of_four(), []
    monkeypatch.setattr(evaluate, "best_of_n_metrics", lambda t: tables.append(t) or best_of_n_metrics(t))
    metrics = evaluated(trained, write(tmp_path / "rb2.jsonl", rows), *options)
    out, err = capsys.readouterr()
    printed = json.loads(out.strip().splitlines()[-1])
    assert printed.pop("intervals").keys() == {name for name in metrics if not name.endswith("prompts")}
    assert printed == metrics and "eval/rewardbench2/score" in out and "95% interval" in out
    from rm.score import load_scorer

    scorer, items = load_scorer(str(trained)), []
    for row in rows:
        for answer in row["chosen"] + row["rejected"]:
            whole = {"messages": conversation(row["prompt"], answer)}
            items.append({"text": row["prompt"] + answer} if options else whole)
    rewards = iter(float(values[0]) for values in scorer.rewards(items))
    rows = [(row["id"], row["subset"], [next(rewards) for _ in row["models"]], row["num_correct"]) for row in rows]
    for got, (*_, want, _) in zip(tables[0]["rewards"], rows, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert metrics == pytest.approx(best_of_n_metrics(answers(*rows))[0], abs=1e-4)
    assert 0 < metrics["eval/accuracy"] < 1 and metrics["eval/rewardbench2/score"] > 0


def test_what_cannot_be_scored_is_left_out(trained, tmp_path, caplog):
    rows = best_of_four()[:4]
    rows[2]["rejected"][1] = "  "
    metrics = evaluated(trained, write(tmp_path / "some.jsonl", rows))
    assert metrics["eval/prompts"] == 3 and "eval/Math/prompts" not in metrics
    assert "1 of 4 prompts are left out, the first: " in caplog.text and "row 2: 'responses[2]' is blank" in caplog.text
    metrics = evaluated(trained, tmp_path / "some.jsonl", "--max_eval_samples=1", "--max_length=200")
    assert metrics["eval/prompts"] == 1
    with pytest.raises(InputError, match="no prompt could be scored; the first: .*row 0: .*tokens"):
        evaluated(trained, tmp_path / "some.jsonl", "--max_length=3")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"chosen": []}, "row 1: 'chosen' must be a list of one text or more"),
        ({"rejected": ["a", None]}, "row 1: 'rejected' must be a list of one text or more"),
        ({"prompt": None}, "row 1: 'prompt' is missing (null), expected text or messages"),
        ({"num_correct": 2}, "row 1: 'num_correct' is 2, but 'chosen' has 1 answers"),
    ],
    ids=["none right", "null", "no prompt", "miscounted"],
)
def test_wrong_rows(trained, tmp_path, fails, change, error):
    rows = best_of_four()[:2]
    rows[1] |= change
    file = write(tmp_path / "wrong.jsonl", rows)
    found = fails(f"--model={trained}", f"--dataset_name={file}", module="rm.evaluate")
    assert found == f"{file}, {error}"


def test_several_answers_are_not_for_training(tmp_path, fails):
    file = write(tmp_path / "rb2.jsonl", best_of_four())
    error = fails(f"--eval_dataset_name={file}", "--max_train_samples=20")
    assert (
        "'chosen' has the type List(Value('string'))" in error
        and "for python -m rm.evaluate, one such data set" in error
    )


def test_the_glossary_has_these_metrics():
    glossary = (ROOT / "README.md").read_text().partition("**Benchmarks.**")[2].partition("\n## ")[0]
    prior = [table(x=[1]).assign(subset=name) for name in rewardbench.PRIOR_SETS]
    names = set(rewardbench_metrics(pd.concat([whole(dict.fromkeys(SECTIONS, 1.0)), *prior]))[0])
    subsets = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    of_four = best_of_n_metrics(answers(*((name, name, [2, 1, 1, 1], 1) for name in subsets), *TIES))[0]
    names |= {re.sub(f"/({'|'.join(subsets)}|Ties)/", "/<subset>/", name) for name in of_four}
    assert set(re.findall(r"`(eval/[\w/<>]+)`", glossary)) == names


def test_the_option_is_true_false_or_none():
    from rm.config.cli import parse_config

    assert [parse_config([f"text_as_conversation={v}"]).text_as_conversation for v in ("true", "false", "none")] == [
        True, False, None,
    ]  # fmt: skip
    with pytest.raises(InputError):
        parse_config(["text_as_conversation=auto"])
