"""Whatever is scored, alone or among others, by the command or in a program, gets the rewards of the evaluation."""

import gzip
import io
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import examples
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from runs import SMALL, assert_same_bits, reset_accelerate
from transformers import AutoConfig

import train_rm
from rm.config.errors import InputError
from rm.evaluate import __main__ as evaluate
from rm.model.load import reward_scale, sample_of
from rm.score import __main__ as score
from rm.score import load_scorer
from rm.score.__main__ import is_same, open_output
from rm.score.scorer import ACCEPTED, encode_inputs, score_prompts

ASK = [{"role": "user", "content": "be brief. tell me how to make tea."}]
PAGE = (ROOT / "docs" / "scoring_and_serving.md").read_text(encoding="utf-8")
TEXT = "<|user|>be brief. tell me how to make tea.<|end|><|assistant|>"
ANSWERS = ["gladly, boil water.", "no.", "what a silly question. boil water."]


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


# ---------------------------------------------------------------- the evaluation's rewards


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pretrained):
    """make(kind) -> the folder of a short run, made once."""
    root = tmp_path_factory.mktemp("runs")
    bert = root / "tiny-bert"
    options = dict(vocab_size=136, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    options |= dict(max_position_embeddings=96, pad_token_id=0, architectures=["BertForSequenceClassification"])
    shutil.copytree(ROOT / "configs" / "tiny_llama", bert, ignore=shutil.ignore_patterns("config.json"))
    AutoConfig.for_model("bert", **options).save_pretrained(bert)
    lora = ["--use_peft", "--lora_target_modules=all-linear", f"--model_name_or_path={pretrained}"]
    kinds = {
        "full": [],
        "concatenated": ["--layout=concatenated"],
        "bf16": ["--dtype=bfloat16"],
        "autocast": ["--mixed_precision=bf16"],
        "cast": ["--eval_dtype=bfloat16"],
        "lora": lora,
        "merged": [*lora, "--merge_adapter"],
        "bert": [f"--model_name_or_path={bert}"],
        "no_scale": ["--num_normalization_samples=0"],
    }

    def make(kind: str) -> str:
        folder = root / kind
        if not folder.exists():
            reset_accelerate()
            train_rm.main(["dataset_name=toy", *SMALL, "--max_steps=2", *kinds[kind], f"--output_dir={folder}"])
        return str(folder)

    return make


TWO = [(ANSWERS[0], ANSWERS[1]), (ANSWERS[1], ANSWERS[2])]
PAIRS = {
    "text_implicit_prompt": [{"chosen": TEXT + a, "rejected": TEXT + b} for a, b in TWO],
    "text_explicit_prompt": [{"prompt": TEXT, "chosen": a, "rejected": b} for a, b in TWO],
    "conversation_implicit_prompt": [
        {"chosen": ASK + say(a), "rejected": ASK + say(b), "prompt": ASK[0]["content"]} for a, b in TWO
    ],
    "conversation_explicit_prompt": [{"prompt": ASK, "chosen": say(a), "rejected": say(b)} for a, b in TWO],
    "tokenized": [
        {"input_ids_chosen": [5, 6, 7, 8], "input_ids_rejected": [5, 6, 9], "attention_mask_rejected": [1, 1, 1]},
        {"input_ids_chosen": [11, 6, 7], "input_ids_rejected": [12], "attention_mask_rejected": [1]},
    ],
}


def evaluated(folder: str, rows: list[dict], tmp_path) -> np.ndarray:
    """The rewards (chosen, rejected) in the table of `rm.evaluate`."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reset_accelerate()
    evaluate.main([f"--model={folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}", f"--output={tmp_path / 'kept'}"])
    return pd.read_parquet(tmp_path / "kept" / "table.parquet")[["reward_chosen", "reward_rejected"]].to_numpy()


@pytest.mark.parametrize("kind", ["full", "concatenated", "bf16", "autocast", "cast", "lora", "merged", "bert"])
def test_rewards_are_those_of_the_evaluation(folders, kind, tmp_path):
    folder = folders(kind)
    scorer = load_scorer(folder)
    assert scorer.layout.name == ("concatenated" if kind in ("concatenated", "bert") else "shared_prefix")
    half = kind in ("bf16", "autocast", "cast")
    for name, rows in PAIRS.items():
        expected = evaluated(folder, rows, tmp_path)
        np.testing.assert_allclose(scorer.rewards(rows), expected, atol=2e-2 if half else 1e-5, err_msg=name)
    for row in PAIRS["conversation_explicit_prompt"] if half else ():  # alone in a row also the rounding is the same
        np.testing.assert_array_equal(scorer.rewards([row]), evaluated(folder, [row], tmp_path))


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_every_form_of_an_answer_gets_the_same_reward(folders, layout):
    scorer = load_scorer(folders("full"), layout=layout, micro_batch_tokens=40, text_as_conversation=False)
    assert scorer.layout.name == layout
    whole = [scorer.rewards([{"messages": ASK + say(answer)}])[0].item() for answer in ANSWERS]
    inputs = [
        {"prompt": ASK, "responses": ANSWERS},  # in several trees: 40 tokens do not hold all
        *({"prompt": ASK, "response": answer} for answer in ANSWERS),
        {"prompt": ASK, "chosen": ANSWERS[0], "rejected": say(ANSWERS[2])},
        {"prompt": TEXT, "responses": ANSWERS},
        *({"text": TEXT + answer} for answer in ANSWERS),
    ]
    rewards = scorer.rewards(inputs)
    assert len(set(whole)) == 3 and all(r.dtype == np.float64 for r in rewards)
    for got, expected in zip(rewards, [whole, *([r] for r in whole), [whole[0], whole[2]]], strict=False):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(rewards[5], np.concatenate(rewards[6:]), atol=1e-5)  # text ends in EOS, not <|end|>
    as_trained = load_scorer(folders("full"), layout=layout)  # on conversations
    question = [{"prompt": ASK[-1]["content"], "responses": ANSWERS}, {"prompt": ASK[-1:], "responses": ANSWERS}]
    np.testing.assert_allclose(*as_trained.rewards(question), atol=1e-5)


def test_what_is_too_long(folders):
    long = {"prompt": "boil water. " * 40, "responses": ANSWERS}
    assert load_scorer(folders("full")).rewards([long])[0].shape == (3,)
    for kind, options, limit in (("bert", {}, 96), ("full", {"max_length": 20}, 20)):
        with pytest.raises(InputError, match=rf"input 1: 'responses\[0\]' has \d+ tokens, the limit is {limit}; "):
            load_scorer(folders(kind), **options).rewards([{"text": "no."}, long])
        cut = load_scorer(folders(kind), overlength="truncate_left", **options)
        (tree,) = encode_inputs([long], cut.tokenizer, cut.encoding)
        assert max(map(len, tree.sequences())) == limit and np.isfinite(cut.rewards([long])[0]).all()
    with pytest.raises(InputError, match="learning_rate: has no effect"):
        load_scorer(folders("full"), learning_rate=1)


# ---------------------------------------------------------------- the command

LINES = [
    {"id": "a", "prompt": ASK, "responses": ANSWERS, "note": "é"},
    {"id": "b", "prompt": ASK, "chosen": ANSWERS[0], "rejected": ANSWERS[1], "margin": 0.5, "line": 77},
    "no JSON",
    {"id": "c", "messages": ASK + say("boil water.")},
    "",
    {"id": "d", "text": 5},
    {"text": TEXT + "no."},
    '{"text": NaN}',
    b"\xff\xfe",
    {"id": "e", "prompt": ASK, "response": "rinse the rice.", "odd": "\ud800"},
]


@pytest.fixture
def command(tmp_path, monkeypatch, capfdbinary):
    """command(*options) -> (exit code, stderr); with `lines` as the input x.jsonl if given."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str, lines: list | None = None) -> tuple[int, str]:
        if lines is not None:
            encoded = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines]
            data = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in encoded)
            (tmp_path / "x.jsonl").write_bytes(data)
        code = score.main(list(options))
        return code, capfdbinary.readouterr().err.decode()

    return run


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_lines_in_lines_out(folders, command, tmp_path):
    folder = folders("full")
    code, said = command(f"--model={folder}", "--input=x.jsonl", "--output", "y.jsonl", lines=LINES)
    assert code == 0 and "9 lines, 4 errors" in said and "the first error, line 3: not JSON" in said
    out = read(tmp_path / "y.jsonl")
    assert [record["line"] for record in out] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [record["line"] for record in out if "error" in record] == [3, 6, 8, 9]
    assert out[4] == {"line": 6, "id": "d", "error": "'text' is a number, expected text or messages"}
    scorer = load_scorer(folder)
    (answers, pair, talk, text, response) = scorer.rewards([LINES[i] for i in (0, 1, 3, 6, 9)])
    best = int(answers.argmax())
    assert out[0] == LINES[0] | {
        "line": 1, "rewards": pytest.approx(answers), "best": best, "best_response": ANSWERS[best]
    }  # fmt: skip
    margin = pair[0] - pair[1]
    assert out[1] == {key: LINES[1][key] for key in ("id", "prompt", "chosen", "rejected")} | {
        "line": 2, "data_margin": 0.5,
        "reward_chosen": pytest.approx(pair[0]), "reward_rejected": pytest.approx(pair[1]),
        "margin": pytest.approx(margin), "p_chosen": pytest.approx(1 / (1 + np.exp(-margin))),
    }  # fmt: skip
    assert out[3] == LINES[3] | {"line": 4, "reward": pytest.approx(talk[0])}
    assert out[5] == LINES[6] | {"line": 7, "reward": pytest.approx(text[0])}
    assert out[8] == LINES[9] | {"line": 10, "reward": pytest.approx(response[0])}
    assert b"\xc3\xa9" in (tmp_path / "y.jsonl").read_bytes()


