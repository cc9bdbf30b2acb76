"""The layouts of preference data: the columns that identify each one, and a function from a raw row to an `Example`.

A new layout is one function and one entry of `DATA_LAYOUTS`; docs/data.md lists them. `rm.data.formats` finds the
layout of a data set, and the column of the prompt where a layout does not say it.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS, Column
from rm.data.example import SIDES, Encoding, Example, RowError, expect, number_of, numbers_of, stored_ids, turns_of
from rm.data.prompt import Row, example_of, field_of, value_of

TWO = ("a", "b")
STRENGTH = Column(0.0, low=-3, high=3)  # of a preference; not 1 to 5, say, where 3 would be no preference
LABELS = ("comparisons", "scores", "ranks")  # of groups
TOKEN_COLUMNS = {  # ids of chosen and rejected -> their attention masks
    ("input_ids_chosen", "input_ids_rejected"): ("attention_mask_chosen", "attention_mask_rejected"),
    ("chosen_ids", "rejected_ids"): ("chosen_mask", "rejected_mask"),
    ("chosen_input_ids", "rejected_input_ids"): ("chosen_attention_mask", "rejected_attention_mask"),
}


@dataclass(frozen=True)
class DataLayout:
    """Data whose `columns` all exist are read by `read`: a function of a raw row and the `Encoding`. Raises `RowError`.

    columns: {role: data column}, with a dot for a nested field ("answers.text": of each entry). The options
    `prompt_column`, ... name another data column for a role. optional: roles that need not exist.
    `read` finds the columns in `encoding.roles`. Without comparisons the first of two answers is the chosen one.
    """

    columns: dict[str, str]
    read: Callable[[Row, Encoding], Example]
    optional: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- pairs and groups
def prefer(example: Example, better: int | None, encoding: Encoding) -> Example:
    """The example of two answers of which number `better` is better; None: a tie."""
    return compare(example, [float(better == n) for n in range(2)], encoding)


def read_pair(row: Row, encoding: Encoding) -> Example:
    values = {encoding.roles[side]: value_of(row, side, encoding) for side in SIDES}
    lists = [value if type(value) is list else [value] for value in values.values()]
    if list not in map(type, values.values()) or not all(v and all(type(x) is str for x in v) for v in lists):
        return example_of(row, values, encoding)
    texts = {f"{name}[{i}]": text for name, v in zip(values, lists, strict=True) for i, text in enumerate(v)}
    example, right = example_of(row, texts, encoding), range(len(lists[0]))  # each is compared with each wrong one
    example.comparisons = list(itertools.product(right, range(len(right), len(example.answers))))
    return example


def read_tokens(row: Row, encoding: Encoding, names: Sequence[str], masks: Sequence[str]) -> Example:
    ids = []
    for name, mask in zip(names, masks, strict=True):
        mask_values = (row[mask] or []) if mask in row else None
        ids.append(stored_ids(row[name], mask_values, name, encoding.vocab_size))
    return Example("tokens", None, ids, names)


def read_group(row: Row, encoding: Encoding) -> Example:
    name, values = encoding.roles["responses"], value_of(row, "responses", encoding)
    expect(values, (list,), repr(name), "a list of answers")
    answers = {f"{name}[{n}]": answer for n, answer in enumerate(values)}
    return add_comparisons(row, example_of(row, answers, encoding), encoding)


def read_token_group(row: Row, encoding: Encoding) -> Example:
    ids, masks = row["input_ids"], row.get("attention_mask")
    expect(ids, (list,), "'input_ids'", "a list of token ids for each answer")
    if masks is not None and (type(masks) is not list or len(masks) != len(ids)):
        raise RowError(f"'attention_mask' needs a list for each of the {len(ids)} answers in 'input_ids'")
    names = [f"input_ids[{n}]" for n in range(len(ids))]
    named = zip(ids, masks or [None] * len(ids), names, strict=True)
    answers = [stored_ids(*one, encoding.vocab_size) for one in named]
    return add_comparisons(row, Example("tokens", None, answers, names), encoding)


def add_comparisons(row: Row, example: Example, encoding: Encoding) -> Example:
    """The example of a group with its scores, and with the given comparisons or all between different scores."""
    num_answers, roles = len(example.answers), encoding.roles
    for name, column in ANSWER_COLUMNS.items():
        if (values := value_of(row, f"{name}s", encoding)) is not None:
            example.columns[name] = numbers_of(values, roles[f"{name}s"], column, num_answers)
    ranks, given = value_of(row, "ranks", encoding), value_of(row, "comparisons", encoding)
    if not roles.keys() & set(LABELS):  # the best answer first
        example.columns["score"] = [-float(n) for n in range(num_answers)]
    if ranks is not None and "score" not in example.columns:
        ranks = numbers_of(ranks, roles["ranks"], ANSWER_COLUMNS["score"], num_answers)
        example.columns["score"] = [-rank for rank in ranks]
    if given is not None:
        return _read_comparisons(given, example)
    if "score" not in example.columns:
        raise RowError("'scores' is missing (null), expected a list of a number for each answer")
    return compare(example, example.columns["score"], encoding)


def compare(example: Example, score: Sequence[float], encoding: Encoding) -> Example:
    """The example with all comparisons between different scores; equal ones are ties, or are counted."""
    example.comparisons, is_tie = [], []
    for pair in itertools.combinations(range(len(example.answers)), 2):
        if score[pair[0]] != score[pair[1]] or encoding.equal_scores == "tie":
            example.comparisons.append(pair if score[pair[0]] >= score[pair[1]] else pair[::-1])
            is_tie.append(score[pair[0]] == score[pair[1]])
        else:
            example.num_tied += 1
    if any(is_tie):
        example.columns["p_chosen"] = [0.5 if tie else 1.0 for tie in is_tie]
    return example


def _read_comparisons(comparisons: Any, example: Example) -> Example:
    """The example with comparisons in the form [chosen, rejected] or {"chosen", "rejected", comparison columns}."""
    expect(comparisons, (list,), "'comparisons'", "a list")
    given, num_answers = [], len(example.answers)
    for c, compared in enumerate(comparisons):
        expect(compared, (list, dict), f"comparisons[{c}]", "[chosen, rejected] or an object with these keys")
        given.append(compared if type(compared) is dict else dict(zip(SIDES, compared, strict=False)))
        sides = [given[c].get(side) for side in SIDES]
        if sides[0] == sides[1] or not all(type(n) is int and 0 <= n < num_answers for n in sides):
            problem = f"chosen {sides[0]}, rejected {sides[1]}"
            raise RowError(f"comparisons[{c}] has {problem}; give two different answers, from 0 to {num_answers - 1}")
    example.comparisons = [(one["chosen"], one["rejected"]) for one in given]
    for name, column in COMPARISON_COLUMNS.items():
        values = [one.get(name) for one in given]
        if any(value is not None for value in values):
            example.columns[name] = [
                column.default if value is None else number_of(value, f"comparisons[{c}][{name}]", column)
                for c, value in enumerate(values)
            ]
    return example


# ---------------------------------------------------------------- layouts of public data sets
def read_two(row: Row, encoding: Encoding, better: Mapping[Any, int | None] | None) -> Example:
    """Two answers; `better` says for a value of the preference which one is better, None: a tie.

    Without `better` the preference is a strength: negative: the first one is better. It may be a margin or a weight.
    Without a preference their scores decide.
    """
    roles, value = encoding.roles, value_of(row, "preference", encoding)
    example = example_of(row, {roles[role]: value_of(row, role, encoding) for role in TWO}, encoding)
    if len(scores := [roles[role] for role in ("score_a", "score_b") if role in roles]) == 2:
        example.columns["score"] = [number_of(field_of(row, c), c, ANSWER_COLUMNS["score"]) for c in scores]
    if "preference" not in roles:
        return compare(example, example.columns["score"], encoding)
    name, is_strength = roles["preference"], better is None
    if better is None:
        value = number_of(value, name, STRENGTH)
        better = {value: int(value > 0) if value else None}
    if type(value) in (list, dict) or value not in better:
        raise RowError(f"{name!r} is {json.dumps(value, default=str)}, expected one of {', '.join(map(repr, better))}")
    prefer(example, better[value], encoding)
    for column in (column for column, data_column in encoding.numbers.items() if is_strength and data_column == name):
        example.columns[column] = [abs(value)] * len(example.comparisons)
    return example


def read_summaries(row: Row, encoding: Encoding) -> Example:
    """OpenAI's summaries of posts, or of articles."""
    info, texts = row["info"], value_of(row, "responses", encoding)
    post = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info.get('post')}"
    prompt = f"{info.get('article') or post}\n\nTL;DR:"
    if len(texts) != 2 or row["choice"] not in (0, 1):
        raise RowError(f"'choice' is {row['choice']} of {len(texts)} summaries, expected 0 or 1 of two")
    answers = {f"summaries[{n}]": text for n, text in enumerate(texts)}
    return prefer(example_of(row, answers, encoding, prompt), row["choice"], encoding)


