"""A run on the Hugging Face Hub: the model card, and the upload on the main process.

Errors of the upload are raised at the start; after that they are warnings.
"""

import json
import logging
import re
import shlex
from concurrent.futures import Future, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, set_client_factory
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from huggingface_hub.utils._http import default_client_factory

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.redact import redact
from rm.data.audit import MEANING
from rm.model.adapters import quantization_config
from rm.report.read_run import changed_options

logger = logging.getLogger(__name__)

SILENCE = 60.0  # seconds without a byte after which a request fails
FILES = (  # the model, its tokenizer, and what describes them: neither texts of the data nor files of trackers
    "README.md config.yaml results.json data_report.json metrics.jsonl *config.json model*.safetensors "
    "model.safetensors.index.json adapter_model*.safetensors tokenizer*.json *.model *.tiktoken vocab.* merges.txt "
    "special_tokens_map.json added_tokens.json chat_template.* modeling_*.py configuration_*.py tokenization_*.py"
).split()
PATH_OPTIONS = "model_name_or_path dataset_name eval_dataset_name chat_template_path peft_config output_dir".split()
PATH_OPTIONS += ["resume_from_checkpoint"]
ABSOLUTE = r"(?<![\w.:/\\~<-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:\]})]+)+[/\\]?"  # a path, in any text
ADAPTER_SETTINGS = "peft_type r lora_alpha lora_dropout use_rslora use_dora target_modules target_parameters".split()
COUNTS = "over_length empty identical truncated truncated_answer duplicate contradictory in_train".split()


def run_files(folder: Path) -> list[str]:
    """The files of a finished run that go to the hub, by their paths in `folder`; adapter/ holds a merged adapter."""
    paths = [path for place in ("", "adapter/") for pattern in FILES for path in folder.glob(place + pattern)]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {"adapter/README.md"})  # PEFT wrote that


def open_repo(config: RewardConfig, run_name: str) -> str:
    """Find or create the repository of a run; returns its full name. Raises `InputError` if it cannot be written to."""
    name = config.hub_model_id or re.sub(r"[^\w.-]+|--+|\.\.+", "-", run_name, flags=re.A).strip("-.")[:96].strip("-.")
    disable_progress_bars()
    for verbose in ("httpx2", "huggingface_hub"):  # one logs signed addresses, the other every retry
        logging.getLogger(verbose).setLevel(logging.ERROR)
    set_client_factory(_client)
    api = HfApi(token=config.hub_token or True)  # True: an error if there is none
    try:
        repo_id = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
        if config.hub_revision not in (None, "main"):
            api.create_branch(repo_id, branch=config.hub_revision, exist_ok=True)
        api.auth_check(repo_id, write=True)
        return repo_id
    except (HTTPError, OSError, ValueError) as error:
        fix = "fix this, or train without push_to_hub and upload later"
        raise InputError(f"push_to_hub: {api.endpoint} does not accept {name} ({_why(error)}); {fix}") from error


class Hub:
    """The repository of one run (from `open_repo`). Uploads run in order on the thread of `HfApi.run_as_future`."""

    def __init__(self, repo_id: str, config: RewardConfig):
        self.repo_id, self.revision, self.strategy = repo_id, config.hub_revision or "main", config.hub_strategy
        self.api, self.uploads = HfApi(token=config.hub_token), []

    def push_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint as `hub_strategy` says; for last-checkpoint/ it replaces one that still waits."""
        if self.strategy == "checkpoint":
            for upload in self.uploads:
                upload.cancel()
        if self.strategy != "end":
            place = "last-checkpoint" if self.strategy == "checkpoint" else f"checkpoints/{folder.name}"
            self._upload(folder, path_in_repo=place).add_done_callback(_warn)

    def push_run(self, folder: Path) -> dict[str, str | bool]:
        """Upload a finished run and wait for it; returns {"repo", "revision", "pushed", "url" or "error"}."""
        names, outcome = run_files(folder), {"repo": self.repo_id, "revision": self.revision}
        try:
            return outcome | {"pushed": True, "url": self._upload(folder, allow_patterns=names).result().commit_url}
        except Exception as error:
            words = ["hf", "upload", self.repo_id, str(folder), ".", "--revision", self.revision]
            command = shlex.join(words + [word for name in names for word in ("--include", name)])
            logger.warning(f"hub: the run in {folder} is not uploaded ({_why(error)}). To upload it:\n{command}")
            return outcome | {"pushed": False, "error": _why(error)}

    def close(self, seconds: float = 15.0) -> None:
        """Wait for the uploads of checkpoints when a run is stopped; launchers kill it after 30 s."""
        wait(self.uploads, timeout=seconds)

    def _upload(self, folder: Path, **options) -> Future:
        options |= dict(repo_id=self.repo_id, revision=self.revision, commit_message=f"Upload {folder.name}")
        self.uploads.append(self.api.upload_folder(folder_path=folder, run_as_future=True, **options))
        return self.uploads[-1]


def _warn(upload: Future) -> None:
    if not upload.cancelled() and (error := upload.exception()):
        logger.warning(f"hub: upload of a checkpoint failed ({_why(error)}); training continues")


def _why(error: BaseException) -> str:
    answer, errors = getattr(error, "server_message", None), (error, error.__cause__)
    text = f"{error.response.status_code}: {answer}" if answer else "; ".join(repr(e) for e in errors if e)
    return re.sub(r"\?\S+=\S+", "", redact(" ".join(text.split())))[:300]  # without the signature of an address


def _client():
    client = default_client_factory()
    client.timeout = SILENCE  # by default there is none
    return client


# ---------------------------------------------------------------- the model card
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
