"""The model card, README.md of the output folder: what results.json says of a run, for people and for the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rm.config.redact import redact
from rm.model.quantization import QUANTIZATION_OPTIONS, quantization_config

PATH_OPTIONS = (
    "model_name_or_path dataset_name eval_dataset_name chat_template_path peft_config output_dir resume_from_checkpoint"
).split()
ABSOLUTE = r"(?<![\w.:/\\~<-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:\]})]+)+[/\\]?"  # a path, in any text

CONVERSATION = """messages = [
    {{"role": "user", "content": "How do I make tea?"}},
    {{"role": "assistant", "content": "Boil water, then pour it over the leaves."}},
]
text = tokenizer.apply_chat_template(messages, tokenize=False{kwargs})
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
"""
TEXT = """text = "How do I make tea? Boil water, then pour it over the leaves."  # prompt and answer
ids = tokenizer(text)["input_ids"]
"""
EOS = """if ids[-1] != tokenizer.eos_token_id:
    ids.append(tokenizer.eos_token_id)
"""


def hub_name(name: str | None) -> str | None:
    """`name` if it is one of a model or data set on the hub; None for local files and folders, and for "toy"."""
    is_file = bool(name) and re.search(r"\.(jsonl?|csv|parquet)(\.\w+)?$", name)
    if not name or name == "toy" or is_file or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def names_in(value: str | list[str] | dict[str, str] | None) -> list[str]:
    """The names that an option holds: one, a list, or those of a dict."""
    return [value] if isinstance(value, str) else list(value.values() if isinstance(value, dict) else value or ())


def _sets(data: dict[str, Any]) -> dict[str, Any]:
    """The data report with a split's several sets as "split: set"."""
    return {
        f"{split}: {name}" if name else split: part
        for split, report in data.items()
        for name, part in report.get("sets", {"": report}).items()
    }


def model_card(
    results: dict[str, Any],
    *,
    name: str,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    repo_id: str | None = None,
) -> str:
    """The model card of a run, YAML header and Markdown.

    Without secrets, and with local files and folders by their last name only. What a name holds cannot end the line,
    the header, a table or a code block that it stands in.

    Args:
        results: what results.json holds (`summary`, `config`, `adapter`, `layout`, `data`, and those of
            `rm.train.provenance.provenance`).
        name: of the run.
        base_model, datasets: their names on the hub (`hub_name`), as far as they are there.
        license: the hub's name of a licence, such as apache-2.0; None: the card says that none was given.
        repo_id: where on the hub the model goes.
    """
    config, summary, data = results["config"], results["summary"], _sets(results["data"])
    adapter = results["adapter"] or {}
    origin = adapter.get("base_model_name_or_path") or config["model_name_or_path"]  # what an adapter is over
    names = [origin, *(name for key in PATH_OPTIONS for name in names_in(config.get(key)))]
    local = {name: Path(name).name for name in names if name != base_model and name not in datasets}
    is_adapter = config["use_peft"] and not config["merge_adapter"]

    def plain(value: Any) -> str:
        return _one_line(_without_paths(str(value), local))

    def code(value: Any) -> str:
        return f"`{plain(value).replace('`', chr(39)) or ' '}`"

    formats = {split["format"] for split in data.values()}
    base = f"a local folder called {code(origin)}; what it is, this card does not know"
    if base_model:
        revision = adapter.get("revision") or ("main" if adapter else config["model_revision"])
        base = f"[{base_model}](https://huggingface.co/{base_model}), revision {code(revision)}"
    sections = [
        f"# {_escape(plain(name))}",
        "A reward model: it gives an answer to a prompt a number, the higher the better by the preferences that it was "
        "trained on. Differences between answers to one prompt are what it was trained for (sigmoid of the difference: "
        "how probably the first is preferred); the zero point and the scale mean nothing by themselves.",
        f"- base model: {base}\n"
        f"- saved as: {'a PEFT adapter, which needs the base model' if is_adapter else 'a whole model'}\n"
        f"- licence: {code(license) if license else 'none was given; ask the author, and see that of the base model'}",
        "## Use",
        _usage(results, repo_id, is_adapter, formats),
        "## Data",
        "\n".join(_data_table(data, code)),
        _data_notes(),
        "## Training",
        "\n".join(_training(config, summary, adapter, origin, code)),
        "## Evaluation",
        "\n".join(_metrics(summary, code)),
        "Intervals are at 95%, by the bootstrap over prompts. The evaluation is on the pairs named above "
        "only; how the model does on other prompts, in other languages, or on answers made to please it is unknown.",
        "## Where it comes from",
        "\n".join(_provenance(results, code, plain)),
    ]
    tests = [split["source"] for name, split in data.items() if name.startswith("test")]
    accuracy, test_name = summary.get("eval/accuracy"), plain(" + ".join(tests))
    result = EvalResult(
        task_type="text-classification",
        task_name="preference between two answers",
        dataset_type=re.sub(r"[^\w/.-]+", "-", next(iter(datasets), test_name)),
        dataset_name=test_name,
        metric_type="accuracy",
        metric_name="pairwise accuracy",
        metric_value=accuracy,
    )
    header = ModelCardData(
        base_model=base_model,
        datasets=list(datasets) or None,
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "bradley-terry", *(["peft"] if config["use_peft"] else [])],
        metrics=["accuracy"],
        model_name=plain(name),
        eval_results=[result] if isinstance(accuracy, float) else None,  # NaN is a text here
    )
    card = f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return redact(card, "commit")  # 40 hexadecimal digits are a commit here