def test_stdin_gz_windows_and_budgets_change_no_reward(folders, command, tmp_path, monkeypatch, capfdbinary):
    folder = folders("full")
    command(f"--model={folder}", "--input=x.jsonl", "--output=y.jsonl", lines=LINES)
    expected = read(tmp_path / "y.jsonl")
    with gzip.open("x.jsonl.gz", "wb") as file:
        file.write((tmp_path / "x.jsonl").read_bytes())
    more = ["--window_size=2", "--micro_batch_tokens=1", "--layout=concatenated"]
    command(f"--model={folder}", "--input=x.jsonl.gz", "--output=z.jsonl", *more)
    data = (tmp_path / "x.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))
    capfdbinary.readouterr()
    assert score.main([f"--model={folder}", "--only_rewards", "--window_size", "3"]) == 0
    bare = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    for one, other, alone in zip(expected, read(tmp_path / "z.jsonl"), bare, strict=True):
        assert list(one) == list(other) and set(alone) <= {"line", "id", "error", "best", "best_response", *NUMBERS}
        for key in (*NUMBERS, "line", "id", "best", "error"):
            values = [record.get(key) for record in (one, other, alone)]
            assert values[0] == values[1] == values[2] if key not in NUMBERS or None in values else True
            if key in NUMBERS and key in one:
                np.testing.assert_allclose(values[1:], values[:1] * 2, atol=1e-5)


NUMBERS = ("reward", "rewards", "reward_chosen", "reward_rejected", "margin", "p_chosen")


def test_a_line_is_answered_before_later_windows_are_read(folders, monkeypatch, capfdbinary):
    """So that memory does not grow with the input, and a pipe gets its answers."""
    read_so_far = []

    class Pipe(io.RawIOBase):
        def readline(self, limit=-1):
            read_so_far.append(capfdbinary.readouterr().out.count(b"\n"))
            return b'{"text": "boil water."}\n' if len(read_so_far) <= 7 else b""

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(), isatty=lambda: False))
    score.main([f"--model={folders('full')}", "--window_size=3"])
    assert read_so_far == [0, 0, 0, 3, 0, 0, 3, 0]


