"""The training data, perhaps a weighted mixture of several sets, and the evaluation sets. Tokens are not copied."""

import logging
import os
import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rm.config.errors import InputError
from rm.data.audit import fingerprint, is_in_train
from rm.data.cache import tokenize_source
from rm.data.dataset import PreferenceData, arrays_of, concatenate, flat
from rm.data.formats import COLUMN_OPTIONS
from rm.data.load import BUILDERS, Source, load_source

logger = logging.getLogger(__name__)


def load_data(tokenizer: Any, config: Any) -> tuple[PreferenceData, PreferenceData]:
    """(training data, evaluation data) of a config's data options.

    The evaluation data are a random `eval_fraction` of each train split, or `dataset_test_split` of each
    `eval_dataset_name` (or its only split), or of each `dataset_name`. On several processes call it inside
    `accelerator.local_main_process_first()`: the first process works, the others read its cache. Raises `InputError`.
    """
    test = _sources(config, "test", accept_only_split=config.eval_dataset_name is not None)
    mixture = load_train_data(tokenizer, config, test)
    as_conversation = all(part.encoding.kind == "conversation" for part in mixture.sets.values())
    evaluation = concatenate(_tokenize(test, "test", tokenizer, config, as_conversation))
    if config.text_as_conversation is None and any(p.encoding.text_as_conversation for p in evaluation.sets.values()):
        logger.info("evaluation data of text is made conversations too; text_as_conversation=false keeps it text")
    _count_in_train(mixture, evaluation)
    return mixture, evaluation


def load_train_data(tokenizer: Any, config: Any, test: Collection[str] = ()) -> PreferenceData:
    """The training data alone; `test` are the names of the evaluation sets. Raises `InputError`."""
    train = _sources(config, "train")
    names = dict.fromkeys([*train, *test])
    for option in COLUMN_OPTIONS:
        columns = getattr(config, option)
        if isinstance(columns, dict) and (unknown := columns.keys() - names):
            raise InputError(f"{option}: there is no data set {min(unknown)!r}; there are {', '.join(names)}")
    return _mix(_tokenize(train, "train", tokenizer, config, False), config)


def load_evaluation_data(tokenizer: Any, config: Any, text_as_conversation: bool) -> PreferenceData:
    """The evaluation data alone, for a saved model. A data set's only split is always used. Raises `InputError`."""
    return concatenate(_tokenize(_sources(config, "test", True), "test", tokenizer, config, text_as_conversation))


def _sources(config: Any, part: str, accept_only_split: bool = False) -> dict[str, Source]:
    """The rows of each set for the part "train" or "test"."""
    named = name_sets("dataset_name", config.dataset_name, config.dataset_config)
    if part == "test" and config.eval_dataset_name is not None:
        named = name_sets("eval_dataset_name", config.eval_dataset_name, config.eval_dataset_config)
    is_held_out = config.eval_fraction is not None
    split = config.dataset_train_split if part == "train" or is_held_out else config.dataset_test_split
    max_samples = config.max_train_samples if part == "train" else config.max_eval_samples
    first = None if is_held_out or config.group_by_prompt else max_samples  # else `_select` takes the first prompts
    options = {"split": split, "seed": config.seed, "max_samples": first, "accept_only_split": accept_only_split}
    return {n: load_source(place, dataset_config=name, **options) for n, (place, name) in named.items()}


def _tokenize(sources: dict[str, Source], part: str, tokenizer: Any, config: Any, as_conversation: bool) -> dict:
    """{name: `PreferenceData`} of each set; the option `text_as_conversation` overrides `as_conversation`."""
    if config.text_as_conversation is not None:
        as_conversation = config.text_as_conversation
    parts, by_set = {}, {o: value for o in COLUMN_OPTIONS if isinstance(value := getattr(config, o), dict)}
    for name, source in sources.items():
        own = replace(config, **{option: value.get(name) for option, value in by_set.items()})
        select = partial(_select, part=part, config=config, name=source.name)
        parts[name] = tokenize_source(source, name, tokenizer, own, as_conversation, select)
    return parts


def _select(table: Dataset, part: str, config: Any, name: str) -> Dataset:
    """The prompts of the part "train" or "test": without those that are held out for the other one, the first ones.

    Prompts are held out whole: a random `eval_fraction` of the different prompts, with all their rows.
    """
    rows, fraction = np.arange(len(table)), config.eval_fraction
    if fraction is not None:
        prompt = flat(table, "prompt")
        prompts = pd.unique(prompt)  # in the order of the data
        num_test = max(1, round(fraction * len(prompts)))
        if num_test >= len(prompts):
            raise InputError(f"{name}: eval_fraction={fraction} of {len(prompts)} prompts leaves none to train on")
        order = np.random.default_rng(config.seed).permutation(len(prompts))
        rows = np.flatnonzero(np.isin(prompt, prompts[order[:num_test]]) == (part == "test"))
    max_samples = config.max_train_samples if part == "train" else config.max_eval_samples
    return table.select(rows[: max_samples or len(rows)])


