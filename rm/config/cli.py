"""The command lines of all programs, and YAML files: default < YAML < command line."""

import difflib
import errno
import inspect
import itertools
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from rm.config.errors import InputError
from rm.config.options import TINY_LLAMA, RewardConfig
from rm.config.redact import safe_line
from rm.config.section import Section, choices, fields_of, kinds, option

OPTIONS = fields_of(RewardConfig)
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
WRONG_FILE = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
OTHER_NAMES = Path(__file__).with_name("trl_names.yaml")


class Training(Section):
    """usage: accelerate launch train_rm.py [--config FILE.yaml ...] [--key=value | --key value | key=value ...]

    Train a reward model. Precedence: default < --config files < command line. Without arguments: the quickstart.
    """

    config: list[str] = option([], "YAML file with options; may be repeated, the last file wins")


def parse_config(argv: list[str]) -> RewardConfig:
    """The configuration of a training; without --config, model and data set that of the quickstart.

    Raises `InputError`; `--help` prints the options and exits.
    """
    program, given = parse(argv, Training, accepts=OPTIONS)
    if not program.config and not {"model_name_or_path", "dataset_name"} & given.keys():
        given = read_yaml(QUICKSTART) | given
    return make_config(given)


def open_streams() -> None:
    """Discard what is written to closed standard streams: the next file would get their number, and their output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def answer_early(argv: list[str]) -> None:
    """Exit if `argv` asks for help or is wrong: for the top of train_rm.py, before seconds of imports."""
    open_streams()
    try:
        parse_config(argv)
    except InputError as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or error.exit_code)


def run_program(main: Callable[[list[str]], Any]) -> None:
    """Call `main` with the command line, and log to stderr. Exit codes: 2 wrong input, 1 another error of a file."""
    import transformers  # slow, and not needed by `answer_early`

    open_streams()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of weights that load in no time
    try:
        main(sys.argv[1:])
        return
    except InputError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        message = f"{error.filename or 'the output'} cannot be used ({error.strerror or error})"
        code = 2 if error.errno in WRONG_FILE else 1
    sys.exit(print(safe_line(f"error: {message}"), file=sys.stderr) or code)


def parse(argv: list[str], program: type, accepts: Collection[str] = (), positional: str = "") -> tuple[Any, dict]:
    """The options of a program itself, and the given options of `RewardConfig` with those of its `--config` files.

    Forms: `--k=v`, `--k v`, `k=v`, `--flag`, `--list a b`. `program` is a section whose docstring starts the help page,
    `accepts` the options of `RewardConfig` that have an effect in it, `positional` its option for words without a name.
    Raises `InputError`; `--help` prints the help page and exits.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(program, accepts))
        raise SystemExit(0)
    known, rest, values = OPTIONS | fields_of(program), list(argv), defaultdict(list)

    def is_option(word: str) -> bool:
        return word.startswith("--") or "=" in word and word.partition("=")[0].replace("-", "_") in known

    while rest:
        word = rest.pop(0)
        if positional and not is_option(word):
            values[positional].append(word)
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not equals and not word.startswith("--"):
            raise InputError(f"command line: '{word}' is not an option; write --key=value or key=value")
        _check_name(name, "command line", [*fields_of(program), *accepts])
        is_flag, is_list = list(kinds(known[name])) == [bool], list in kinds(known[name]) and name != "config"
        words = list(itertools.takewhile(lambda word: not is_option(word), rest))[: None if is_list else 1]
        taken = [text] if equals else [word for word in words if not is_flag or word.lower() in ("true", "false")]
        del rest[: 0 if equals else len(taken)]
        if not taken and not is_flag:
            raise InputError(f"command line: --{name} needs a value")
        if name in values and name not in ("config", positional):
            raise InputError(f"command line: {name} is given twice")
        values[name] += taken or [True]
    options = {k: v if len(v) > 1 or k in ("config", positional) else v[0] for k, v in values.items()}
    given: dict[str, Any] = {}
    for path in options.get("config", []):
        given |= read_yaml(path)
    own = program(**{name: options.pop(name) for name in fields_of(program) if name in options})
    return own, given | options


def make_config(given: dict[str, Any]) -> RewardConfig:
    """The configuration from all given options. Raises `InputError`."""
    for one, other in (("dataset_name", "model_name_or_path"), ("model_name_or_path", "dataset_name")):
        if given.get(one, OPTIONS[one].default) != OPTIONS[one].default and other not in given:
            raise InputError(f"{other} is needed, since {one} is given (its default: {OPTIONS[other].default})")
    if given.get("model_name_or_path", TINY_LLAMA) == TINY_LLAMA and not Path(TINY_LLAMA).exists():
        given = given | {"model_name_or_path": str(QUICKSTART.parent / "tiny_llama")}  # started from another folder
    return RewardConfig(**given)


def _check_name(name: str, where: str | Path, allowed: Collection[str]) -> None:
    """Raise `InputError` for an unknown option, with the one that is meant: by meaning, then by spelling."""
    if name in allowed:
        return
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    fix = f"unknown key '{name}'; " + (f"did you mean {near[0]}?" if near else "see --help for all options")
    if name in OPTIONS:
        fix = f"{name} has no effect in this program; see --help"
    for trainer, answers in yaml.safe_load(OTHER_NAMES.read_text(encoding="utf-8")).items():
        for names, answer in answers.items():
            if name in names.split():
                fix = f"'{name}' is the name in {trainer}; here: {answer.replace('`', '')}"
    raise InputError(f"{where}: {fix}")


class _Loader(yaml.SafeLoader):
    """Rejects repeated keys (PyYAML keeps the last) and aliases (their expansion can be exponential)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError(f"line {self.peek_event().start_mark.line + 1}: write the value instead of an alias")
        node, seen = super().compose_node(parent, index), set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                raise InputError(f"line {key.start_mark.line + 1}: key '{key.value}' is given twice")
            seen.add(str(key.value))
        return node


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `InputError`, also for repeated keys and aliases."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, TypeError, RecursionError) as error:  # TypeError: a key that is a list
        raise InputError(" ".join(str(error).split())) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file. Raises `InputError` with its path."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError("is not a regular file")  # a pipe can be read only once
        values = load_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    for name in values:
        _check_name(str(name), path, OPTIONS)
    return values


def help_text(program: type[Section], accepts: Collection[str]) -> str:
    """The options that have an effect in a program, by section, one line each."""
    lines = [inspect.cleandoc(program.__doc__)]
    for part in (program, *reversed(RewardConfig.__mro__)):
        names = [name for name in vars(part).get("__annotations__", {}) if part is program or name in accepts]
        lines += ["", part.__doc__ if part is not program else "Program"] if names else []
        for name in names:
            field = fields_of(part)[name]
            shown = "none" if field.default in (None, []) else json.dumps(field.default, default=lambda required: "...")
            values = f" [{', '.join(choices(field))}]" if choices(field) else ""
            lines.append(f"  --{name}={shown.strip(chr(34))}  {field.description}{values}")
    return "\n".join(lines)