GROUPS = [
    {"id": "a", "prompt": ASK, "responses": ANSWERS, "scores": [3, 1, 2], "comparisons": [[0, 1]], "models": [1, 2, 3]},
    {"id": "b", "input_ids": [[5, 6, 7], [5, 0, 8]], "attention_mask": [[1, 1, 1], [1, 0, 1]], "ranks": [1, 2]},
    {"id": "c", "prompt": ASK, "responses": ["no.", "no."], "scores": [1]},
    {"id": "d", "text": "no."},
]


def test_rank_sorts_the_answers_of_a_group(folders, command, monkeypatch, tmp_path):
    rewards = [np.array(row) for row in ([-1.0, 2.0, 0.5], [0.25, 0.75], [1.0, 1.0], [4.0])]
    monkeypatch.setattr(score.Scorer, "results", lambda self, records: rewards)
    model = f"--model={folders('full')}"
    command(model, "--input=x.jsonl", "--output=y.jsonl", "--rank", lines=GROUPS)
    groups, tokens, equal, text = read(tmp_path / "y.jsonl")
    assert groups == {
        "line": 1, "id": "a", "prompt": ASK, "responses": [ANSWERS[1], ANSWERS[2], ANSWERS[0]], "scores": [1, 2, 3],
        "models": [1, 2, 3], "rewards": [2.0, 0.5, -1.0], "ranking": [1, 2, 0],
    }  # fmt: skip
    assert tokens == {
        "line": 2, "id": "b", "input_ids": [[5, 0, 8], [5, 6, 7]], "attention_mask": [[1, 0, 1], [1, 1, 1]],
        "ranks": [2, 1], "rewards": [0.75, 0.25], "ranking": [1, 0],
    }  # fmt: skip
    assert equal == GROUPS[2] | {"line": 3, "rewards": [1.0, 1.0], "ranking": [0, 1]}  # in the order of the input
    assert text == GROUPS[3] | {"line": 4, "reward": 4.0}
    command(model, "--input=x.jsonl", "--output=z.jsonl", "--rank", "--only_rewards")
    assert read(tmp_path / "z.jsonl")[0] == {"line": 1, "id": "a", "rewards": [2.0, 0.5, -1.0], "ranking": [1, 2, 0]}
    command(model, "--input=x.jsonl", "--output=v.jsonl")
    added = {"line": 2, "rewards": [0.25, 0.75], "best": 1, "best_response": [5, 0, 8]}
    assert read(tmp_path / "v.jsonl")[1] == GROUPS[1] | added


