"""The format of a data set: its layout, the column of each role, and the options that decide its tokens.

The layout is found from the names of the columns; options such as `prompt_column` win over that. Layout and types give
the format, which is in the log and in data_report.json; docs/data.md lists layouts and optional columns.
"""

import itertools
import logging
import shlex
from dataclasses import replace
from typing import Any

from rm.config.errors import InputError
from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS, columns_to_read
from rm.data.example import SIDES, Encoding, Example, RowError, describe, label_of, number_of, template_variables
from rm.data.layouts import DATA_LAYOUTS, LABELS, read_pair
from rm.data.load import Source
from rm.data.prompt import INSTRUCTION, PROMPTS, Row, field_of, find_prompt, is_text, text_columns
from rm.data.tokenize import is_rendered

logger = logging.getLogger(__name__)

SAMPLE = 50  # first rows, which show whether the prompt is missing or repeated
ROLES = ("prompt", "system", "chosen", "rejected", "responses", "scores", "ranks", "preference")  # options: ROLE_column
COLUMN_OPTIONS = [f"{role}_column" for role in ROLES] + [c.option for c in COMPARISON_COLUMNS.values() if c.option]
IMAGES = ("image", "images", "video", "videos", "audio", "audios")
NO_COLUMN = "there is no such column; there are"
NO_IMAGES = "images, audio or video: only text is read; docs/data.md shows how to leave out such rows"
OTHERS = ("id", "subset", "tools", "chat_template_kwargs", *IMAGES)  # columns that every layout may have
ONE_ANSWER = {"completion", "response", "output", "answer", "messages"}  # with a label of its own
ONE_LABEL = {"label", "score", "rating", "reward", "helpfulness"}
SAME_NAME = "add_eos margin_from_scores equal_scores group_by_prompt max_answers max_length overlength".split()
ORDER_WORDS = ("rank", "order")  # in names of columns
WORDS = {
    "chosen": ("chosen", "prefer", "better", "good", "win", "accept", "positive", "pos_"),
    "rejected": ("reject", "dispref", "worse", "bad", "los", "negative", "neg_"),
}


# ---------------------------------------------------------------- layout
def find_layout(source: str, row: Row, config: Any) -> tuple[str, dict[str, str]]:
    """(layout, {role: data column}) of the data set `source`, by its first row and the mapping options.

    Raises:
        InputError: data of another kind, no layout, or several.
    """
    given = {role: column for role in ROLES if (column := getattr(config, f"{role}_column"))}
    is_sorted = config.ranks_column == ""  # the best answer is the first
    if any(row.get(name) for name in IMAGES):
        raise InputError(f"{source}: {NO_IMAGES}")
    found: list[tuple[int, str, dict[str, str]]] = []  # (columns that differ from the known ones, layout, roles)
    for name, layout in DATA_LAYOUTS.items():
        roles = dict(layout.columns)
        for role in given.keys() & (layout.columns | layout.optional).keys():
            nested = f"{layout.columns.get(role, '').rpartition('.')[0]}.{given[role]}"  # beside the known one
            roles[role] = nested if has_field(row, nested) else given[role]
        fits = given.keys() - {"prompt", "system"} <= roles.keys() and all(has_field(row, c) for c in roles.values())
        if name == "ranked_output":
            numbers = [c for c, v in row.items() if type(v) is list and {*map(type, v)} & {bool, int, float}]
            fits = fits and (is_sorted or "responses" not in given and type(row["output"]) is list and not numbers)
        if fits and (not is_sorted or name == "ranked_output"):
            found.append((sum(layout.columns.get(role) != c for role, c in roles.items()), name, roles))
    if not found:
        raise InputError(f"{source}: {_unknown_layout(row, given)}")
    matches = {}  # by the columns of the answers
    for changes, name, roles in found:
        if changes == min(found)[0]:
            answers = [column for role, column in roles.items() if role not in (*LABELS, "prompt", "preference")]
            matches.setdefault(str(answers), (name, roles))
    if len(matches) > 1:
        options = [[f"{r}_column={c}" for r, c in roles.items() if r in ROLES[2:]] for _, roles in matches.values()]
        fix = " or ".join(" ".join(choice) for choice in options if choice)
        names = ", ".join(name for name, _ in matches.values())
        raise InputError(f"{source}: the columns match several layouts ({names}); set {fix}")
    name, roles = next(iter(matches.values()))
    system = next((c for c in ("system", "system_prompt") if c in row and c not in roles.values()), None)
    more = {r: c for r, c in DATA_LAYOUTS[name].optional.items() if c in row} | ({"system": system} if system else {})
    roles = more | roles | {role: given[role] for role in ("prompt", "system") if role in given}
    for role in given:
        if not has_field(row, roles[role]):
            raise InputError(f"{source}: {role}_column={roles[role]}: {NO_COLUMN} {', '.join(sorted(row))}")
    if config.prompt_column == "":
        roles.pop("prompt", None)
    return name, roles


