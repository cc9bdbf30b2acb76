"""One or several data sets as one: a weighted mixture to train on, named sets to evaluate on. Tokens are not copied."""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from rm.config.errors import InputError
from rm.data.audit import count_in_train, fingerprint, pooled_counts
from rm.data.formats import detect_format
from rm.data.load import BUILDERS, Source, load_raw
from rm.data.render import FROM_TEXT
from rm.data.rows import HASH_COLUMNS, Pairs, arrays_of, tokenize_pairs
from rm.evaluate.metrics import metric_names

logger = logging.getLogger(__name__)

OPTIONAL_COLUMNS = ("subset", "true_margin")  # of `Pairs.dataset`; a set may have them or not


@dataclass(frozen=True)
class PairSets:
    """One data set, or several as one: set after set, each with the pairs that were drawn from it.

    `dataset` has the columns of `Pairs.dataset`, of several sets without `subset` and `true_margin`; its rows
    `ends[k - 1]` to `ends[k]` are those of set k. `audit`: the counts of all sets together (`max_tokens`: the largest).
    """

    sets: dict[str, Pairs]
    dataset: Dataset
    ends: np.ndarray
    audit: dict[str, int | float]
    fingerprint: str

    @property
    def are_several(self) -> bool:
        return len(self.sets) > 1

    def rows(self) -> dict[str, slice]:
        """The rows of `dataset` that are each set's."""
        return {name: slice(end - n, end) for name, end, n in zip(self.sets, self.ends, self._sizes(), strict=True)}

    def set_of(self, i: int) -> str:
        """The name of the set that row `i` of `dataset` is from."""
        return list(self.sets)[int(np.searchsorted(self.ends, i, side="right"))]

    def ids(self, indices) -> list[str]:
        """The ids of these rows, "SET/ID" where there are several sets."""
        ids = self.dataset.select(indices)["id"][:]
        if not self.are_several:
            return ids
        return [f"{self.set_of(i)}/{name}" for i, name in zip(indices, ids, strict=True)]

    def texts(self, i: int) -> dict[str, str]:
        """Row `i` for a person, see `Pairs.texts`."""
        return self.sets[self.set_of(i)].texts_of(self.dataset[i])

    def first_of_each(self, count: int) -> np.ndarray:
        """The rows of the first `count` pairs of each set; -1: of all pairs."""
        sizes = self._sizes()
        counts = sizes if count == -1 else np.minimum(sizes, count)
        return np.concatenate(
            [np.arange(end - n, end - n + k) for end, n, k in zip(self.ends, sizes, counts, strict=True)]
        )

    def _sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)


