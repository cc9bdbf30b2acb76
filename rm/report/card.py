"""The model card, README.md of the output directory: results.json for people and for the hub."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rm.config.redact import redact
from rm.data.audit import MEANING
from rm.model.adapters import quantization_config
from rm.report.read_run import changed_options

PATH_OPTIONS = (
    "model_name_or_path dataset_name eval_dataset_name chat_template_path peft_config output_dir resume_from_checkpoint"
).split()
ABSOLUTE = r"(?<![\w.:/\\~<-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:\]})]+)+[/\\]?"  # a path, in any text
ADAPTER_SETTINGS = "peft_type r lora_alpha lora_dropout use_rslora use_dora target_modules target_parameters".split()
COUNTS = "over_length empty identical truncated truncated_answer duplicate contradictory in_train".split()


def hub_name(name: str | None) -> str | None:
    """`name` if it is one of a model or data set on the hub; None for local files and directories, and for "toy"."""
    is_file = re.search(r"\.(jsonl?|csv|parquet)(\.\w+)?$", name or "")
    try:
        validate_repo_id(name)
        return None if name in (None, "toy") or is_file or Path(name).exists() else name
    except HFValidationError:
        return None


def model_card(results: dict[str, Any], *, name: str, repo_id: str | None = None) -> str:
    """The model card of the run `name`, YAML header and Markdown, from the content of results.json.

    It has no secrets, and local files and directories by their last name only. Names cannot end the line, the header,
    the table or the code block that they stand in. `repo_id`: where on the hub the model goes.
    """
    config, summary, adapter = results["config"], results["summary"], results["adapter"] or {}
    origin = adapter.get("base_model_name_or_path") or config["model_name_or_path"]  # what an adapter is over
    base_model = hub_name(origin)
    named = {key: config.get(key) or () for key in PATH_OPTIONS}  # one name, a list, or a dict of names
    named = {k: [v] if isinstance(v, str) else list(v.values() if isinstance(v, dict) else v) for k, v in named.items()}
    datasets = list(dict.fromkeys(filter(hub_name, named["dataset_name"] + named["eval_dataset_name"])))
    local = {path for path in [origin, *sum(named.values(), [])] if re.search(r"[/\\]", path)} - {base_model, *datasets}
    data = {
        f"{split}: {part}" if part else split: counts
        for split, report in results["data"].items()
        for part, counts in report.get("sets", {"": report}).items()
    }

    def plain(value: Any) -> str:
        """A value in one printable line of at most 400 characters, without paths."""
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for path in sorted(local, key=len, reverse=True):
            value = value.replace(path, Path(path).name)
        value = re.sub(ABSOLUTE, lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)
        value = " ".join("".join(c if c.isprintable() else " " for c in value).split())
        return value if len(value) <= 400 else value[:400] + "…"

    quantization = ""
    if config["load_in_4bit"] or config["load_in_8bit"]:  # rewards are those of the quantized base
        settings = quantization_config(SimpleNamespace(**config)).to_diff_dict()
        arguments = [f"{key}={value!r}" for key, value in settings.items() if not key.startswith("_")]
        quantization = f", quantization_config=BitsAndBytesConfig({', '.join(arguments)})"
    tests = plain(" + ".join(part["source"] for split, part in data.items() if split.startswith("test")))
    measured = dict(task_type="text-classification", metric_type="accuracy", metric_name="pairwise accuracy")
    measured |= dict(dataset_type=re.sub(r"[^\w/.-]+", "-", next(iter(datasets), tests)), dataset_name=tests)
    result = EvalResult(**measured, metric_value=summary.get("eval/accuracy"))
    header = ModelCardData(
        base_model=base_model,
        datasets=datasets or None,
        license=config["license"],
        library_name="peft" if config["use_peft"] and not config["merge_adapter"] else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", config["loss_type"].replace("_", "-"), *(["peft"] if config["use_peft"] else [])],
        model_name=plain(name),
        eval_results=[result] if isinstance(result.metric_value, float) else None,  # NaN is a text in results.json
    )
    parts = [found[1] for key in summary if (found := re.fullmatch(r"eval/(.+)/accuracy", key, re.S))]
    card = ModelCard.from_template(
        header,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        name=re.sub(r"([\\`*_{}\[\]()#+!<>|~&-])", r"\\\1", plain(name)),
        repo_id=repo_id,
        results=results,
        data=data,
        kinds={part["format"].split("_")[0] for part in data.values()},
        audit={count: MEANING[count] for count in COUNTS},
        evaluated={"all": "eval/"} | {part: f"eval/{part}/" for part in parts},
        changed=changed_options(config),
        command=" ".join(map(plain, results["command"])),
        origin=origin,
        adapter={key: adapter[key] for key in ADAPTER_SETTINGS if adapter.get(key)},
        quantization=quantization,
        **{"plain": plain, "number": number, "repr": repr},
    )
    return redact(str(card), "commit")  # 40 hexadecimal digits are a commit here


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "–")