def read_turns(row: Row, encoding: Encoding) -> Example:
    """LMSYS: the user's turns and those of each answer are JSON lists in text."""
    texts = {name: value_of(row, name, encoding) for name in ("turns", *TWO)}
    for name, value in texts.items():
        try:
            texts[name] = [text or "" for text in json.loads(value)]
        except (ValueError, TypeError):
            raise RowError(f"{encoding.roles[name]!r} is not a JSON list of texts") from None
    answers, later = {}, texts["turns"][1:]
    for name in TWO:
        mixed = itertools.chain(*itertools.zip_longest(texts[name], later))
        answers[encoding.roles[name]] = turns_of([text for text in mixed if text is not None], "assistant")
    wins = [bool(value_of(row, role, encoding)) for role in ("preference", "wins_b")]
    example = example_of(row, answers, encoding, turns_of(texts["turns"][:1]))
    return prefer(example, None if wins[0] == wins[1] else int(wins[1]), encoding)


def read_last_message(row: Row, encoding: Encoding) -> Example:
    """ms-swift: the last message is the chosen answer."""
    messages = value_of(row, "messages", encoding)
    expect(messages, (list,), "'messages'", "a list of messages")
    answers = {"messages": messages[-1:], encoding.roles["rejected"]: value_of(row, "rejected", encoding)}
    return example_of(row, answers, encoding, messages[:-1])