def load_pairs(
    tokenizer: Any,
    *,
    dataset_name: str | list[str],
    dataset_weights: list[float] | None = None,
    dataset_config: str | list[str | None] | None = None,
    dataset_train_split: str = "train",
    dataset_test_split: str = "test",
    eval_dataset_name: str | list[str] | dict[str, str] | None = None,
    eval_dataset_config: str | list[str | None] | None = None,
    eval_fraction: float | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    only_evaluation: bool = False,
    text_as_conversation: bool | None = None,
    trained_on_conversations: bool = False,
    **options: Any,
) -> tuple[PairSets | None, PairSets]:
    """The train and the test pairs; `options` are those of `tokenize_pairs`.

    The test pairs are a random `eval_fraction` of each train split, or else `dataset_test_split` of each
    `eval_dataset_name` (or its only split), or of each `dataset_name`. With `only_evaluation` there are no train pairs
    (None), and a data set's only split is always taken. On several processes call it inside
    `accelerator.main_process_first()`: the first one works, the others read its cache. Raises `InputError`.

    Args:
        dataset_name, eval_dataset_name: one data set, several, or (for evaluation) names of our own for them.
        dataset_weights: passes over each train set in an epoch, see `draw`. None: 1.
        dataset_config, eval_dataset_config: a configuration for each of them, or None.
        max_train_samples, max_eval_samples: use the first N pairs of each data set.
        text_as_conversation: see `tokenize_pairs`. None: no for train pairs, and for test pairs if all train pairs are
            conversations; without train pairs, if the model was `trained_on_conversations`.
    """

    def read(named: dict, split: str, max_samples: int | None = None, only_split: bool = False) -> dict[str, Source]:
        where = {"split": split, "max_samples": max_samples, "seed": seed, "accept_only_split": only_split}
        return {name: load_raw(data, dataset_config=config, **where) for name, (data, config) in named.items()}

    named, train = name_sets("dataset_name", dataset_name, dataset_config), {}
    named_test = named
    if eval_dataset_name is not None:
        named_test = name_sets("eval_dataset_name", eval_dataset_name, eval_dataset_config)
    if eval_fraction is not None:
        halves = {name: _hold_out(s, eval_fraction, seed) for name, s in read(named, dataset_train_split).items()}
        train = {name: rest.first(max_train_samples) for name, (rest, _) in halves.items() if not only_evaluation}
        test = {name: held_out.first(max_eval_samples) for name, (_, held_out) in halves.items()}
    else:
        if not only_evaluation:
            train = read(named, dataset_train_split, max_train_samples)
        only_split = only_evaluation or eval_dataset_name is not None
        test = read(named_test, dataset_test_split, max_eval_samples, only_split)
    for source in (*train.values(), *test.values()) if text_as_conversation else ():
        if detect_format(source)[0] == "text_implicit_prompt":
            fix = "give the prompts in a column of their own, or set text_as_conversation to false"
            raise InputError(f"{source.name}: text without a column 'prompt' cannot be made a conversation; {fix}")
    options["text_as_conversation"] = bool(text_as_conversation)
    train = {name: tokenize_pairs(source, tokenizer, **options) for name, source in train.items()}
    mixture = mix(train, dataset_weights or [1.0] * len(train), seed) if train else None
    if text_as_conversation is None:
        are_conversations = all(pairs.format.startswith("conversation") for pairs in train.values())
        options["text_as_conversation"] = are_conversations if train else trained_on_conversations
    test = as_one({name: tokenize_pairs(source, tokenizer, **options) for name, source in test.items()})
    if text_as_conversation is None and train and any(pairs.format == FROM_TEXT for pairs in test.sets.values()):
        fix = "text_as_conversation=false leaves them text"
        logger.info("evaluation data of text were made conversations, as the training data are; %s", fix)
    if mixture is not None:
        _count_in_train(mixture, test)
    return mixture, test


def mix(sets: dict[str, Pairs], weights: list[float], seed: int) -> PairSets:
    """The mixture of an epoch: what is drawn from each set by its weight, set after set; the step plan shuffles it.

    Its fingerprint is of what was drawn, in order. Raises `InputError` for a set from which nothing is drawn.
    """
    whole, start, drawn = as_one(sets), 0, []
    for number, (pairs, weight) in enumerate(zip(sets.values(), weights, strict=True)):
        rows = draw(len(pairs.dataset), weight, [seed, number])
        if not len(rows):
            raise InputError(f"{pairs.source}: dataset_weights={weight:g} draws none of {len(pairs.dataset)} pairs")
        if len(sets) > 1 or weight != 1:
            pairs.audit.update(weight=weight, drawn=len(rows))
        drawn.append(start + rows)
        start += len(pairs.dataset)
    if all(weight == 1 for weight in weights):
        dataset = whole.dataset
    else:
        dataset = whole.dataset.select(np.concatenate(drawn))
    audit = whole.audit | ({"drawn": len(dataset)} if whole.are_several else {})
    digest = fingerprint(arrays_of(dataset, (*HASH_COLUMNS, "margin")))
    return PairSets(sets, dataset, np.cumsum([len(rows) for rows in drawn]), audit, digest)


