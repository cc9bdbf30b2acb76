"""The training data, perhaps a weighted mixture of several sets, and the evaluation sets. Tokens are not copied."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from rm.config.errors import InputError
from rm.data.audit import count_in_train, pooled_counts
from rm.data.cache import tokenize_source
from rm.data.dataset import PreferenceData, arrays_of, concatenate
from rm.data.formats import detect_format
from rm.data.load import BUILDERS, Source, load_source

logger = logging.getLogger(__name__)


def load_data(tokenizer: Any, config: Any) -> tuple[PreferenceData, PreferenceData]:
    """(training data, evaluation data) of a config's data options.

    The evaluation data are a random `eval_fraction` of each train split, or `dataset_test_split` of each
    `eval_dataset_name` (or its only split), or of each `dataset_name`. On several processes call it inside
    `accelerator.local_main_process_first()`: the first process works, the others read its cache. Raises `InputError`.
    """
    named = name_sets("dataset_name", config.dataset_name, config.dataset_config)
    if config.eval_fraction is not None:
        halves = {name: _hold_out(source, config) for name, source in _read(named, config.dataset_train_split, config)}
        train = {name: rest.first(config.max_train_samples) for name, (rest, _) in halves.items()}
        test = {name: held_out.first(config.max_eval_samples) for name, (_, held_out) in halves.items()}
    else:
        train = dict(_read(named, config.dataset_train_split, config, config.max_train_samples))
        test = _evaluation_sources(config, only_split=config.eval_dataset_name is not None)
    parts = _tokenize(train, tokenizer, config, bool(config.text_as_conversation))
    mixture = _mix(parts, config)
    as_conversation = config.text_as_conversation
    if as_conversation is None:
        as_conversation = all(p.sets[name].encoding.kind == "conversation" for name, p in parts.items())
    evaluation = _as_one(_tokenize(test, tokenizer, config, as_conversation))
    if config.text_as_conversation is None and any(p.encoding.text_as_conversation for p in evaluation.sets.values()):
        fix = "text_as_conversation=false keeps it text"
        logger.info("evaluation data of text is made conversations, as the training data is; %s", fix)
    _count_in_train(mixture, evaluation)
    return mixture, evaluation


def load_evaluation_data(tokenizer: Any, config: Any, text_as_conversation: bool) -> PreferenceData:
    """The evaluation data alone, for a saved model. A data set's only split is always used. Raises `InputError`."""
    if config.eval_fraction is not None:
        named = name_sets("dataset_name", config.dataset_name, config.dataset_config)
        read = _read(named, config.dataset_train_split, config)
        sources = {name: _hold_out(source, config)[1].first(config.max_eval_samples) for name, source in read}
    else:
        sources = _evaluation_sources(config, only_split=True)
    if config.text_as_conversation is not None:
        text_as_conversation = config.text_as_conversation
    return _as_one(_tokenize(sources, tokenizer, config, text_as_conversation))


def _read(named: dict, split: str, config: Any, max_samples: int | None = None, only_split: bool = False):
    """(name, source) of each set."""
    for name, (place, dataset_config) in named.items():
        options = {"split": split, "max_samples": max_samples, "seed": config.seed, "accept_only_split": only_split}
        yield name, load_source(place, dataset_config=dataset_config, **options)


def _evaluation_sources(config: Any, only_split: bool) -> dict[str, Source]:
    named = name_sets("dataset_name", config.dataset_name, config.dataset_config)
    if config.eval_dataset_name is not None:
        named = name_sets("eval_dataset_name", config.eval_dataset_name, config.eval_dataset_config)
    return dict(_read(named, config.dataset_test_split, config, config.max_eval_samples, only_split))


def _tokenize(sources: dict[str, Source], tokenizer: Any, config: Any, text_as_conversation: bool) -> dict:
    parts = {}
    for name, source in sources.items():
        encoding = detect_format(source, config, tokenizer, text_as_conversation)
        if config.text_as_conversation and encoding.format == "text_implicit_prompt":
            fix = "give the prompts in a column of their own, or set text_as_conversation to false"
            raise InputError(f"{source.name}: text without a column 'prompt' cannot be made a conversation; {fix}")
        parts[name] = tokenize_source(source, name, tokenizer, encoding, config.dataset_num_proc)
    return parts


def _as_one(parts: dict[str, PreferenceData]) -> PreferenceData:
    """All prompts of the sets, set after set."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    whole = concatenate(parts, {})
    audits = [part.audit for part in parts.values()]
    return concatenate(parts, pooled_counts(audits, arrays_of(whole.dataset)))


def _mix(parts: dict[str, PreferenceData], config: Any) -> PreferenceData:
    """The mixture of an epoch: the prompts drawn from each set by its weight, set after set; the step plan shuffles it.

    Raises:
        InputError: nothing is drawn from a set.
    """
    weights = config.dataset_weights or [1.0] * len(parts)
    whole, rows = _as_one(parts), []
    for number, (part, weight) in enumerate(zip(parts.values(), weights, strict=True)):
        rows.append(draw(len(part), weight, [config.seed, number]))
        ((_, info),) = part.sets.items()
        if not len(rows[-1]):
            raise InputError(f"{info.source.name}: dataset_weights={weight:g} draws none of {len(part)} pairs")
        if len(parts) > 1 or weight != 1:
            info.audit.update(weight=weight, drawn=len(rows[-1]))
    drawn = sum(map(len, rows))
    audit = whole.audit | ({"drawn": drawn} if len(parts) > 1 else {})
    return concatenate(parts, audit, None if all(weight == 1 for weight in weights) else rows)


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
    known, total, start = arrays_of(train.dataset), 0, 0
    for part in test.sets.values():
        rows = test.dataset.select(range(start, start + part.size)) if test.are_several else test.dataset
        part.audit["in_train"] = count = count_in_train(known, arrays_of(rows))
        total, start = total + count, start + part.size
        if count:
            logger.warning(
                "%s: %d of the %d test pairs are in the train set too; their accuracy says nothing about new data",
                *(part.source.name, count, part.audit["kept"]),
            )
    test.audit["in_train"] = total


def _hold_out(source: Source, config: Any) -> tuple[Source, Source]:
    """(rest, random `eval_fraction`) of the rows, each in the order of the data set, which reads faster from disk."""
    num_rows, fraction = len(source.dataset), config.eval_fraction
    num_test = max(1, round(fraction * num_rows))
    if num_test >= num_rows:
        raise InputError(f"{source.name}: eval_fraction={fraction} of {num_rows} rows leaves none to train on")
    order = np.random.default_rng(config.seed).permutation(num_rows)
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return source.select(train), source.select(test)


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
        *folders, last = Path(os.path.abspath(Path(place).expanduser()) if Path(place).exists() else place).parts or "."
        last = last.removesuffix(".gz")
        last = next((last.removesuffix(end) for end in BUILDERS if last.endswith(end)), last)
        paths.append([*folders, last if config is None else f"{last}-{config}"])
    for depth in range(1, max(map(len, paths)) + 1):
        names = [re.sub(r"[^\w.+-]+", "_", "-".join(path[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    twice = next(place for place in places if places.count(place) > 1)
    fix = "use dataset_weights to train on it more often" if option == "dataset_name" else "give it once"
    raise InputError(f"{option}: {twice} is given twice; {fix}")