def _usage(results: dict, repo_id: str | None, is_adapter: bool, formats: set[str]) -> str:
    """How to load the model and give a text its reward: one block of Python, and what it must be given."""
    config = results["config"]
    remote = ", trust_remote_code=True" if config["trust_remote_code"] else ""
    head = "import torch\n"
    if is_adapter:
        options = f"num_labels=1, dtype={config['dtype']!r}{remote}"
        if config["load_in_4bit"] or config["load_in_8bit"]:  # rewards are those of the quantised base
            quantization = quantization_config(**{name: config[name] for name in QUANTIZATION_OPTIONS})
            head += "from transformers import BitsAndBytesConfig\n"
            arguments = [f"{k}={v!r}" for k, v in quantization.to_diff_dict().items() if not k.startswith("_")]
            options += f", quantization_config=BitsAndBytesConfig({', '.join(arguments)})"
        head += "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer\n"
        load = f"model = AutoPeftModelForSequenceClassification.from_pretrained(folder, {options}).eval()\n"
        load += "model.config.pad_token_id = tokenizer.pad_token_id\n"
        what = (
            "The adapter holds neither the type of the weights under it nor the pad token, by which transformers finds "
            "the last token of a padded row: both are said again. `adapter_config.json` names the base model; where "
            "that is a folder of the machine it was trained on, put the place of your copy there."
        )
    else:
        head += "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        load = f"model = AutoModelForSequenceClassification.from_pretrained(folder{remote}).eval()\n"
        what = 'The same through `pipeline("text-classification", model=folder, function_to_apply="none")`.'
    kwargs = f", **{config['chat_template_kwargs']!r}" if config.get("chat_template_kwargs") else ""
    if any(name.startswith("conversation") for name in formats):
        text = CONVERSATION.format(kwargs=kwargs)
        rendered = (
            "Conversations were rendered by the chat template saved with the tokenizer, prompt and answer together and "
            "without a generation prompt; the template brings all special tokens. Tools of a pair went to it too."
        )
    elif any(name.startswith("text") for name in formats):
        text = TEXT + (EOS if config["add_eos"] else "")
        end = "with the EOS token at the end" if config["add_eos"] else "without an EOS token at the end"
        rendered = f"Texts were prompt and answer as they are, with the tokenizer's default special tokens, {end}."
    else:
        text = TEXT
        rendered = (
            "The data came as token ids: how its texts were rendered and ended is not known here. Render as they were."
        )
    if config["max_length"]:
        rendered += f" No sequence in training was longer than {config['max_length']:,} tokens."
    where = repr(repo_id) if repo_id else '"."  # the folder of this card'
    block = (
        f"{head}\nfolder = {where}\ntokenizer = AutoTokenizer.from_pretrained(folder{remote})\n{load}\n{text}"
        "with torch.no_grad():\n    reward = model(torch.tensor([ids])).logits[0, 0].item()\nprint(reward)\n"
    )
    return f"```python\n{block}```\n\n{rendered}\n\n{what}"