def draw(num_pairs: int, weight: float, seed: list[int]) -> np.ndarray:
    """Which of `num_pairs` pairs an epoch holds: all, as many times as `weight` has whole ones, and of its fraction a
    random share, the same in every epoch; sorted, int64. 1: each once; 0.5: half of them; 1.5: once, and half again."""
    whole, fraction = divmod(weight, 1)
    share = np.random.default_rng([*seed, 0]).permutation(num_pairs)[: round(fraction * num_pairs)]
    return np.sort(np.concatenate([np.tile(np.arange(num_pairs), int(whole)), share]))


def as_one(sets: dict[str, Pairs]) -> PairSets:
    """All pairs of the sets, set after set. The fingerprint of several is of their names too, as metrics bear them."""
    parts = [pairs.dataset for pairs in sets.values()]
    ends = np.cumsum([len(part) for part in parts])
    if len(parts) == 1:
        (pairs,) = sets.values()
        return PairSets(sets, pairs.dataset, ends, pairs.audit, pairs.fingerprint)
    columns = [name for name in parts[0].column_names if name not in OPTIONAL_COLUMNS]
    dataset = datasets.concatenate_datasets([part.select_columns(columns) for part in parts])
    audit = pooled_counts([pairs.audit for pairs in sets.values()], arrays_of(dataset, HASH_COLUMNS))
    names = json.dumps([[name, pairs.fingerprint] for name, pairs in sets.items()])
    return PairSets(sets, dataset, ends, audit, hashlib.sha256(names.encode()).hexdigest())


def _count_in_train(train: PairSets, test: PairSets) -> None:
    """Count `in_train` of every test set against all that is trained on, and warn."""
    known = arrays_of(train.dataset, HASH_COLUMNS)
    for pairs in test.sets.values():
        pairs.audit["in_train"] = count_in_train(known, arrays_of(pairs.dataset, HASH_COLUMNS))
        if pairs.audit["in_train"]:
            logger.warning(
                "%s: %d of the %d test pairs are in the train set too; their accuracy says nothing about new data",
                *(pairs.source, pairs.audit["in_train"], pairs.audit["kept"]),
            )
    test.audit["in_train"] = sum(pairs.audit["in_train"] for pairs in test.sets.values())


def _hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """(rest, random `fraction`) of the rows, each in the order of the data set, which reads faster from disk."""
    num_rows = len(source.dataset)
    num_test = max(1, round(fraction * num_rows))
    if num_test >= num_rows:
        raise InputError(f"{source.name}: eval_fraction={fraction} of {num_rows} rows leaves none to train on")
    order = np.random.default_rng(seed).permutation(num_rows)
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return source.select(train), source.select(test)


# ---------------------------------------------------------------- names


def name_sets(
    key: str, given: str | list[str] | dict[str, str], configs: str | list[str | None] | None = None
) -> dict[str, tuple[str, str | None]]:
    """{name of the set: (data set, configuration)} of the option `key`.

    A dict gives the names. Else a name is the file's without extension, or the last part of the hub name, and the
    configuration if there is one; where two are equal, all get a folder (or the owner) in front. Raises `InputError`.
    """
    places = [given] if isinstance(given, str) else list(given.values() if isinstance(given, dict) else given)
    configs = configs if isinstance(configs, list) else [configs] * len(places)
    names = list(given) if isinstance(given, dict) else _short_names(key, places, configs)
    metrics = metric_names()
    for name in names if len(names) > 1 else ():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"{key}: {name!r} is no name for a set; use letters, digits and . _ + -")
        if f"eval/{name}" in metrics:
            fix = "give another name, in a dict" if key == "eval_dataset_name" else "rename the file or folder"
            raise InputError(f"{key}: a set cannot be named {name!r}, which is a metric; {fix}")
    return dict(zip(names, zip(places, configs, strict=True), strict=True))


def _short_names(key: str, places: list[str], configs: list[str | None]) -> list[str]:
    """The shortest ends of the data sets' paths that tell them apart."""
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
    fix = "use dataset_weights to have it more often" if key == "dataset_name" else "give it once"
    raise InputError(f"{key}: {twice} is given twice; {fix}")