def test_ranked_lines_are_group_data(folders, command, own_cache, tmp_path):
    """As docs/scoring_and_serving.md makes them: the rewards become the scores; a line with an error is left out."""
    lines = [GROUPS[0], {"id": "x", "text": 5}, GROUPS[0] | {"id": "e", "scores": None}]
    command(f"--model={folders('full')}", "--input=x.jsonl", "--output=ranked.jsonl", "--rank", lines=lines)
    (code,) = re.findall(r"^```python\n(from datasets import load_dataset\n.*?)^```$", PAGE, re.M | re.S)
    exec(code)
    data = examples.read("groups.jsonl", load_scorer(folders("full")).tokenizer)
    ranked = read(tmp_path / "ranked.jsonl")[0]
    assert len(data) == 2 and data.ids([0, 1]) == ["a", "e"]
    assert data.texts(0)["answers"] == ranked["responses"]
    assert ranked["rewards"] == sorted(ranked["rewards"], reverse=True)
    assert data.answers["score"].tolist() == pytest.approx(ranked["rewards"] * 2)
    assert data.comparisons[["chosen", "rejected"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]] * 2
    (again,) = load_scorer(folders("full")).rewards([ranked])
    np.testing.assert_allclose(again, ranked["rewards"], atol=1e-5)