def has_field(row: Row, path: str) -> bool:
    try:
        field_of(row, path)
    except RowError:
        return False
    return True


def _unknown_layout(row: Row, given: dict[str, str]) -> str:
    """Why the layout is unknown and how to fix it: the columns with their types, and options that map them."""
    if any(is_text(row[c]) for c in row.keys() & ONE_ANSWER) and row.keys() & ONE_LABEL and not given:
        return "unpaired labels (KTO): each row has one answer; docs/data.md shows how to make pairs of them"
    talk = row.get("conversations") or row.get("messages")
    last = talk[-1] if type(talk) is list and type(talk[-1]) is dict else {}
    if last.get("content", last.get("value")) in ("A", "B", "[[A]]", "[[B]]"):
        return "judge prompts: both answers are in one prompt; docs/data.md shows how to separate them"
    for role, column in given.items():
        if not any(has_field(row, name) for name in (column, *(f"{top}.{column}" for top in row))):
            return f"{role}_column={column}: {NO_COLUMN} {', '.join(sorted(row))}"
    texts = text_columns(row)
    lists = {c: value[0] for c, value in row.items() if type(value) is list and value and c not in texts}
    lists |= {f"{c}.{name}": value for c, v in lists.items() if type(v) is dict for name, value in v.items()}
    scores = [c for c, v in lists.items() if type(v) in (int, float) and not any(w in c.lower() for w in ORDER_WORDS)]
    answers = max((c for c, v in lists.items() if is_text(v)), key=lambda c: len(str(lists[c])), default="")
    others = {*row, *lists} - {"id", answers, answers.partition(".")[0], *texts}  # which may say how good answers are
    sides = {side: [c for c in texts if any(word in c.lower() for word in WORDS[side])] for side in SIDES}
    guess = {side: columns[0] for side, columns in sides.items() if columns}
    if len(guess) < 2 and answers:
        guess = {"responses": answers} | ({"scores": scores[0]} if scores else {} if others else {"ranks": ""})
    texts = [column for column in texts if column not in guess.values()]
    if texts:
        guess["prompt"] = next((column for column in PROMPTS if column in texts), texts[0])
    options = shlex.join(f"{role}_column={column}" for role, column in guess.items())
    fix = f"map them with options, perhaps {options}" + " if the best answer is the first" * ("ranks" in guess)
    if len(guess.keys() - {"prompt"}) < 2:
        fix = "docs/data.md has the layouts, the mapping options, and recipes for other data"
    types = {c: "messages" if is_text(v) and type(v) is not str else describe(v) for c, v in row.items()}
    columns = ", ".join(f"{column} ({kind})" for column, kind in types.items())
    return f"unknown layout; its columns are {columns}; {fix}"


