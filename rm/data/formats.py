"""Which of the formats in `rm/rows.py` a data set has, by its columns and their types; and what that format needs."""

import logging
from typing import Any

import datasets
from datasets import LargeList, List, Value

from rm.config.errors import InputError
from rm.data.load import Source
from rm.data.render import SIDES, Recipe, describe

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = (  # ids and attention mask of a side
    ("input_ids_{}", "attention_mask_{}"),
    ("{}_ids", "{}_mask"),
    ("{}_input_ids", "{}_attention_mask"),
)


def detect_format(source: Source) -> tuple[str, dict[str, str]]:
    """The name of the format, and the columns that it reads (what it is -> column), by the columns' types."""
    features = source.dataset.features
    for ids, mask in TOKEN_COLUMNS:
        columns = {side: ids.format(side) for side in SIDES}
        if all(column in features for column in columns.values()):
            masks = {f"mask_{side}": mask.format(side) for side in SIDES if mask.format(side) in features}
            for column in (columns | masks).values():
                _check_integers(source, column)
            return "tokenized", columns | masks
    if not all(side in features for side in SIDES):
        raise InputError(
            f"{source.name}: needs the columns 'chosen' and 'rejected' (text or messages), or 'input_ids_chosen' and "
            f"'input_ids_rejected'; its columns are {', '.join(features)}"
        )
    kinds = {column: _kind(source, column) for column in ("prompt", *SIDES) if column in features}
    if kinds["chosen"] != kinds["rejected"]:
        how = f"'chosen' is {kinds['chosen']} and 'rejected' is {kinds['rejected']}; they must be alike"
        raise InputError(f"{source.row_name(0)}: {how}")
    family = "text" if kinds["chosen"] == "text" else "conversation"
    columns = {column: column for column in kinds}
    if "prompt" not in kinds or (kinds["prompt"], family) == ("text", "conversation"):
        return f"{family}_implicit_prompt", columns  # a prompt of text beside conversations repeats their start
    if kinds["prompt"] != kinds["chosen"]:
        fix = 'write the answers as [{"role": "assistant", "content": ...}]'
        raise InputError(f"{source.row_name(0)}: 'prompt' is messages and 'chosen' is text; {fix}")
    return f"{family}_explicit_prompt", columns


def _kind(source: Source, column: str) -> str:
    """Is it "text" or "messages"? By the type of the column; where rows differ (type Json), by the first row."""
    feature = source.dataset.features[column]
    if feature in (Value("string"), Value("large_string")):
        return "text"
    if isinstance(feature, List | LargeList):
        item = feature.feature
        if isinstance(item, dict | datasets.Json) or item == Value("null"):  # null: all lists are empty
            return "messages"
    if isinstance(feature, datasets.Json) or feature == Value("null"):
        first = source.dataset[0][column]
        if type(first) in (str, list):
            return "text" if type(first) is str else "messages"
        raise InputError(f"{source.row_name(0)}: {column!r} is {describe(first)}, expected text or messages")
    alone = "; several answers a prompt are for python -m rm.evaluate, one such data set at a time"
    fix = alone if isinstance(feature, List) else ""
    raise InputError(f"{source.row_name(0)}: {column!r} has the type {feature}, expected text or messages{fix}")


def _check_integers(source: Source, column: str) -> None:
    """Raise `InputError`, naming the first wrong row, unless the column's type is a list of integers."""
    feature = source.dataset.features[column]
    if isinstance(feature, List | LargeList) and "int" in getattr(feature.feature, "dtype", ""):
        return
    rows = enumerate(source.dataset[column])
    bad = next((row for row, ids in rows if type(ids) is not list or any(type(i) is not int for i in ids)), 0)
    raise InputError(f"{source.row_name(bad)}: {column!r} is not a list of integers")


def number_columns(source: Source, margin_from_scores: bool) -> tuple[str, ...]:
    """The columns of numbers that are read: margin or the two scores, and true_margin; those that are there."""
    features, scores = source.dataset.features, tuple(f"score_{side}" for side in SIDES)
    if margin_from_scores and "margin" in features:
        raise InputError(f"{source.name}: has a column 'margin'; set margin_from_scores to false, or remove the column")
    if margin_from_scores and not all(column in features for column in scores):
        missing = next(column for column in scores if column not in features)
        raise InputError(f"{source.name}: there is no column {missing!r}; set margin_from_scores to false, or add it")
    margin = scores if margin_from_scores else ("margin",)
    return tuple(column for column in (*margin, "true_margin") if column in features)


def check_tokenizer(source: Source, tokenizer: Any, recipe: Recipe) -> None:
    """Raise `InputError` if the tokenizer lacks what the format needs; warn of a chat template that writes the date."""
    if recipe.format.startswith("text") and recipe.add_eos and tokenizer.eos_token_id is None:
        raise InputError(f"{source.name}: the tokenizer has no EOS token to append to text; set add_eos to false")
    if recipe.format.startswith("conversation"):
        if not tokenizer.chat_template:
            fix = "set chat_template_path, or give the data as text"
            raise InputError(f"{source.name}: conversations need a chat template, the tokenizer has none; {fix}")
        has_date = "strftime_now" in str(tokenizer.chat_template)
        if has_date and not any("date" in key for key in recipe.chat_template_kwargs):
            logger.warning(
                "the chat template may write today's date into the prompt, and rewards would change from day to day; "
                'fix it, for most templates with chat_template_kwargs: {"date_string": "26 Jul 2024"}'
            )
