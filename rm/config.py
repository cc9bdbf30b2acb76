"""`RewardConfig`: every option of a run, its YAML files and its command line (default < YAML < command line)."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

TINY_LLAMA = "configs/tiny_llama"
QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]


class ConfigError(ValueError):
    """A wrong key or value given by the user; the message is one line and names the place and the fix."""


def option(default: Any, help: str, section: str | None = None) -> Any:
    """A dataclass field with its `--help` line; `section` opens a new section of the help page."""
    metadata = {"help": help, "section": section}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RewardConfig:
    """Flat, inputs only. Names are TRL's and transformers' wherever the meaning is the same."""

    # fmt: off
    model_name_or_path: str = option(TINY_LLAMA, "hub name or folder; a folder without weights is initialised from its config", "Model")
    model_revision: str = option("main", "branch, tag or commit on the hub")
    trust_remote_code: bool = option(False, "run code that comes with the model or tokenizer")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "type of the stored weights (the head and the loss are always float32)")
    attn_implementation: str | None = option(None, "sdpa, eager, flex_attention, flash_attention_2, ...; none: transformers' choice (on a CPU: sdpa_by_tree)")
    disable_dropout: bool = option(True, "set every dropout of the base model to 0 (lora_dropout is its own option)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third more time")
    chat_template_path: str | None = option(None, "Jinja file, or folder of a tokenizer, whose chat template is used; none: the tokenizer's own")

    use_peft: bool = option(False, "train a LoRA adapter and the head instead of all weights", "LoRA")
    lora_r: int = option(16, "rank")
    lora_alpha: int = option(32, "scale: the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout on the adapter's input; 0: off")
    lora_target_modules: str | list[str] | None = option(None, "layer names, or all-linear; none: PEFT's choice for the architecture")
    merge_adapter: bool = option(False, "save the final model with the adapter merged into the weights (the adapter goes to adapter/)")

    dataset_name: str = option("toy", "hub name, .json/.jsonl/.parquet/.csv file (also .gz), save_to_disk folder, or toy (embedded)", "Data")
    dataset_config: str | None = option(None, "configuration (subset) of a hub data set")
    dataset_train_split: str = option("train", "split to train on")
    dataset_test_split: str = option("test", "split to evaluate on")
    eval_dataset_name: str | None = option(None, "another data set (same forms as dataset_name) to evaluate on; none: dataset_test_split of dataset_name")
    eval_fraction: float | None = option(None, "fraction of the training split that is held out for evaluation; none: use a test split")
    max_train_samples: int | None = option(None, "use the first N pairs (toy: draw N pairs); none: all")
    max_eval_samples: int | None = option(None, "use the first N evaluation pairs (toy: draw N pairs); none: all")
    max_length: int | None = option(1024, "tokens in one sequence (prompt + answer); none: no limit")
    overlength: Literal["drop", "truncate_left"] = option("drop", "pairs longer than max_length: drop them, or cut the start of the prompt")
    add_eos: bool = option(True, "append the EOS token to plain text (conversations end as their template says)")
    margin_from_scores: bool = option(False, "margin = score_chosen - score_rejected")
    chat_template_kwargs: dict[str, Any] | None = option(None, "extra variables for the chat template, as a dict")
    dataset_num_proc: int | None = option(None, "processes for rendering and tokenizing; none: one")

    center_rewards_coefficient: float | None = option(None, "weight of (r_chosen + r_rejected)^2, which centres rewards on 0; 0.01 recommended; none: off", "Loss")
    label_smoothing_factor: float = option(0.0, "probability that a label is wrong, in [0, 0.5); 0: off")

    train_batch_size: int | None = option(None, "pairs per optimizer step over all processes; none: 64, or from the next two", "Optimization")
    per_device_train_batch_size: int | None = option(None, "TRL's way to say it: x gradient_accumulation_steps x processes = train_batch_size")
    gradient_accumulation_steps: int | None = option(None, "factor of per_device_train_batch_size (memory is micro_batch_tokens' business); none: 1")
    learning_rate: float = option(1e-4, "peak learning rate")
    num_train_epochs: float = option(1.0, "passes over the training pairs")
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs; -1: off")
    lr_scheduler_type: Schedule = option("linear", "a schedule of transformers.get_scheduler, such as cosine or constant_with_warmup")
    lr_scheduler_kwargs: dict[str, Any] | None = option(None, "what that schedule takes besides, as a dict")
    warmup_ratio: float = option(0.0, "fraction of all steps with a rising learning rate; 0: off")
    warmup_steps: int = option(0, "steps with a rising learning rate; 0: use warmup_ratio")
    weight_decay: float = option(0.0, "AdamW's decay of weight matrices (never of biases and norms); 0: off")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.999, "AdamW beta 2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0: off (the norm is still logged)")
    seed: int = option(42, "everything random is a function of (seed, step, process)")

    micro_batch_tokens: int = option(8192, "padded tokens per forward pass on one device; changes memory, not results", "Hardware")
    eval_micro_batch_tokens: int | None = option(None, "the same in evaluation; none: 2 x micro_batch_tokens")
    auto_find_batch_size: bool = option(False, "out of memory: halve micro_batch_tokens and repeat the step, same numbers (DDP then sums gradients after the backward pass)")
    torch_compile: bool = option(False, "compile the repeated layer (about 15 s a graph, in the first steps): faster where it is long used")
    layout: Literal["auto", "shared_prefix", "concatenated"] = option("auto", "how pairs become rows; auto: shared_prefix where a start-up check proves it right")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "autocast; none: as `accelerate launch` was told")

    output_dir: str | None = option(None, "folder of the run; none: runs/<run_name>", "Output")
    overwrite_output_dir: bool = option(False, "allow an output_dir that already holds a run")
    resume_from_checkpoint: str | None = option(None, "go on from a checkpoint folder, or from the `latest` in output_dir; none: start anew")
    run_name: str | None = option(None, "name of the run; none: <model>-<data set>-<time>")
    logging_steps: int = option(10, "steps between lines of training metrics")
    eval_steps: int = option(0, "steps between evaluations; 0: only at the end")
    save_steps: int = option(0, "steps between checkpoints in checkpoints/step-N; 0: off (the final model is always saved)")
    save_total_limit: int | None = option(None, "checkpoints to keep, newest first; none: all")
    num_print_samples: int = option(4, "held-out pairs shown with their rewards at every evaluation; -1: all; 0: off")
    report_to: list[str] = option([], "trackers: wandb, tensorboard, any other of Accelerate's, all, or none")
    project: str = option("reward-model", "project name at the tracker")
    # fmt: on

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, contradictions, and values that could not act."""
        c, defaults = self, {f.name: f.default for f in dataclasses.fields(self)}

        def need(ok: bool, key: str, fix: str) -> None:
            if not ok:
                raise ConfigError(f"{key}={getattr(c, key)!r}: {fix}")

        positive = "lora_r lora_alpha learning_rate num_train_epochs micro_batch_tokens logging_steps adam_epsilon"
        optional_positive = (
            "train_batch_size per_device_train_batch_size gradient_accumulation_steps eval_micro_batch_tokens "
            "max_train_samples max_eval_samples max_length dataset_num_proc save_total_limit center_rewards_coefficient"
        )
        for key in positive.split():
            need(getattr(c, key) > 0, key, "must be greater than 0")
        for key in optional_positive.split():
            need(getattr(c, key) is None or getattr(c, key) > 0, key, "must be greater than 0, or none to turn it off")
        for key in "warmup_steps weight_decay max_grad_norm eval_steps save_steps seed".split():
            need(getattr(c, key) >= 0, key, "must be 0 or greater")
        for key in "lora_dropout warmup_ratio adam_beta1 adam_beta2".split():
            need(0 <= getattr(c, key) < 1, key, "must be in [0, 1)")
        need(0 <= c.label_smoothing_factor < 0.5, "label_smoothing_factor", "must be in [0, 0.5)")
        need(c.eval_fraction is None or 0 < c.eval_fraction < 1, "eval_fraction", "must be in (0, 1), or none")
        need(c.num_print_samples >= -1, "num_print_samples", "must be -1 (all), 0 (off) or a number of pairs")
        need(c.max_steps == -1 or c.max_steps > 0, "max_steps", "must be greater than 0, or -1 to use num_train_epochs")
        need(not (c.warmup_steps and c.warmup_ratio), "warmup_ratio", "warmup_steps is given too; give one of them")
        need(not (c.dtype == "float16" and c.mixed_precision == "fp16"), "dtype", "fp16 autocast needs float32 weights")
        resumes_unnamed = c.resume_from_checkpoint and not (c.output_dir or c.run_name)
        need(not resumes_unnamed, "resume_from_checkpoint", "name the run to go on with: output_dir or run_name")
        no_warmup = c.lr_scheduler_type == "constant"
        for key in ("warmup_steps", "warmup_ratio"):
            need(
                not (no_warmup and getattr(c, key)),
                key,
                "lr_scheduler_type=constant has no warm-up; use constant_with_warmup",
            )
        need(not (c.eval_fraction and c.eval_dataset_name), "eval_fraction", "eval_dataset_name is given too; give one")
        need(c.save_total_limit is None or c.save_steps > 0, "save_total_limit", "does nothing while save_steps is 0")
        if c.train_batch_size is not None:
            for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
                need(getattr(c, key) is None, key, "train_batch_size is given too; give one of them")
        if not c.use_peft:
            for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapter"):
                need(getattr(c, key) == defaults[key], key, "does nothing while use_peft is false")
        if c.run_name is not None:
            safe = Path(c.run_name).name == c.run_name and c.run_name not in ("", ".", "..")
            need(safe, "run_name", "must be a plain name, not a path (use output_dir for a folder)")

    def global_batch_size(self, num_processes: int) -> int:
        """Pairs per optimizer step over all processes, from either way of saying it."""
        if self.per_device_train_batch_size or self.gradient_accumulation_steps:
            per_device = self.per_device_train_batch_size or 8  # TRL's default
            return per_device * (self.gradient_accumulation_steps or 1) * num_processes
        return self.train_batch_size or 64

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------- values