def detect_format(source: Source, config: Any, tokenizer: Any, text_as_conversation: bool) -> Encoding:
    """The format of a data set by its columns and its first rows, and the options that decide its tokens.

    Raises:
        InputError: unknown columns, options that do not fit the data, or a wrong first row.
    """
    try:
        first = source.dataset.with_format(None)[0]
    except UnicodeDecodeError as error:
        raise InputError(f"{source.row_name(0)}: {error}") from None
    layout, roles = find_layout(source.name, first, config)
    pairs = {name: [f"{name}_{side}" for side in SIDES] for name in ANSWER_COLUMNS}
    encoding = Encoding(
        data_layout=layout,
        roles=roles,
        numbers=columns_to_read(first, config, source.name),
        answer_numbers={name: columns for name, columns in pairs.items() if first.keys() >= set(columns)},
        chat_template_kwargs=config.chat_template_kwargs or {},
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        **{name: getattr(config, name) for name in SAME_NAME},
    )
    roles = {role: column for role, column in encoding.roles.items() if role != "system"}  # which is no prompt
    rows, examples = read_sample(source, replace(encoding, roles=roles))
    if "prompt" not in roles and config.prompt_column is None and examples[0].kind != "tokens":
        used = {*encoding.roles.values(), *encoding.numbers.values(), *OTHERS}
        encoding.roles.update(find_prompt(source.name, rows, examples, used))
    if prompt := encoding.roles.get("prompt"):
        more = INSTRUCTION if prompt == "instruction" else ["history"] * (type(first.get("history", "")) is not str)
        encoding.roles.update({name: name for name in more if name in first and name not in encoding.roles.values()})
    rows, examples = read_sample(source, encoding)
    if examples[0].kind == "text":
        _, others = read_sample(source, replace(encoding, repeats_prompt=True))
        differ = [one.answers != other.answers for one, other in zip(examples, others, strict=True)]
        encoding = replace(encoding, repeats_prompt=sum(differ) > len(differ) / 2)
    _log_columns(source.name, first, encoding)
    example = examples[0]
    is_pair = example.comparisons is None
    if not is_pair:
        encoding = replace(encoding, answer_numbers={})
    has_scores = "score" in {*example.columns, *encoding.answer_numbers}
    if config.margin_from_scores and (not has_scores or "margin" in encoding.numbers):
        needs = "needs the columns score_chosen and score_rejected (or scores), and no column of margins"
        raise InputError(f"{source.name}: margin_from_scores {needs}; there are {', '.join(sorted(first))}")
    if config.group_by_prompt and is_pair and example.kind == "tokens":
        fix = "give groups: input_ids as a list for each answer, with comparisons"
        raise InputError(f"{source.name}: group_by_prompt: token ids do not tell where the prompt ends; {fix}")
    of_pair = "lists" if not is_pair else "implicit_prompt" if example.prompt is None else "explicit_prompt"
    name = of_pair if DATA_LAYOUTS[layout].read is read_pair else layout
    encoding = replace(encoding, format="tokenized" if example.kind == "tokens" else f"{example.kind}_{name}")
    if example.kind == "text" and example.prompt is not None and not is_rendered(example.prompt, tokenizer):
        if text_as_conversation:
            encoding = replace(encoding, format="conversation_from_text", text_as_conversation=True)
        elif tokenizer.chat_template and config.text_as_conversation is None:
            logger.info("%s stays text; text_as_conversation=true would apply the chat template to it", source.name)
    elif text_as_conversation and example.kind == "text" and example.prompt is not None:
        logger.info("%s stays text: its prompts are rendered already", source.name)
    if config.text_as_conversation and encoding.format == "text_implicit_prompt":
        fix = "give the prompts in a column of their own, or set text_as_conversation to false"
        raise InputError(f"{source.name}: text without a column 'prompt' cannot be made a conversation; {fix}")
    has_date = encoding.kind == "conversation" and "strftime_now" in str(tokenizer.chat_template)
    if has_date and not any("date" in key for key in encoding.chat_template_kwargs):
        fix = 'set the date, for most templates with chat_template_kwargs: {"date_string": "26 Jul 2024"}'
        logger.warning("the chat template may write today's date into the prompt, which changes rewards daily; %s", fix)
    return encoding