def two(better: Mapping[Any, int | None] | None, votes: Sequence[str] = (), **columns: str) -> DataLayout:
    optional = dict(zip(("score_a", "score_b"), votes, strict=False))
    return DataLayout(columns, partial(read_two, better=better), optional)


def group(**columns: str) -> DataLayout:
    return DataLayout(columns, read_group, NUMBERS if "responses" in columns.values() else {})


NUMBERS = {name: name for name in ("scores", "ranks", *(f"{name}s" for name in ANSWER_COLUMNS))}
MASKED = {"masks": "attention_mask"} | NUMBERS  # of groups of token ids
WINNER = {"model_a": 0, "model_b": 1} | dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "bothbad"))
PAIRS = {"pair": SIDES, "pair_response": ("chosen_response", "rejected_response")}
PAIRS |= {"response_pair": ("response_chosen", "response_rejected"), "stack_pair": ("response_j", "response_k")}
PAIRS |= {"swift_messages": ("messages", "rejected_messages"), "preferred": ("preferred", "dispreferred")}
PAIRS |= {"swift_response": ("response", "rejected_response")}

DATA_LAYOUTS = {  # name -> layout; of those that read the same columns of answers the first one is used
    **{name: DataLayout(dict(zip(SIDES, sides, strict=True)), read_pair) for name, sides in PAIRS.items()},
    **{
        ids[0]: DataLayout(
            dict(zip(SIDES, ids, strict=True)), partial(read_tokens, names=ids, masks=masks), {m: m for m in masks}
        )
        for ids, masks in TOKEN_COLUMNS.items()
    },
    **{f"group_{n}": group(responses="responses", **{n: n}) for n in LABELS},
    **{f"token_{n}": DataLayout({"input_ids": "input_ids", n: n}, read_token_group, MASKED) for n in LABELS},
    "swift": DataLayout({"messages": "messages", "rejected": "rejected_response"}, read_last_message),
    "ultrafeedback": group(prompt="instruction", responses="completions.response", scores="completions.overall_score"),
    "generations": group(responses="generations", scores="ratings"),
    "nectar": group(prompt="prompt", responses="answers.answer", ranks="answers.rank"),
    "stack_exchange": group(prompt="question", responses="answers.text", scores="answers.pm_score"),
    "nemo": group(prompt="context", responses="completions.completion", ranks="completions.rank"),
    "ranked_output": group(responses="output"),
    "helpsteer2": two(None, prompt="prompt", a="response_1", b="response_2", preference="preference_strength"),
    "helpsteer3": two(None, prompt="context", a="response1", b="response2", preference="overall_preference"),
    "shp": two(
        {1: 0, 0: 1}, ("score_A", "score_B"), prompt="history", a="human_ref_A", b="human_ref_B", preference="labels"
    ),
    "pku_saferlhf": two({0: 0, 1: 1}, prompt="prompt", a="response_0", b="response_1", preference="better_response_id"),
    "alpaca_farm": two({1: 0, 2: 1}, prompt="instruction", a="output_1", b="output_2", preference="preference"),
    "arena": two(WINNER, a="conversation_a", b="conversation_b", preference="winner"),
    "lmsys": DataLayout(
        dict(turns="prompt", a="response_a", b="response_b", preference="winner_model_a", wins_b="winner_model_b"),
        read_turns,
    ),
    "webgpt": two(None, prompt="question.full_text", a="answer_0", b="answer_1", score_a="score_0", score_b="score_1"),
    "summaries": DataLayout({"info": "info", "responses": "summaries.text", "preference": "choice"}, read_summaries),
}
