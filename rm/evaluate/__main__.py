"""Exact evaluation: every pair once, on any number of processes.

python -m rm.evaluate --model OUT                                   # the run's own evaluation set
python -m rm.evaluate --model OUT --dataset_name pairs.jsonl        # another one; options as in train_rm.py
python -m rm.evaluate --model OUT --compare OTHER_OUT               # and the difference to another model, pair by pair
python -m rm.evaluate --model OUT --mistakes 20 --output FOLDER     # the worst pairs; table, metrics, intervals kept
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import transformers
from accelerate import Accelerator
from rich.console import Console

from rm.config.cli import read_yaml, split_arguments, take_option
from rm.config.errors import InputError
from rm.config.files import finite, write_text
from rm.config.options import RewardConfig
from rm.config.redact import safe_line
from rm.data.load import Source, load_raw
from rm.data.mixture import PairSets, load_pairs
from rm.data.render import FROM_TEXT
from rm.evaluate.best_of_n import best_of_n_table, is_best_of_n
from rm.evaluate.compare import compare_tables

# what decides which pairs there are, whatever the tokenizer
from rm.evaluate.evaluator import evaluate_rewards, mistake_records, pair_lengths, pairs_metrics, warn_of_nonfinite
from rm.evaluate.rewardbench import best_of_n_metrics
from rm.evaluate.slices import breakdowns
from rm.evaluate.table import pair_table, worst, write_table
from rm.evaluate.terminal import breakdown_table, comparison_table, metrics_table, score_table
from rm.forward import resolve_layout
from rm.model.load import load_tokenizer
from rm.model.precision import cast_weights, set_tf32
from rm.model.reward_model import check_positions
from rm.model.saved import RENDERED, conversations_from_text, load_saved, recorded_config
from rm.score.scorer import Scorer
from rm.visualize_samples import reward_table, write_records

logger = logging.getLogger(__name__)

SAME_DATA = (
    "dataset_name dataset_weights dataset_config dataset_train_split dataset_test_split eval_dataset_name "
    "eval_dataset_config eval_fraction max_eval_samples seed"
).split()


def best_of_n_source(config: RewardConfig) -> Source | None:
    """The evaluation data, if they are one data set with several answers a prompt (RewardBench 2)."""
    name, dataset_config = config.dataset_name, config.dataset_config
    if config.eval_dataset_name is not None:
        name, dataset_config = config.eval_dataset_name, config.eval_dataset_config
    if not isinstance(name, str) or name == "toy" or config.eval_fraction is not None:
        return None
    where = {"split": config.dataset_test_split, "max_samples": config.max_eval_samples, "accept_only_split": True}
    source = load_raw(name, dataset_config=dataset_config, **where)
    return source if is_best_of_n(source.dataset) else None


def evaluate_best_of_n(
    config: RewardConfig, source: Source, accelerator: Accelerator, *, max_length: int | None
) -> pd.DataFrame:
    """The table of `rm.best_of_n` of the saved model that `config` names. Collective."""
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    as_conversation, why = conversations_from_text(config, tokenizer)
    if isinstance(source.dataset[0].get("prompt"), str):
        logger.info(RENDERED, "conversations" if as_conversation else "text", why)
    model, tolerance = load_saved(config, tokenizer)
    scorer = Scorer(
        model,
        tokenizer,
        device=accelerator.device,
        layout=config.layout,
        tolerance=tolerance,
        micro_batch_tokens=config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens,
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision),
        weights=config.eval_dtype,
        add_eos=config.add_eos,
        text_as_conversation=as_conversation,
        chat_template_kwargs=config.chat_template_kwargs,
        max_length=max_length,
        overlength=config.overlength,
    )
    return best_of_n_table(source, scorer, accelerator)


def evaluate_pairs(config: RewardConfig, accelerator: Accelerator) -> tuple[PairSets, pd.DataFrame]:
    """(evaluation pairs, their table) of the saved model that `config` names. Collective."""
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    as_conversation, why = conversations_from_text(config, tokenizer)
    options = config.data_options() | {"trained_on_conversations": as_conversation}
    with accelerator.main_process_first():
        _, pairs = load_pairs(tokenizer, **options, only_evaluation=True)
    if any(part.format in (FROM_TEXT, "text_explicit_prompt") for part in pairs.sets.values()):
        logger.info(RENDERED, "conversations" if as_conversation else "text", why)
    model, tolerance = load_saved(config, tokenizer)
    check_positions(model, pairs.audit["max_tokens"])
    model = accelerator.prepare_model(model, evaluation_mode=True)
    layout, _ = resolve_layout(
        config.layout,
        model,
        pairs.dataset.with_format("numpy"),
        pair_lengths(pairs.dataset).short_ones(),
        tokenizer.pad_token_id,
        accelerator.device,
        tolerance=tolerance,
    )
    with cast_weights(model, config.eval_dtype):
        rewards = evaluate_rewards(
            model,
            accelerator,
            pairs.dataset,
            layout=layout,
            micro_batch_tokens=config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    table = pair_table(pairs, rewards)
    if accelerator.is_main_process:
        warn_of_nonfinite(pairs, table)
    return pairs, table


def main(argv: list[str]) -> dict[str, float]:
    """Evaluate a saved reward model; prints tables, and then the metrics and their intervals as one line of JSON."""
    if {"-h", "--help"} & set(argv):
        print(
            f"{__doc__}\nOptions of train_rm.py that decide about data, model or speed act here too (see its --help)."
        )
        return {}
    own, rest = {}, argv
    for option in ("model", "compare", "mistakes", "output"):
        own[option], rest = take_option(rest, option)
    if own["model"] is None:
        raise InputError("command line: --model FOLDER is needed: the output folder of a run, or a hub name")
    num_mistakes = own["mistakes"] or ("20" if own["output"] else "0")
    if not num_mistakes.isdecimal():
        raise InputError(f"command line: mistakes={num_mistakes}: must be a number of pairs")
    output = Path(own["output"]) if own["output"] else None
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"command line: output={output}: is a file; give a folder")
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"command line: output={output}: there is no folder {output.parent} to make it in")
    config = recorded_config(own["model"], rest)
    if own["compare"] is not None:
        same = {name: getattr(config, name) for name in SAME_DATA}
        same = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in same.items()]
        other_config = recorded_config(own["compare"], [*rest, *same])

    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
    set_tf32(config.tf32)
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    console, name = Console(), own["model"]
    if (source := best_of_n_source(config)) is not None:
        for option in ("compare", "mistakes"):
            if own[option] is not None:
                raise InputError(f"command line: {option}: is for pairs; {source.name} has several answers a prompt")
        files, values = split_arguments(rest)
        is_given = "max_length" in set(values).union(*map(read_yaml, files))
        max_length = config.max_length if is_given else None  # the training's limit would leave prompts out
        table, mistakes = evaluate_best_of_n(config, source, accelerator, max_length=max_length), []
        metrics, intervals = best_of_n_metrics(table)
        shown, parts = [score_table(metrics, intervals, f"Best of N by {name}")], {}
    else:
        pairs, table = evaluate_pairs(config, accelerator)
        loss = {"center_rewards_coefficient": config.center_rewards_coefficient}
        loss |= {"label_smoothing": config.label_smoothing_factor}
        metrics, intervals = pairs_metrics(table, **loss), pairs_metrics(table, intervals=True, **loss)
        parts, mistakes = breakdowns(table), mistake_records(pairs, table, worst(table, int(num_mistakes)))
        shown = [metrics_table(metrics, intervals, "eval", f"Evaluation of {name}", console.width)]
        if published := {key: ends for key, ends in intervals.items() if "/rewardbench/" in key}:
            shown.append(score_table(metrics, published, "RewardBench"))
        shown += [breakdown_table(key, rows) for key, rows in parts.items() if key != "by_set" or pairs.are_several]
        if own["compare"] is not None:
            _, other = evaluate_pairs(other_config, accelerator)
            try:
                values, ends = compare_tables(table, other, **loss)
            except ValueError as error:
                raise InputError(f"compare={own['compare']}: {error}") from None
            shown.append(comparison_table(values, ends, (name, own["compare"])))
            metrics, intervals = metrics | values, intervals | ends
        if mistakes and own["mistakes"]:
            shown.append(reward_table(mistakes, console, f"The {len(mistakes)} worst mistakes, the worst first"))
    if accelerator.is_main_process:
        console.print(*shown)
        record = {"metrics": metrics, "intervals": intervals, "breakdowns": parts}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_table(table, output / "table.parquet")
            write_text(output / "metrics.json", json.dumps(finite(record), indent=2))
            if source is None:
                write_records(output / "mistakes.jsonl", mistakes)
        print(json.dumps(finite(metrics | {"intervals": intervals})), flush=True)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of weights that load in no time
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or 2)
