"""Upload a run to the Hugging Face Hub, on the main process: errors at the start, warnings after that."""

import logging
import re
import shlex
from concurrent.futures import Future, wait
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.redact import redact

logger = logging.getLogger(__name__)

SILENCE = 60.0  # seconds without a byte after which a request fails
FILES = (  # the model, its tokenizer, and what describes them: neither texts of the data nor files of trackers
    "README.md config.yaml results.json data_report.json metrics.jsonl *config.json model*.safetensors "
    "model.safetensors.index.json adapter_model*.safetensors tokenizer*.json *.model *.tiktoken vocab.* merges.txt "
    "special_tokens_map.json added_tokens.json chat_template.* modeling_*.py configuration_*.py tokenization_*.py"
).split()


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
