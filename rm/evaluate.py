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
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from transformers.utils import is_torch_tf32_available

from rm.adapters import load_trained
from rm.attention import block_size
from rm.batching import PairLengths, plan_micro_batches
from rm.breakdown import breakdowns
from rm.collate import COLUMNS, collate
from rm.command_line import parse_config, read_yaml, split_arguments
from rm.compare import compare_tables
from rm.config import ConfigError, RewardConfig
from rm.data import arrays_of
from rm.files import finite, write_text
from rm.forward import LayoutError, concatenated_forward, resolve_layout
from rm.load import DataError
from rm.metrics import evaluation_intervals, evaluation_metrics
from rm.mixture import PairSets, load_pairs
from rm.model import ModelError, RewardModel, check_positions, use_cpu_kernel
from rm.precision import cast_weights, set_tf32
from rm.pretrained import check_folder, find_adapter, load_tokenizer
from rm.quantization import QUANTIZATION_OPTIONS, quantization_config
from rm.redact import safe_line
from rm.show import breakdown_table, comparison_table, metrics_table
from rm.table import pair_table, sets_of, without_missing, worst, write_table
from rm.visualize_samples import reward_table, sample_records, write_records

# what decides which pairs there are, whatever the tokenizer
SAME_DATA = (
    "dataset_name dataset_weights dataset_config dataset_train_split dataset_test_split eval_dataset_name "
    "eval_dataset_config eval_fraction max_eval_samples seed"
).split()


def pair_lengths(dataset) -> PairLengths:
    """The lengths of all pairs of a tokenized data set (three int64 arrays; the tokens stay on disk)."""
    columns = ("length_chosen", "length_rejected", "prefix_length")
    return PairLengths(*(values.astype(np.int64) for values in arrays_of(dataset, columns).values()))


@torch.no_grad()
def evaluate_rewards(
    model: nn.Module,
    accelerator: Accelerator,
    dataset,
    *,
    layout: str,
    micro_batch_tokens: int,
    pad_token_id: int,
) -> np.ndarray:
    """Rewards (chosen, rejected) of every pair, float64 [n, 2], in the data set's order. Collective: every rank.

    Each process scores its share and writes it into a table of zeros; the sum over processes is the whole table. So no
    row is gathered twice, and nothing depends on batches, layout or processes but for float rounding.
    """
    costs = pair_lengths(dataset).cost(layout)
    plans = plan_micro_batches(
        np.arange(len(costs)), costs, layout, micro_batch_tokens, accelerator.num_processes, block_size(model)
    )
    table = torch.zeros(
        len(costs), 3, device=accelerator.device
    )  # chosen, rejected (float32 as computed), times scored
    dataset = dataset.with_format("numpy", columns=COLUMNS)
    was_training = model.training
    model.eval()
    for micro_batch in plans[accelerator.process_index]:
        batch = collate(dataset, micro_batch, layout, pad_token_id).to(accelerator.device)
        chosen_B, rejected_B = concatenated_forward(model, batch)
        if not micro_batch.is_filler:
            scored = torch.stack([chosen_B, rejected_B, torch.ones_like(chosen_B)], dim=1)
            table[batch.index_B] += scored
    model.train(was_training)
    table = accelerator.reduce(table, "sum").cpu().numpy()  # collective
    assert (table[:, 2] == 1).all(), "a pair was scored twice or not at all"
    return table[:, :2].astype(np.float64)


def pairs_metrics(table: pd.DataFrame, measure: Callable = evaluation_metrics, **options) -> dict:
    """`rm.metrics.evaluation_metrics` (or `measure`, say `evaluation_intervals`) of the table of an evaluation.

    With several sets: of all pairs together as `eval/...`, and of each set as `eval/<set>/...`. Subsets stand under
    their set alone, and what needs a `true_margin` only where every pair has one.
    """
    sets = sets_of(table)
    if len(sets) == 1:
        return measure(without_missing(table), **options)
    metrics = measure(without_missing(table).drop(columns="subset", errors="ignore"), **options)
    for name, part in sets.items():
        metrics |= measure(part, **options, prefix=f"eval/{name}")
    return metrics


def saved_config(name: str, rest: Sequence[str], data: Sequence[str] = ()) -> RewardConfig:
    """The configuration to evaluate the saved model `name` with: its run's own, then `data` and `rest`, options as on
    the command line."""
    check_folder(name)
    files, values = split_arguments([*data, *rest])
    chosen = set(values).union(*map(read_yaml, files))
    recorded = Path(name) / "config.yaml"
    base = ["--config", str(recorded)] if recorded.is_file() else []
    if chosen & {"dataset_name", "eval_dataset_name"}:
        others = "eval_fraction eval_dataset_name eval_dataset_config dataset_config dataset_weights max_eval_samples"
        base += [f"{option}=none" for option in others.split() if option not in chosen]
    if not is_torch_tf32_available():  # which the run may have had
        base += ["tf32=none"]
    return parse_config([*base, *data, f"model_name_or_path={name}", *rest])


