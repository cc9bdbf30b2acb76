"""Evaluate a saved reward model: each comparison once, on any number of processes.

python -m rm.evaluate --model OUT                                   # the evaluation data of the run itself
python -m rm.evaluate --model OUT --dataset_name pairs.jsonl        # other data; options as in train_rm.py
python -m rm.evaluate --model OUT --compare OTHER_OUT               # and the difference to another model
python -m rm.evaluate --model OUT --mistakes 20 --output FOLDER     # the worst pairs; keep table, metrics, intervals
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from rich.console import Console

from rm.config.cli import parse
from rm.config.errors import InputError
from rm.config.files import finite, write_text
from rm.config.options import DataOptions, DatasetOptions, LossOptions, QuantizationOptions, RewardConfig
from rm.config.redact import safe_line
from rm.config.section import Section, fields_of, option
from rm.data.mixture import load_evaluation_data
from rm.evaluate.compare import compare_tables
from rm.evaluate.evaluator import NUM_MISTAKES, Evaluator
from rm.evaluate.metrics import evaluation_intervals, evaluation_metrics
from rm.evaluate.slices import slices
from rm.evaluate.table import worst, write_table
from rm.evaluate.terminal import metrics_table
from rm.forward import choose_layout
from rm.model.load import load_saved_model, load_tokenizer
from rm.model.precision import is_half_precision, set_tf32
from rm.model.reward_model import check_positions
from rm.model.saved import RENDERED, conversations_from_text, recorded_config
from rm.visualize_samples import reward_table, write_records

logger = logging.getLogger(__name__)

SAME_DATA = (*fields_of(DatasetOptions), "seed")  # options that decide which rows there are, whatever the tokenizer
ACCEPTS = (*fields_of(DataOptions), *fields_of(LossOptions), *fields_of(QuantizationOptions), "seed", "dtype")
ACCEPTS += ("trust_remote_code", "micro_batch_tokens", "eval_micro_batch_tokens", "layout", "mixed_precision")
ACCEPTS += ("eval_dtype", "tf32")


class Evaluation(Section):
    """usage: python -m rm.evaluate --model OUT [--key=value ...]

    Evaluate a saved reward model. Options have by default the values of its run.
    """

    model: str = option(..., "output folder of a run, or hub name")
    compare: str | None = option(None, "another model, evaluated on the same data and compared row by row; none: off")
    mistakes: int = option(0, "worst mistakes to show, and with --output to keep; 0: show none and keep 20", ge=0)
    output: str | None = option(None, "folder for table, metrics and mistakes; none: not written")
    config: list[str] = option([], "YAML file with options; may be repeated, the last file wins")


def evaluator_of(config: RewardConfig, accelerator: Accelerator) -> Evaluator:
    """The evaluation data and the saved model that `config` names. Collective."""
    tokenizer = load_tokenizer(config)
    as_conversation, why = conversations_from_text(config, tokenizer)
    with accelerator.local_main_process_first():
        data = load_evaluation_data(tokenizer, config, as_conversation)
    text_formats = ("text_explicit_prompt", "text_lists", "conversation_from_text")
    if any(part.encoding.format in text_formats for part in data.sets.values()):
        logger.info(RENDERED, "conversations" if as_conversation else "text", why)
    model = load_saved_model(config.model_name_or_path, tokenizer, config)
    check_positions(model.config, data.audit["max_tokens"])
    is_half = is_half_precision(model, accelerator.mixed_precision, config.tf32)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    layout = choose_layout(config.layout, model, data, tokenizer.pad_token_id, 5e-2 if is_half else 1e-4)
    return Evaluator(data, model, accelerator, layout, config)


def main(argv: list[str]) -> dict[str, float]:
    """Print a table, and then metrics and intervals as one line of JSON; returns the metrics."""
    own, given = parse(argv, Evaluation, accepts=ACCEPTS)
    output = own.output and Path(own.output)
    if output and (output.is_file() or not output.absolute().parent.is_dir()):
        raise InputError(f"command line: output={output}: must be a folder, or a new one in a folder that exists")
    config = recorded_config(own.model, given)
    if own.compare:
        other_config = recorded_config(own.compare, given | {k: getattr(config, k) for k in SAME_DATA})
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    set_tf32(config.tf32)

    evaluator = evaluator_of(config, accelerator)  # collective
    table = evaluator.scored_table()  # collective
    metrics, intervals = evaluation_metrics(table, config), evaluation_intervals(table, config)
    if own.compare:
        other = evaluator_of(other_config, accelerator).scored_table()  # collective
        values, ends = compare_tables(table, other, config)
        metrics, intervals = metrics | values, intervals | ends
    if accelerator.is_main_process:
        evaluator.warn_of_nonfinite(table)
        console = Console()
        title = f"Evaluation of {own.model}"
        console.print(metrics_table(title, metrics, intervals, with_meaning=console.width >= 110))
        mistakes = evaluator.records(table, worst(table, own.mistakes or NUM_MISTAKES))
        if mistakes and own.mistakes:
            console.print(reward_table(mistakes, console, f"The {len(mistakes)} worst mistakes, the worst first"))
        if output:
            record = {"metrics": metrics, "intervals": intervals, "slices": slices(table)}
            write_table(table, output / "table.parquet")
            write_text(output / "metrics.json", json.dumps(finite(record), indent=2))
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