def read_sample(source: Source, encoding: Encoding) -> tuple[list[Row], list[Example]]:
    """The first rows and their examples, without wrong rows but the first. Raises `InputError` for the first one."""
    dataset, rows, examples = source.dataset.with_format(None), [], []
    for i in range(min(SAMPLE, len(dataset))):
        try:
            examples.append(DATA_LAYOUTS[encoding.data_layout].read(row := dataset[i], encoding))
            rows.append(row)
        except (RowError, UnicodeDecodeError) as error:
            if i == 0:
                raise InputError(f"{source.row_name(0)}: {error}") from None
    return rows, examples


def _log_columns(name: str, row: Row, encoding: Encoding) -> None:
    """Log what the columns are (level DEBUG if all have known names), and the text that is not read."""
    roles = encoding.roles | encoding.numbers
    level = logging.DEBUG if all(role == column for role, column in roles.items()) else logging.INFO
    columns = ", ".join(f"{column} is {role}" for role, column in roles.items())
    columns += "; the first answer is the best" * ("responses" in roles and not roles.keys() & set(LABELS))
    logger.log(level, "%s: layout %s: %s", name, encoding.data_layout, columns)
    used = {*roles.values(), *OTHERS}
    unread = text_columns(row, used)
    for parent in dict.fromkeys(column.rpartition(".")[0] for column in used if "." in column and column not in row):
        if type(entries := field_of(row, parent)) is list and entries:  # of the fields of their entries
            unread += [c for key, v in entries[0].items() if is_text(v) and (c := f"{parent}.{key}") not in used]
    if unread := [c for c in unread if not any(column.startswith(f"{c}.") for column in used)]:
        logger.info("%s: text that is not read: %s", name, ", ".join(unread))
    used |= {*unread, *itertools.chain(*encoding.answer_numbers.values())}
    others = [c for c in row if not any(f"{column}.".startswith(f"{c}.") for column in used)]
    logger.debug("%s: other columns that are not read: %s", name, ", ".join(others) or "none")


# ---------------------------------------------------------------- one row
def read_row(row: dict[str, Any], encoding: Encoding) -> Example:
    """The example in a raw row. Raises `RowError`."""
    example = DATA_LAYOUTS[encoding.data_layout].read(row, encoding)
    if any(row.get(name) for name in IMAGES):
        raise RowError(NO_IMAGES)
    if example.kind != encoding.kind:
        what = f"{example.kind}, expected {encoding.kind}, as in the other rows"
        raise RowError(f"{example.names[0]!r} is {what}; text_as_conversation=true makes text a conversation")
    if example.kind == "conversation":
        example.variables = template_variables(row, encoding.chat_template_kwargs)
    example.comparisons = [(0, 1)] if example.comparisons is None else list(example.comparisons)
    add_numbers(row, example, encoding)
    example.id, example.subset = label_of(row, "id"), label_of(row, "subset")
    return example


def add_numbers(row: dict[str, Any], example: Example, encoding: Encoding) -> None:
    """Read the numeric columns; a comparison with p_chosen below 0.5 is swapped. Raises `RowError`."""
    for name, column in encoding.numbers.items():
        if name not in example.columns:  # given for each comparison
            value = number_of(field_of(row, column), column, COMPARISON_COLUMNS[name])
            example.columns[name] = [value] * len(example.comparisons)
    for name, columns in encoding.answer_numbers.items():
        column = ANSWER_COLUMNS[name]
        example.columns[name] = [column.default if row[c] is None else number_of(row[c], c, column) for c in columns]
    if encoding.margin_from_scores:
        score = example.columns["score"]
        for column in encoding.answer_numbers.get("score", ()):  # may not be null
            number_of(row[column], column, ANSWER_COLUMNS["score"])
        example.columns["margin"] = [score[chosen] - score[rejected] for chosen, rejected in example.comparisons]
    for c, p_chosen in enumerate(example.columns.get("p_chosen", ())):
        if p_chosen < 0.5:
            example.comparisons[c] = example.comparisons[c][::-1]
            example.columns["p_chosen"][c] = 1 - p_chosen
            for name in example.columns.keys() & COMPARISON_COLUMNS.keys():
                if COMPARISON_COLUMNS[name].is_signed:
                    example.columns[name][c] *= -1