def _mix(parts: dict[str, PreferenceData], config: Any) -> PreferenceData:
    """The mixture of an epoch: the prompts drawn from each set by its weight, set after set; the step plan shuffles it.

    Raises:
        InputError: nothing is drawn from a set.
    """
    whole, weights = concatenate(parts), config.dataset_weights or [1.0] * len(parts)
    if weights == [1.0]:
        return whole
    rows, sets, start = [], {}, 0
    for number, ((name, info), weight) in enumerate(zip(whole.sets.items(), weights, strict=True)):
        drawn = draw(info.size, weight, [config.seed, number])
        if not len(drawn):
            raise InputError(f"{info.source.name}: dataset_weights={weight:g} draws none of {info.size} pairs")
        rows.append(start + drawn)
        sets[name] = replace(info, size=len(drawn), audit=info.audit | {"weight": weight, "drawn": len(drawn)})
        start += info.size
    audit = whole.audit | {"drawn": sum(map(len, rows))} | ({"weight": weights[0]} if len(parts) == 1 else {})
    whole = replace(whole, sets=sets, audit=audit)
    if all(weight == 1 for weight in weights):
        return whole
    dataset = whole.dataset.select(np.concatenate(rows))
    return replace(whole, dataset=dataset, fingerprint=fingerprint(arrays_of(dataset)))


def draw(num_prompts: int, weight: float, seed: list[int]) -> np.ndarray:
    """The indices of the prompts in an epoch, sorted, int64; the same in every epoch.

    `weight` is how often each prompt is drawn on average. Its whole part repeats all prompts; its fraction draws a
    random share of them once. 1: each prompt once; 0.5: half of them; 1.5: each once, and half of them a second time.
    """
    whole, fraction = divmod(weight, 1)
    share = np.random.default_rng([*seed, 0]).permutation(num_prompts)[: round(fraction * num_prompts)]
    return np.sort(np.concatenate([np.tile(np.arange(num_prompts), int(whole)), share]))


def _count_in_train(train: PreferenceData, test: PreferenceData) -> None:
    """Count `in_train` of every evaluation set, and warn."""
    found = is_in_train(arrays_of(train.dataset), arrays_of(test.dataset))
    prompts = pd.Series(flat(test.dataset, "prompt")).isin(flat(train.dataset, "prompt"))
    counts = found.groupby(test.set_names[test.comparisons["index"]]).sum()
    prompt_counts = prompts.groupby(test.set_names).sum()
    for name, part in test.sets.items():
        part.audit["in_train"] = count = int(counts[name])
        part.audit["prompt_in_train"] = int(prompt_counts[name])
        if count:
            seen = f"{count} of the {part.audit['kept']} test pairs are in the train set too"
            logger.warning("%s: %s; their accuracy says nothing about new data", part.source.name, seen)
    test.audit.update(in_train=int(found.sum()), prompt_in_train=int(prompts.sum()))


# ---------------------------------------------------------------- names
def name_sets(
    option: str, given: str | list[str] | dict[str, str], configs: str | list[str | None] | None = None
) -> dict[str, tuple[str, str | None]]:
    """{name of the set: (data set, configuration)} of the option `option`.

    A dict gives the names. Otherwise a name is the file's without extension, or the last part of the hub name, and the
    configuration if there is one; where two are equal, all get a folder (or the owner) in front. Raises `InputError`.
    """
    places = [given] if isinstance(given, str) else list(given.values() if isinstance(given, dict) else given)
    configs = configs if isinstance(configs, list) else [configs] * len(places)
    names = list(given) if isinstance(given, dict) else _short_names(option, places, configs)
    for name in names if len(names) > 1 else ():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"{option}: {name!r} is not a name for a set; use letters, digits and . _ + -")
    return dict(zip(names, zip(places, configs, strict=True), strict=True))


def _short_names(option: str, places: list[str], configs: list[str | None]) -> list[str]:
    """The shortest ends of the data sets' paths that distinguish them."""
    paths = []
    for place, config in zip(places, configs, strict=True):
        path = os.path.abspath(os.path.expanduser(place)) if os.path.exists(place) else place
        *folders, last = Path(path).parts or "."
        last = last.removesuffix(".gz")
        last = next((last.removesuffix(end) for end in BUILDERS if last.endswith(end)), last)
        paths.append([*folders, last if config is None else f"{last}-{config}"])
    for depth in range(1, max(map(len, paths)) + 1):
        names = [re.sub(r"[^\w.+-]+", "_", "-".join(path[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    twice = next(place for place in places if places.count(place) > 1)
    raise InputError(f"{option}: {twice} is given twice; give it once (dataset_weights can repeat its rows)")