def evaluate_saved(config: RewardConfig, accelerator: Accelerator) -> tuple[PairSets, pd.DataFrame]:
    """(evaluation pairs, their table) of the saved model that `config` names. Collective."""
    name = config.model_name_or_path
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    with accelerator.main_process_first():
        _, pairs = load_pairs(tokenizer, **config.data_options(), only_evaluation=True)
    is_adapter = find_adapter(name) is not None  # what was merged is not quantised any more
    options = {name: getattr(config, name) for name in QUANTIZATION_OPTIONS}
    quantization = quantization_config(**options) if is_adapter else None
    options = dict(trust_remote_code=config.trust_remote_code, quantization_config=quantization)
    trained = load_trained(name, tokenizer, dtype=config.dtype, **options)
    model = RewardModel(trained)
    use_cpu_kernel(model.bare)
    check_positions(model, pairs.audit["max_tokens"])
    model = accelerator.prepare_model(model, evaluation_mode=True)
    tokens = pairs.dataset.with_format("numpy")
    is_half = accelerator.mixed_precision != "no" or quantization is not None or bool(config.tf32)
    is_half |= next(trained.parameters()).dtype != torch.float32
    layout, _ = resolve_layout(
        config.layout,
        model,
        tokens,
        pair_lengths(pairs.dataset).short_ones(),
        tokenizer.pad_token_id,
        accelerator.device,
        tolerance=5e-2 if is_half else 1e-4,
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
    return pairs, pair_table(pairs, rewards)


def mistake_records(pairs: PairSets, table: pd.DataFrame, count: int, step: int | None = None) -> list[dict]:
    """The `count` pairs whose rejected answer is furthest ahead, the worst first, as in `visualize_samples`."""
    rows = worst(table, count)
    return sample_records(
        [pairs.texts(int(i)) for i in rows],
        table["reward_chosen"].to_numpy()[rows],
        table["reward_rejected"].to_numpy()[rows],
        ids=pairs.ids(rows),
        sets=[pairs.set_of(int(i)) for i in rows] if pairs.are_several else None,
        step=step,
        margins=table["data_margin"].to_numpy()[rows] if table["data_margin"].any() else None,
    )


def take_options(argv: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options `names`, which are this program's own, as --name=value, --name value or name=value; and the rest."""
    own, rest, words = {}, [], iter(argv)
    for word in words:
        name, has_value, value = word.removeprefix("--").partition("=")
        if name not in names or not (has_value or word.startswith("--")):
            rest.append(word)
            continue
        own[name] = value if has_value else next(words, "")
        if own[name] == "" or own[name].startswith("--"):
            raise ConfigError(f"command line: --{name} needs a value")
    return own, rest


def main(argv: list[str]) -> dict[str, float]:
    """Evaluate a saved reward model; prints tables, and then the metrics as one line of JSON."""
    own, rest = take_options(argv, ("model", "compare", "mistakes", "output"))
    if "model" not in own:
        raise ConfigError("command line: --model FOLDER is needed: the output folder of a run, or a hub name")
    num_mistakes = own.get("mistakes", "0")
    if not num_mistakes.isdecimal():
        raise ConfigError(f"command line: --mistakes={num_mistakes}: must be a number of pairs")
    config = saved_config(own["model"], rest)
    output = Path(own["output"]) if "output" in own else None
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"command line: --output={output}: is a file; give a folder")
    if "compare" in own:
        same = {name: value for name, value in config.data_options().items() if name in SAME_DATA}
        same = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in same.items()]
        other_config = saved_config(own["compare"], rest, same)

    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
    set_tf32(config.tf32)
    pairs, table = evaluate_saved(config, accelerator)
    options = dict(
        center_rewards_coefficient=config.center_rewards_coefficient, label_smoothing=config.label_smoothing_factor
    )
    metrics = pairs_metrics(table, **options)
    intervals = pairs_metrics(table, evaluation_intervals, **options)
    comparison = None
    if "compare" in own:
        _, other = evaluate_saved(other_config, accelerator)
        try:
            comparison, more = compare_tables(table, other, **options)
        except ValueError as error:
            raise DataError(f"--compare={own['compare']}: {error}") from None
        metrics, intervals = metrics | comparison, intervals | more
    if accelerator.is_main_process:
        console, parts = Console(), breakdowns(table)
        console.print(metrics_table(metrics, intervals, "eval", f"Evaluation of {own['model']}"))
        for name, rows in parts.items():
            if name != "by_set" or pairs.are_several:
                console.print(breakdown_table(name, rows))
        if comparison is not None:
            console.print(comparison_table(metrics, intervals, (own["model"], own["compare"])))
        mistakes = mistake_records(pairs, table, int(num_mistakes))
        if mistakes:
            console.print(reward_table(mistakes, console, f"The {len(mistakes)} worst mistakes, the worst first"))
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_table(table, output / "table.parquet")
            record = {"metrics": metrics, "intervals": intervals, "breakdowns": parts}
            write_text(output / "metrics.json", json.dumps(finite(record), indent=2))
            write_records(output / "mistakes.jsonl", mistakes)
        print(json.dumps(finite(metrics)), flush=True)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, ModelError, LayoutError) as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or 2)