def _data_table(data: dict, code) -> list[str]:
    """A row a split: where the pairs come from, how many were read, dropped and used."""
    rows = ["| | source | format | pairs read | dropped | used | fingerprint |", "| --- " * 7 + "|"]
    for name, split in data.items():
        dropped = ", ".join(
            f"{split[why]:,} {meaning}"
            for why, meaning in (("over_length", "too long"), ("empty", "empty"), ("identical", "with equal answers"))
            if split[why]
        )
        cells = [code(name), code(split["source"]), split["format"], f"{split['total']:,}", dropped or "none"]
        rows.append(_row([*cells, f"{split.get('drawn', split['kept']):,}", f"`{split['fingerprint'][:16]}`"]))
    for name, split in data.items():
        if split.get("weight", 1) != 1:
            of = f"{split['drawn']:,} drawn of {split['kept']:,}"
            rows += ["", f"{code(name)}: weight {split['weight']:g}, that is {of} pairs in an epoch."]
        for key, meaning in (
            ("truncated", "cut at the start of the prompt"),
            ("duplicate", "used though the same pair came before"),
            ("contradictory", "used though the same two answers also come with the opposite label"),
            ("in_train", "used though the training set has the same two answers"),
        ):
            if split.get(key):
                rows += ["", f"{code(name)}: {meaning}: {split[key]:,} pairs."]
    return rows


def _data_notes() -> str:
    labels = "What the labels mean, who gave them and under what licence the data is, this card does not know."
    what = "A fingerprint is of the tokens and margins of the pairs, in their order; of several data sets, before any "
    return f"{what}are drawn by weight. {labels}"


def _training(config: dict, summary: dict, adapter: dict, origin: str, code) -> list[str]:
    margin = "score_chosen − score_rejected" if config["margin_from_scores"] else "that of the data, if it has any"
    centering, smoothing = config["center_rewards_coefficient"], config["label_smoothing_factor"]
    weights = "all weights"
    if config["use_peft"]:
        layers = ", ".join(sorted(names_in(config["lora_target_modules"] or adapter.get("target_modules")))) or "none"
        weights = f"the adapter ({adapter['peft_type']}, layers {code(layers)}) and the head"
        if adapter["peft_type"] == "LORA":
            weights = f"LoRA and the head (r {adapter['r']}, alpha {adapter['lora_alpha']}, dropout "
            kinds = {"use_rslora": "rank-stabilised", "use_dora": "DoRA"}
            kinds = [name for key, name in kinds.items() if adapter.get(key)]
            weights += ", ".join([f"{adapter['lora_dropout']}", *kinds, f"layers {code(layers)})"])
        if origin != config["model_name_or_path"]:
            weights += f", going on from the adapter {code(config['model_name_or_path'])}"
        bits = 4 * config["load_in_4bit"] + 8 * config["load_in_8bit"]
        weights += f", over a base quantised to {bits} bits" if bits else ""
        weights += ", merged into the weights" if config["merge_adapter"] else ""
    limit = f"max_steps {config['max_steps']}" if config["max_steps"] > 0 else f"epochs: {config['num_train_epochs']:g}"
    best = []
    if config["load_best_model_at_end"] and "train/best_step" in summary:
        best = [f"- weights: of the best evaluation, after step {summary['train/best_step']:,}"]
    head_rate = f" (head: {config['head_learning_rate']:g})" if config["head_learning_rate"] else ""
    warmup = config["warmup_steps"] or config["warmup_ratio"]
    warmup = f"{warmup:g} of the steps" if warmup < 1 else f"{warmup:g} steps"
    return [
        *best,
        f"- steps: {summary['train/steps']:,} of {config['train_batch_size']:,} pairs ({limit}), seed {config['seed']}",
        f"- learning rate: {config['learning_rate']:g} at most{head_rate}, schedule "
        f"{code(config['lr_scheduler_type'])}, warm-up {warmup}; "
        f"optimizer {code(config['optim'])}, weight decay {config['weight_decay']:g}, "
        f"gradient norm clipped to {config['max_grad_norm'] or 'nothing'}",
        f"- trained: {weights}",
        f"- loss: Bradley-Terry, −log sigmoid(r_chosen − r_rejected − margin); margin: {margin}; centering: "
        f"{f'{centering:g} (r_chosen + r_rejected)²' if centering else 'none'}; label smoothing: {smoothing or 'none'}",
        f"- sequences: at most {config['max_length'] or 'any number of'} tokens; pairs that are longer: "
        f"{code(config['overlength'])}",
        f"- numbers: weights {code(config['dtype'])}, autocast {code(config['mixed_precision'])}; head, rewards and "
        "loss float32",
        "- every other option: `config.yaml`, `results.json`",
    ]