def test_what_is_written_is_json(folders, command, tmp_path):
    """NaN, Infinity and numbers beyond float64 in the input; a line that is nested too deeply is an error."""
    numbers = '"odd": [NaN, {"a": 1e999}], "scores": [-Infinity]'
    deep = '{"text": "no.", "odd": ' + "[" * 600 + "]" * 600 + "}"
    lines = [f'{{"prompt": "a", "responses": ["no."], {numbers}}}', '{"id": NaN, "text": 5}', deep]
    assert command(f"--model={folders('full')}", "--input=x.jsonl", "--output=y.jsonl", lines=lines)[0] == 0

    def not_json(name):
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=not_json) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    assert (rows[0]["odd"], rows[0]["scores"]) == (["NaN", {"a": "Infinity"}], ["-Infinity"])
    assert rows[1]["id"] == "NaN" and rows[2]["error"].startswith("not JSON: maximum recursion depth")


def test_an_output_of_another_model_input_or_option_is_not_continued(folders, command, tmp_path):
    args = [f"--model={folders('full')}", "--input=x.jsonl", "--output=y.jsonl"]
    command(*args, lines=LINES[:1])
    whole = (tmp_path / "y.jsonl").read_bytes()
    refused = "y.jsonl: of another input, model or options; give another --output, or remove it"
    other = [LINES[0] | {"responses": ANSWERS[::-1]}], [LINES[0] | {"id": "z"}], [LINES[3]], ["no JSON"], []
    for options, lines in (
        ([*args, "--normalize"], None), ([*args, "--only_rewards"], None), ([*args, "--rank"], None),
        ([*args, "--max_length=5"], None), ([f"--model={folders('bert')}", *args[1:]], None),
        *((args, [*lines, *LINES[1:]] if lines else []) for lines in other),
    ):  # fmt: skip
        with pytest.raises(InputError, match=refused):
            command(*options, lines=lines)
        assert (tmp_path / "y.jsonl").read_bytes() == whole
        (tmp_path / "x.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    assert command(*args, "--micro_batch_tokens=20", "--layout=concatenated")[0] == 0  # changes no reward


def test_equal_answers_but_for_rounding():
    now = {"line": 3, "responses": ["a", "b"], "rewards": [2.0, 1.0], "best": 0, "best_response": "a"}
    same = now | {"rewards": [2.00019, 1.0]}, now | {"best": 1, "best_response": "b"}
    other = now | {"rewards": [2.001, 1.0]}, now | {"rewards": [2.0]}, now | {"line": 4}, now | {"responses": ["a"]}
    assert [is_same(last, now, 1e-4) for last in (*same, *other)] == [True, True, False, False, False, False]
    error = {"line": 3, "error": "'text' is blank"}
    assert is_same(error, error, 1e-4) and not is_same(error, now, 1e-4)
    ranked = {"line": 3, "responses": ["a", "b"], "rewards": [1.0, 1.0], "ranking": [0, 1]}
    assert is_same(ranked, ranked | {"responses": ["b", "a"], "ranking": [1, 0]}, 1e-4)


def test_the_same_options_continue(folders, command):
    args = [f"--model={folders('full')}", "--input=x.jsonl", "--output=y.jsonl", "--normalize", "--rank"]
    command(*args, lines=LINES[:2] + GROUPS[:2])
    assert "0 lines" in command(*args)[1]
    assert load_scorer(folders("full")).rounding == 1e-4
    assert load_scorer(folders("full"), eval_dtype="bfloat16").rounding == load_scorer(folders("bf16")).rounding == 5e-2
    scaled = load_scorer(folders("full"), normalize=True)
    assert scaled.std < 1 and scaled.rounding == 1e-4 / scaled.std


def test_goes_on_where_an_output_ends(folders, command, tmp_path):
    args = [f"--model={folders('full')}", "--input=x.jsonl", "--output=y.jsonl", "--window_size=2"]
    command(*args, lines=LINES)
    whole = (tmp_path / "y.jsonl").read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    for cut in (0, 1, ends[1], ends[2] + 5, ends[3], ends[-2], ends[-1] - 1, ends[-1]):
        (tmp_path / "y.jsonl").write_bytes(whole[:cut])
        code, said = command(*args)
        assert code == 0
        left = len(ends) - 1 - sum(end <= cut for end in ends[1:])
        assert f"{left} lines" in said
        assert [record["line"] for record in read(tmp_path / "y.jsonl")] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
        for one, other in zip(read(tmp_path / "y.jsonl"), map(json.loads, whole.splitlines()), strict=True):
            assert json.dumps(one)[:40] == json.dumps(other)[:40]


def test_refuses_to_continue_what_is_not_its_output(folders, command, tmp_path):
    args = [f"--model={folders('full')}", "--input=x.jsonl", "--output=y.jsonl"]
    for content in ('{"accuracy": 0.9}', "notes", '{"text": "not ours"}\n'):
        (tmp_path / "y.jsonl").write_text(content)
        with pytest.raises(InputError, match="has something else than rewards"):
            command(*args, lines=LINES)
        assert (tmp_path / "y.jsonl").read_text() == content


def test_two_programs_do_not_write_one_output(tmp_path):
    with open_output(tmp_path / "y") as (_, last), pytest.raises(InputError, match="another program is writing it"):
        assert last == {}
        with open_output(tmp_path / "y"):
            pass


def test_rewards_that_are_not_finite_and_broken_files(folders, command, tmp_path, monkeypatch):
    model = f"--model={folders('full')}"
    with monkeypatch.context() as patch:
        patch.setattr("rm.score.scorer.score_prompts", lambda *args: [r * np.nan for r in score_prompts(*args)])
        assert command(model, "--input=x.jsonl", "--output=y.jsonl", lines=[{"text": "no."}])[0] == 1
    assert read(tmp_path / "y.jsonl")[0]["error"] == "the reward is not finite"
    noise = [json.dumps({"text": "no.", "odd": os.urandom(20).hex()}) for _ in range(90)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(noise).encode())[:-90])
    with pytest.raises(InputError, match=r"x.jsonl.gz: cannot be read after line \d+"):
        command(model, "--input=x.jsonl.gz", "--output=z.jsonl", "--window_size=8")
    assert len(read(tmp_path / "z.jsonl")) > 40
    assert command(model, "--input=x.jsonl", "--output=v.jsonl", lines=[])[0] == 0


