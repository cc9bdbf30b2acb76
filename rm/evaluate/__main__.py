"""Evaluate a saved reward model: each comparison once, on any number of processes.

python -m rm.evaluate --model OUT                                   # the evaluation data of the run itself
python -m rm.evaluate --model OUT --dataset_name pairs.jsonl        # other data; options as in train_rm.py
python -m rm.evaluate --model OUT --compare OTHER_OUT               # and the difference to another model
python -m rm.evaluate --model OUT --mistakes 20 --output FOLDER     # the worst prompts; keep table, metrics, intervals
"""

import json
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from rm.config.cli import parse, run_program
from rm.config.errors import InputError
from rm.config.files import finite, write_file
from rm.config.options import DataOptions, DatasetOptions, LossOptions, QuantizationOptions, RewardConfig
from rm.config.section import Section, fields_of, option
from rm.data.mixture import load_evaluation_data
from rm.data.tokenizer import load_tokenizer
from rm.evaluate.evaluator import NUM_MISTAKES, Evaluator, metrics_table
from rm.evaluate.table import compare_tables, evaluation_intervals, evaluation_metrics, has_several, slices, worst
from rm.forward import choose_layout
from rm.model.load import check_positions, conversations_from_text, load_saved_model, recorded_config
from rm.model.reward_model import set_tf32
from rm.visualize_samples import reward_table, write_records

logger = logging.getLogger(__name__)

SAME_DATA = (*fields_of(DatasetOptions), "seed")  # options that decide which rows there are, whatever the tokenizer
ACCEPTS = (*fields_of(DataOptions), *fields_of(LossOptions), *fields_of(QuantizationOptions), "seed", "dtype")
ACCEPTS += ("trust_remote_code", "micro_batch_tokens", "eval_micro_batch_tokens", "layout", "mixed_precision")
ACCEPTS += ("eval_dtype", "tf32", "attn_implementation")


class Evaluation(Section):
    """usage: python -m rm.evaluate --model OUT [--key=value ...]

    Evaluate a saved reward model. Options have by default the values of its run.
    """

    model: str = option(..., "output folder of a run, or hub name")
    compare: str | None = option(None, "another model, evaluated on the same data and compared row by row; none: off")
    mistakes: int = option(0, "prompts with the worst mistakes to show, with --output to keep; 0: none, keep 20", ge=0)
    output: str | None = option(None, "folder for table, metrics and mistakes; none: not written")
    config: list[str] = option([], "YAML file with options; may be repeated, the last file wins")


def evaluator_of(config: RewardConfig, accelerator: Accelerator) -> Evaluator:
    """The evaluation data and the saved model that `config` names. Collective."""
    tokenizer = load_tokenizer(config)
    as_conversation, why = conversations_from_text(config, tokenizer)
    with accelerator.local_main_process_first():
        data = load_evaluation_data(tokenizer, config, as_conversation)
    if tokenizer.chat_template:
        logger.info(why)
    check_positions(config, data.audit["max_tokens"])
    model = load_saved_model(config.model_name_or_path, tokenizer, config)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    layout = choose_layout(config.layout, model, data, tokenizer.pad_token_id)
    return Evaluator(data, model, accelerator, layout, config)


def main(argv: list[str]) -> dict[str, float]:
    """Print a table, and then metrics and intervals as one line of JSON; returns the metrics."""
    own, given = parse(argv, Evaluation, accepts=ACCEPTS)
    output = own.output and Path(own.output)
    if output and output.is_file():
        raise InputError(f"command line: output={output}: must be a folder")
    config = recorded_config(own.model, given)
    if own.compare:
        other_config = recorded_config(own.compare, given | {k: getattr(config, k) for k in SAME_DATA})
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
    set_tf32(config.tf32)

    evaluator = evaluator_of(config, accelerator)  # collective
    table = evaluator.scored_table()  # collective
    metrics, intervals = evaluation_metrics(table, config), evaluation_intervals(table, config)
    if own.compare:
        other = evaluator_of(other_config, accelerator).scored_table()  # collective
        values, ends = compare_tables(table, other, config)
        metrics, intervals = metrics | values, intervals | ends
    rows = worst(table, own.mistakes or NUM_MISTAKES) if own.mistakes or output else []
    mistakes = evaluator.records(table, rows)  # collective
    if accelerator.is_main_process:
        console = Console()
        console.print(metrics_table(f"Evaluation of {own.model}", metrics, intervals, console.width >= 110))
        if mistakes and own.mistakes:
            console.print(reward_table(mistakes, console, f"The {len(mistakes)} worst mistakes, the worst first"))
        if output:
            record = {"metrics": metrics, "intervals": intervals, "slices": slices(table)}
            output.mkdir(parents=True, exist_ok=True)
            write_file(output / "table.parquet", table.to_parquet(index=False))
            if has_several(table):
                write_file(output / "answers.parquet", evaluator.answers.to_parquet(index=False))
            write_file(output / "metrics.json", json.dumps(finite(record), indent=2))
            write_records(output / "mistakes.jsonl", mistakes)
        print(json.dumps(finite(metrics | {"intervals": intervals})), flush=True)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    run_program(main)