def _metrics(summary: dict, code) -> list[str]:
    low, high = (_number(summary.get(f"eval/accuracy_{side}")) for side in ("low", "high"))
    rows = [
        "| held-out pairs | pairs | accuracy (95% interval) | loss |",
        "| --- | --- | --- | --- |",
        _row(
            [
                "all",
                _number(summary.get("eval/pairs")),
                f"**{_number(summary.get('eval/accuracy'))}** ({low} to {high})",
                _number(summary.get("eval/loss")),
            ]
        ),
    ]
    for key in summary:
        subset = key.removeprefix("eval/").removesuffix("/accuracy")
        if key == f"eval/{subset}/accuracy":
            ends = [summary.get(f"eval/{subset}/accuracy_{side}") for side in ("low", "high")]
            interval = f" ({_number(ends[0])} to {_number(ends[1])})" if None not in ends else ""
            pairs, loss = summary.get(f"eval/{subset}/pairs"), summary.get(f"eval/{subset}/loss")
            rows.append(_row([code(subset), _number(pairs), _number(summary[key]) + interval, _number(loss)]))
    rows += ["", "Accuracy is the share of pairs whose chosen answer got the higher reward; a tie counts half."]
    if "eval/accuracy_ceiling" in summary:
        rows += ["", f"The best accuracy possible on these pairs is {_number(summary['eval/accuracy_ceiling'])}."]
    return rows


def _provenance(results: dict, code, plain) -> list[str]:
    machine, summary = results["machine"], results["summary"]
    commit = f"commit `{results['git_commit']}`" if results["git_commit"] else "a commit that is not known"
    changed = " with changes that are not committed (in `results.json`)" if results["git_diff"] else ""
    device = ", ".join(machine["gpus"]) or f"{machine['cpus']} CPU cores, no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    command = " ".join(plain(_short_argument(word)) for word in results["command"])
    return [
        f"- program: `train_rm.py` at {commit}{changed}",
        f"- packages: python {machine['python']}, {versions}",
        f"- machine: {code(device)}; {_number(summary.get('speed/train_seconds'))} s of training",
        f"- layout of the rows: {code(results['layout'])}",
        "",
        "The command, with local files and folders by their last names:",
        "",
        f"```\n{command.replace('```', '')}\n```",
    ]


# ---------------------------------------------------------------------------------------------- texts


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "–")


def _one_line(text: str, limit: int = 400) -> str:
    """`text` in one line, printable and not endless."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + "…"


def _escape(text: str) -> str:
    """`text` with everything that means something in Markdown or HTML made plain."""
    return re.sub(r"([\\`*_{}\[\]()#+!<>|~&-])", r"\\\1", text)


def _short_argument(word: str) -> str:
    """An argument of a command line; a value that is a path from the root or the home, by its last name."""
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if re.match(r"[/\\~]|[A-Za-z]:[/\\]", value) else word


def _without_paths(text: str, local: dict[str, str]) -> str:
    """`text` with the names of `local` and every path from the root or the home shortened to the last part."""
    for path, last in sorted(local.items(), key=lambda item: -len(item[0])):
        if "/" in path or "\\" in path:
            text = text.replace(path, last)
    return re.sub(ABSOLUTE, lambda m: re.split(r"[/\\]", m[0].rstrip("/\\"))[-1], text)
