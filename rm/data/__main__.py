"""Inspect data before training: what is read and dropped, lengths and margins, and prompts as the model will see them.

python -m rm.data --dataset_name pairs.jsonl --model_name_or_path MODEL     # data options as in train_rm.py
python -m rm.data --dataset_name pairs.jsonl                                # without a model: lengths in bytes
"""

import logging
import sys

import pandas as pd
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rm.config.cli import make_config, parse, run_program
from rm.config.errors import InputError
from rm.config.options import TINY_LLAMA, DataOptions
from rm.config.section import Section, fields_of, option
from rm.data.audit import audit_table
from rm.data.columns import COMPARISON_COLUMNS
from rm.data.dataset import PreferenceData, flat
from rm.data.mixture import load_data, load_train_data
from rm.data.tokenizer import load_tokenizer

TOKENIZER_OPTIONS = ("model_name_or_path", "model_revision", "trust_remote_code", "chat_template_path")
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"  # where no model is given


class Inspection(Section):
    """usage: python -m rm.data --dataset_name DATA [--model_name_or_path MODEL] [--config FILE.yaml] [--key=value ...]

    Show how data are read, without loading weights. Evaluation data: eval_dataset_name or eval_fraction.
    """

    config: list[str] = option([], "YAML file with options; may be repeated, the last file wins")
    rows: int = option(3, "prompts of each data set to show as the model will see them; 0: off", ge=0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without files: a token for each byte, and a chat template."""
    names = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT)


def quantiles_of(data: PreferenceData, unit: str) -> pd.DataFrame:
    """A row of quantiles for each number: of answers, prompts, and comparisons."""
    frame, prefix = data.comparisons, flat(data.dataset, "prefix_length")
    numbers = {f"{unit} of an answer with its prompt": data.answers["length"]}
    numbers |= {f"{unit} of {side}": frame[f"length_{side}"] for side in ("chosen", "rejected")}
    numbers |= {f"{unit} that the answers of a prompt share": prefix, "answers of a prompt": data.num_answers}
    numbers |= {"comparisons of a prompt": frame.groupby("index").size()}
    numbers |= {name: frame[name] for name in COMPARISON_COLUMNS if frame[name].nunique() > 1}
    described = {name: pd.Series(values).describe(QUANTILES) for name, values in numbers.items()}
    return pd.DataFrame(described).T.drop(columns="std")


def tokens_of(data: PreferenceData, i: int) -> Text:
    """Prompt `i` as the model will see it: its tokens as text, special ones marked, control characters escaped."""
    (tree,), rows = data.trees([i]), data.comparisons[data.comparisons["index"] == i]
    start, *texts = (data.tokenizer.decode(ids) for ids in (tree.prefix, *tree.sequences()))
    name = data.sets[data.set_names[i]].source.row_name(int(rows["row"].iloc[0]))
    parts = [f"\n── {name}: {len(tree.prefix)} tokens that all answers share", start]
    for n, (ids, text) in enumerate(zip(tree.answers, texts, strict=True)):
        wins, losses = (int((rows[side] == n).sum()) for side in ("chosen", "rejected"))
        parts += [f"── answer {n + 1}: {len(ids)} tokens, {wins} times chosen, {losses} times rejected"]
        parts += [text.removeprefix(start)]
    shown = Text("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in "\n".join(parts)))
    shown.highlight_words(map(str, data.tokenizer.added_tokens_encoder), "reverse")
    return shown


def main(argv: list[str]) -> None:
    """Print what the options make of the data."""
    own, given = parse(argv, Inspection, accepts=(*fields_of(DataOptions), *TOKENIZER_OPTIONS, "seed"))
    logging.getLogger("rm.data.formats").setLevel(logging.DEBUG)  # what every column is
    if "dataset_name" not in given:
        raise InputError("--dataset_name is needed: the data to inspect")
    has_model = "model_name_or_path" in given
    config = make_config(({} if has_model else {"model_name_or_path": TINY_LLAMA, "max_length": None}) | given)
    tokenizer, unit = (load_tokenizer(config), "tokens") if has_model else (byte_tokenizer(), "bytes")
    has_test = config.eval_dataset_name is not None or config.eval_fraction is not None
    sets = load_data(tokenizer, config) if has_test else (load_train_data(tokenizer, config),)
    sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(audit_table(*sets), soft_wrap=False)
    for split, data in zip(("train", "test"), sets, strict=False):
        console.print(f"\n{split}: {len(data):,} prompts")
        console.print(quantiles_of(data, unit).to_string(float_format="{:,.6g}".format))
        prefix, length = flat(data.dataset, "prefix_length"), data.answers["length"].sum()
        shared, repeated = (prefix * data.num_answers).sum(), (prefix * (data.num_answers - 1)).sum()
        console.print(f"{shared / length:.1%} of the {unit} are shared; trees compute {1 - repeated / length:.1%}")
        counts = data.comparisons["margin"].value_counts(bins=10, sort=False)  # a histogram
        bars = ["#" * count + " " * (40 - count) for count in counts * 40 // counts.max()]
        if data.comparisons["margin"].any():
            console.print(f"\n{split}: margins", pd.DataFrame({"count": counts, "": bars}).to_string(), sep="\n")
        console.print(*(tokens_of(data, int(i)) for i in data.first_of_each(own.rows)), sep="\n")


if __name__ == "__main__":
    run_program(main)