def test_wrong_arguments_are_one_line(folders, fails, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "no."}\n')
    model = f"--model={folders('full')}"
    for options, message in {
        ("--input=x.jsonl",): "--model is needed",
        ("--model=no/such/folder", "--input=x.jsonl"): "there is no such folder",
        (model, "--input=y.jsonl"): "y.jsonl cannot be used (No such file or directory)",
        (model, "--input=x.jsonl", "--output=no/y.jsonl"): "no/y.jsonl cannot be used (No such file or directory)",
        (model, "--input=x.jsonl", "--output=./x.jsonl"): "has something else than rewards",
        (model, "--input=x.jsonl", "--learning_rate=1"): "learning_rate has no effect in this program",
        (model, "--input=x.jsonl", "--max_length=0"): "max_length=0: must be greater than 0",
        (model, "--input=x.jsonl", "--window_size=none"): "window_size='none': must be a valid integer",
        (model, "--input=x.jsonl", "--normalize=3"): "normalize=3: must be a valid boolean",
        (model, "--input"): "--input needs a value",
        (f"--model={folders('no_scale')}", "--input=x.jsonl", "--normalize"): "has no reward_mean",
    }.items():
        assert message in fails(*options, module="rm.score"), options
    monkeypatch.setattr("sys.stdout", None)  # closed by the shell
    assert "standard output is closed; give --output" in fails(model, "--input=x.jsonl", module="rm.score")


def test_help(capfdbinary):
    with pytest.raises(SystemExit):
        score.main(["--help"])
    shown = capfdbinary.readouterr().out.decode()
    assert all(name in shown for name in ("only_rewards", *ACCEPTED))


# ---------------------------------------------------------------- normalised rewards


