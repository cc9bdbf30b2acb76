"""The embedded preference data: small dialogues whose true reward is known.

Two answers to one prompt are drawn independently from a grammar, and the label from the Bradley-Terry model of their
true rewards: P(a is better) = sigmoid(reward(a) - reward(b)). The labels are noisy on purpose, so that the best
possible accuracy is known: E[max(p, 1 - p)], about 0.85 here.

A group has four answers to a prompt: ranked by the Plackett-Luce model of their true rewards (`plackett_luce`), or each
two of them compared by the Bradley-Terry model (`bradley_terry`). `configs/tiny_llama` has a tokenizer of the grammar.
"""

import hashlib
import itertools
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from datasets import Dataset

GRAMMAR = yaml.safe_load(Path(__file__).with_name("toy.yaml").read_text(encoding="utf-8"))
STEP_BRIEF, STEP_DETAILED = -0.8125, 1.8125  # for every step after the first, by what the prompt asked for
SUBSETS = ("brief", "detailed", "system", "multi_turn")
LABELS, NUM_ANSWERS = ("plackett_luce", "bradley_terry"), 4  # of groups


def true_reward(prompt_messages: list[dict], answer_text: str) -> float:
    """The reward (log-odds) of an answer, from the texts alone."""
    reward = sum(weight * answer_text.count(phrase) for phrase, weight in GRAMMAR["phrase_reward"].items())
    asked = " ".join(message["content"] for message in prompt_messages if message["role"] != "assistant")
    step_reward = any(style in asked for style in GRAMMAR["brief"]) * STEP_BRIEF
    step_reward += any(style in asked for style in GRAMMAR["detailed"]) * STEP_DETAILED
    return reward + step_reward * sum(answer_text.count(joint) for joint in GRAMMAR["joints"])


def _draw_prompt(rng: random.Random) -> tuple[str, list[dict], str]:
    """One prompt: its subset, its messages, and the task that the answers are about."""
    task = _pick(rng, list(GRAMMAR["tasks"]))
    question = _pick(rng, GRAMMAR["questions"]).format(task=task)
    subset = _pick(rng, SUBSETS)
    wants_brief = subset == "brief" or (subset != "detailed" and rng.random() < 0.5)
    style = _pick(rng, GRAMMAR["brief"] if wants_brief else GRAMMAR["detailed"])
    request = _pick(rng, GRAMMAR["system_requests"] if subset == "system" else GRAMMAR["requests"]).format(style=style)
    opening = _pick(rng, GRAMMAR["user_greetings"]), _pick(rng, GRAMMAR["background"])
    if subset == "system":
        messages = [_message("system", request), _message("user", *opening, question)]
    elif subset == "multi_turn":
        earlier = _pick(rng, [name for name in GRAMMAR["tasks"] if name != task])
        messages = [
            _message("user", *opening, _pick(rng, GRAMMAR["questions"]).format(task=earlier)),
            _message("assistant", _sentence(rng, _draw_steps(rng, earlier, _pick(rng, (1, 2))))),
            _message("user", _pick(rng, GRAMMAR["follow_ups"]), question, request),
        ]
    else:
        request_first = rng.random() < 0.5
        messages = [_message("user", *opening, *((request, question) if request_first else (question, request)))]
    return subset, messages, task


def _draw_answer(rng: random.Random, task: str) -> str:
    greeting, opening, closing = (_pick(rng, GRAMMAR[name]) for name in ("answer_greetings", "openings", "closings"))
    if rng.random() < 0.1:
        return _join(greeting, opening, GRAMMAR["refusal"], closing)
    steps = _draw_steps(rng, task, _pick(rng, (1, 2, 3)))
    repetition = f"{GRAMMAR['repetition']} {steps[-1]}." if rng.random() < 0.2 else ""
    return _join(greeting, opening, _pick(rng, GRAMMAR["hedges"]), _sentence(rng, steps), repetition, closing)


def _draw_steps(rng: random.Random, task: str, num_steps: int) -> list[str]:
    remaining = list(GRAMMAR["tasks"][task])
    return [remaining.pop(int(rng.random() * len(remaining))) for _ in range(num_steps)]


def _sentence(rng: random.Random, steps: list[str]) -> str:
    return steps[0] + "".join(_pick(rng, GRAMMAR["joints"]) + step for step in steps[1:]) + "."


def _pick(rng: random.Random, options: Sequence):
    return options[int(rng.random() * len(options))]  # faster than rng.choice, and the same in every Python


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _message(role: str, *parts: str) -> dict:
    return {"role": role, "content": _join(*parts)}


def _draw_rows(split: str, num_rows: int, seed: int, labels: str | None = None) -> Iterator[dict]:
    """Pairs, or groups with `labels`. The last message decides the split: no prompt is in both, whatever the seed."""
    rng = random.Random(f"{seed}/{split}" + (f"/{labels}" if labels else ""))
    for index in range(num_rows):
        subset, prompt, task = _draw_prompt(rng)
        while zlib.crc32(prompt[-1]["content"].encode()) % 2 != (split == "test"):
            subset, prompt, task = _draw_prompt(rng)
        answers: list[str] = []
        while len(answers) < (NUM_ANSWERS if labels else 2):
            answer = _draw_answer(rng, task)
            answers += [answer] if answer not in answers else []
        rewards = [true_reward(prompt, answer) for answer in answers]
        pairs, ranks = list(itertools.combinations(range(len(answers)), 2)), {}
        if labels == "plackett_luce":  # the order of reward + Gumbel noise
            noisy = [reward - math.log(-math.log(rng.random())) for reward in rewards]
            ranks = {"ranks": [1 + sum(other > mine for other in noisy) for mine in noisy]}
            is_first = [noisy[a] > noisy[b] for a, b in pairs]
        else:  # Bradley-Terry
            is_first = [rng.random() < 1 / (1 + math.exp(rewards[b] - rewards[a])) for a, b in pairs]
        compared = [pair if wins else pair[::-1] for pair, wins in zip(pairs, is_first, strict=True)]
        comparisons = [{"chosen": a, "rejected": b, "true_margin": rewards[a] - rewards[b]} for a, b in compared]
        messages = [[_message("assistant", answer)] for answer in answers]
        row = {"id": f"{split}-{index}", "subset": subset, "prompt": prompt}
        if labels:
            yield row | {"responses": messages, "comparisons": comparisons} | ranks
        else:
            chosen, rejected, margin = comparisons[0].values()
            row |= {"chosen": messages[chosen], "rejected": messages[rejected]}
            yield row | {"score_chosen": rewards[chosen], "score_rejected": rewards[rejected], "true_margin": margin}


def toy_dataset(split: str, num_rows: int, seed: int = 0, labels: str | None = None) -> Dataset:
    """`num_rows` preference pairs of `split` ("train" or "test"), or groups with labels of one of the models `LABELS`.

    A pure function of the arguments. The first N are the same whatever `num_rows`; the two splits have no prompt in
    common. Scores and `true_margin` (chosen minus rejected) are in log-odds. The rows are drawn once into the cache of
    `datasets`.
    """
    arguments = {"split": split, "num_rows": num_rows, "seed": seed} | ({"labels": labels} if labels else {})
    key = hashlib.sha256(f"{Path(__file__).read_bytes()}{GRAMMAR}{arguments}".encode()).hexdigest()[:32]
    return Dataset.from_generator(_draw_rows, gen_kwargs=arguments, split=split, fingerprint=key)