def _coerce(key: str, value: Any, where: str) -> Any:
    """`value` (from YAML or the command line) as the type of field `key`; `ConfigError` if it does not fit."""
    hint = get_type_hints(RewardConfig)[key]
    if isinstance(value, str) and value[:1] in ("[", "{", "("):
        value = _literal(value)
    accepts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [c for a in accepts if get_origin(a) is Literal for c in get_args(a)]
    if value is False and "no" in choices:  # YAML reads a bare `no` as false
        value = "no"
    if hint == list[str]:
        if value is None or value in ("", "none"):
            return []
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in accepts:
        return None
    is_number = not isinstance(value, bool) or bool in accepts
    try:
        if not is_number and choices == []:
            raise TypeError
        value = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise TypeError
    except (ValidationError, TypeError):
        wanted = ", ".join(map(str, choices)) if choices else str(getattr(hint, "__name__", hint))
        raise ConfigError(f"{where}: {key}={value!r} does not fit; expected {wanted}") from None
    return value


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _check_key(key: str, where: str) -> str:
    names = [f.name for f in dataclasses.fields(RewardConfig)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see --help for all keys"
        raise ConfigError(f"{where}: unknown key '{key}'{hint}")
    return key


# ---------------------------------------------------------------------------------------------- YAML


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this loader refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """The typed options of one YAML file; `ConfigError` names the file and key of what is wrong."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ConfigError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{path}: expected `key: value` lines")
    return {k: _coerce(_check_key(str(k), path), v, path) for k, v in (values or {}).items()}


# ---------------------------------------------------------------------------------------------- command line


def _split_arguments(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """`--k=v`, `--k v`, `k=v`, bare `--flag`, `--list a b` → (YAML files, typed options)."""
    files, values, where = [], {}, "command line"
    hints = get_type_hints(RewardConfig)
    rest = list(argv)

    def starts_option(token: str) -> bool:
        return token.startswith("--") or token.split("=")[0].replace("-", "_") in hints and "=" in token

    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not token.startswith("--") and not equals:
            raise ConfigError(f"{where}: '{token}' is not an option; write --key=value or key=value")
        if key != "config":
            _check_key(key, where)
        if not equals:
            taken = []
            many = key in hints and ("list[" in str(hints[key]))
            while rest and not starts_option(rest[0]) and (many or not taken):
                if hints.get(key) is bool and rest[0].lower() not in ("true", "false"):
                    break
                taken.append(rest.pop(0))
            if not taken and hints.get(key) is not bool:
                raise ConfigError(f"{where}: --{key} needs a value")
            value = True if not taken else taken[0] if len(taken) == 1 else taken
        if key == "config":
            files.append(value)
        else:
            values[key] = _coerce(key, value, where)
    return files, values


def parse_config(argv: list[str]) -> RewardConfig:
    """The configuration of a command line.

    `--config FILE` may be given several times, the last one wins key by key. Without any, and with neither a model nor
    a data set named, the quickstart's file is used. Raises `ConfigError`; `--help` prints the options and exits.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text())
        raise SystemExit(0)
    files, values = _split_arguments(argv)
    if not files and not {"model_name_or_path", "dataset_name"} & set(values):
        files = [str(QUICKSTART)]
    merged: dict[str, Any] = {}
    for file in files:
        merged |= read_yaml(file)
    merged |= values
    for key, other in (("dataset_name", "model_name_or_path"), ("model_name_or_path", "dataset_name")):
        if merged.get(key, getattr(RewardConfig, key)) != getattr(RewardConfig, key) and other not in merged:
            raise ConfigError(
                f"{other} is not given, but {key} is; without it {getattr(RewardConfig, other)} would be used"
            )
    if merged.get("model_name_or_path", TINY_LLAMA) == TINY_LLAMA and not Path(TINY_LLAMA).exists():
        merged["model_name_or_path"] = str(QUICKSTART.parent / "tiny_llama")  # started from another folder
    return RewardConfig(**merged)


def help_text() -> str:
    """Every option in sections, one line each."""
    lines = [
        "usage: accelerate launch train_rm.py [--config FILE.yaml ...] [--key=value | --key value | key=value ...]",
        "",
        "Train a reward model. Precedence: default < --config files < command line. Without arguments: the quickstart.",
    ]
    for f in dataclasses.fields(RewardConfig):
        if f.metadata["section"]:
            lines += ["", f.metadata["section"]]
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = "none" if default is None or default == [] else yaml.safe_dump(default).split("\n")[0]
        lines.append(f"  --{f.name}={shown}  {f.metadata['help']}")
    return "\n".join(lines)