def test_the_scale_is_that_of_the_training_answers(folders, tmp_path, monkeypatch):
    """Of the final weights; in config.json, and of an adapter, which has none, in results.json."""
    from rm.data.toy import toy_dataset

    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in toy_dataset("train", 80, 42)]
    for kind in ("full", "lora", "merged", "bert"):
        folder = folders(kind)
        scorer, scaled = load_scorer(folder), load_scorer(folder, normalize=True)
        rewards = np.array(scorer.rewards(rows))
        scale = json.loads(open(f"{folder}/results.json").read())["normalization"]
        assert scale["reward_mean"] == pytest.approx(rewards.mean(), abs=1e-5), kind
        assert scale["reward_std"] == pytest.approx(rewards.std(), abs=1e-5)
        assert scale["reward_answers"] == 160
        if kind != "lora":
            config = json.loads(open(f"{folder}/config.json").read())
            assert {key: config[key] for key in scale} == scale
        normal = np.array(scaled.rewards(rows))
        np.testing.assert_allclose(normal, (rewards - rewards.mean()) / rewards.std(), atol=1e-4)


def test_a_model_without_the_run_around_it(folders, tmp_path):
    """As from the hub: what plain transformers needs, and no more."""
    for file in os.listdir(folders("full")):
        if file.endswith((".safetensors", ".jinja")) or file.startswith(("config.json", "tokenizer")):
            shutil.copy(f"{folders('full')}/{file}", tmp_path)
    items = [{"prompt": ASK, "responses": ANSWERS}, {"text": TEXT}]
    for normalize in (False, True):
        scorers = (load_scorer(str(folder), normalize=normalize) for folder in (tmp_path, folders("full")))
        for one, other in zip(*(scorer.rewards(items) for scorer in scorers), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_probability_of_a_pair_is_that_of_its_unnormalised_margin(folders, command, tmp_path):
    model = f"--model={folders('full')}"
    command(model, "--input=x.jsonl", "--output=y.jsonl", lines=LINES[1:2])
    command(model, "--input=x.jsonl", "--output=z.jsonl", "--normalize")
    (plain,), (normal,) = read(tmp_path / "y.jsonl"), read(tmp_path / "z.jsonl")
    assert normal["p_chosen"] == pytest.approx(plain["p_chosen"], abs=1e-6)
    assert abs(normal["margin"]) != pytest.approx(abs(plain["margin"]), rel=0.01)


def test_the_sample_and_its_moments():
    assert reward_scale(np.array([[1.0, 2.0], [3.0, 6.0]])) == {
        "reward_mean": 3.0, "reward_std": pytest.approx(np.sqrt(3.5)), "reward_answers": 4
    }  # fmt: skip
    assert reward_scale(np.array([1.0, np.nan])) is None
    assert sample_of(5, -1, 0).tolist() == sample_of(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    one = sample_of(1000, 100, 0)
    assert len(set(one.tolist())) == 100 and one.tolist() == sorted(one.tolist()) == sample_of(1000, 100, 0).tolist()
    assert one.tolist() != sample_of(1000, 100, 1).tolist() and 400 < one.mean() < 600


def test_a_scale_does_not_outlive_its_model(folders, tmp_path):
    origin = folders("full")
    for name, options in {"all": [], "lora": ["--use_peft", "--merge_adapter"]}.items():
        folder = tmp_path / name
        reset_accelerate()
        train_rm.main([
            "dataset_name=toy", *SMALL, "--max_steps=1", f"--output_dir={folder}", f"--model_name_or_path={origin}",
            "--num_normalization_samples=0", *options,
        ])  # fmt: skip
        assert not [key for key in json.loads((folder / "config.json").read_text()) if key.startswith("reward_")]
        assert json.loads((folder / "results.json").read_text())["normalization"] is None
        with pytest.raises(InputError, match="has no reward_mean and positive reward_std in its config.json"):
            load_scorer(str(folder), normalize=True)


def test_a_resumed_run_has_the_same_scale(train):
    options = ["--save_steps=2", "--num_normalization_samples=30"]
    _, whole = train("whole", *options)
    _, again = train("again", *options)
    shutil.rmtree(again / "checkpoints" / "step-4")
    (again / "results.json").unlink()
    train("again", *options, "--resume_from_checkpoint=latest")
    assert_same_bits(whole, again)
    assert (whole / "config.json").read_bytes() == (again / "config.json").read_bytes()
    scale = json.loads((whole / "results.json").read_text())["normalization"]
    assert scale["reward_answers"] == 60
    assert scale == json.loads((again / "results.json").read_text())["normalization"]
