"""A run on the Hugging Face Hub: looked for before training, filled in the background, and unable to harm the run.

A wrong token or name, or a hub that does not answer, is an error at the start, before hours of training. After that
nothing that the hub does ends, delays or changes the training: uploads have a thread of their own, and a failed one
costs a warning. Only the main process has anything to do with it.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import threading
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.logging import set_verbosity_error

from rm.config.errors import InputError
from rm.config.files import write_text
from rm.config.redact import HIDDEN, redact
from rm.log.trackers import TrackerThread

logger = logging.getLogger(__name__)

CHECK_SECONDS = 60.0  # for the hub's answers at the start
SILENCE = 60.0  # seconds without a byte after which a request is given up (and tried again, five times)
PATIENCE, BYTES_PER_SECOND = 600.0, 1e6  # an upload at the end may take so long, and a second more for so many bytes
STOP_SECONDS = 15.0  # for an upload that is under way when the run is stopped; launchers kill after 30

# What goes to the hub of the output folder: the model, its tokenizer, and what describes them. No samples, which hold
# texts of the data, no tracker's files, and nothing else that lies there.
FILES = (
    "README.md config.json config.yaml results.json data_report.json metrics.jsonl generation_config.json "
    "model*.safetensors model.safetensors.index.json adapter_config.json adapter_model*.safetensors "
    "tokenizer*.json tokenizer.model *.tiktoken spiece.model sentencepiece*.model special_tokens_map.json "
    "added_tokens.json vocab.* merges.txt *processor_config.json chat_template.* "
    "modeling_*.py configuration_*.py tokenization_*.py"
).split()


def run_files(folder: Path) -> list[str]:
    """The files of a finished run that go to the hub, by their paths in `folder`."""
    places = (folder, folder / "adapter")  # the second: what was merged (`merge_adapter`)
    files = [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_file()]
    wanted = [path for path in files if any(fnmatch(path.name, pattern) for pattern in FILES)]
    names = [path.relative_to(folder).as_posix() for path in wanted]
    return [name for name in names if name != "adapter/README.md"]  # PEFT's, with the path of the base model in it


def open_repo(name: str, *, token: str | None, private: bool | None = None, revision: str | None = None) -> str:
    """Find or make the repository of a run, and see that it may be written to; returns its full name.

    Args:
        name: "user/name", or "name" for one of the token's user.
        token: None: that of HF_TOKEN or `hf auth login`.
        private: of a new one; None: as the account's default is.
        revision: branch to push to, made if need be; None: main.

    Raises:
        InputError: no or a wrong token, no right to write there, or no answer within `CHECK_SECONDS`.
    """
    if is_offline_mode():
        raise InputError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or train without push_to_hub and push later")
    if "/" not in name:  # a run may be called what a repository may not
        name = re.sub(r"[^\w.-]+|--+|\.\.+", "-", name, flags=re.ASCII).strip("-.")[:96].strip("-.")
    disable_progress_bars()  # they would stand in the training's
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # addresses for uploading are signed: they are secrets
    set_verbosity_error()  # so of its retries
    set_client_factory(_client)
    api, answer = HfApi(token=token), Future()

    def ask() -> None:
        try:
            user = api.whoami()["name"]
            repo_id = api.create_repo(name if "/" in name else f"{user}/{name}", private=private, exist_ok=True).repo_id
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.auth_check(repo_id, write=True)
            answer.set_result(repo_id)
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="hub-check", daemon=True).start()
    try:
        return answer.result(timeout=CHECK_SECONDS)
    except TimeoutError:
        why = f"no answer within {CHECK_SECONDS:g} s"
    except Exception as error:
        why = explain(error, token)
    fix = "mend that, or train without push_to_hub and push later"
    raise InputError(f"push_to_hub: {api.endpoint} does not take {name} ({why}); {fix}")


class Hub:
    """The repository of one run, from `open_repo`; for the main process."""

    def __init__(self, repo_id: str, *, token: str | None, revision: str | None = None, strategy: str = "end"):
        """`strategy`: "end"; "checkpoint": also each checkpoint, to last-checkpoint/; "all_checkpoints": each to its
        own checkpoints/step-N/."""
        self.repo_id, self.token, self.revision, self.strategy = repo_id, token, revision, strategy
        self._thread = TrackerThread("hub")
        self._last: Future = Future()  # of the last checkpoint
        self._last.set_result(None)
        self._newest: Path | None = None
        self._waiting_bytes = 0

    def push_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint in the background, if the strategy asks for it. Waits for nothing.

        "checkpoint" leaves out those that are not the newest any more when their turn comes.
        """
        if self.strategy == "end":
            return
        place = "last-checkpoint" if self.strategy == "checkpoint" else f"checkpoints/{folder.name}"
        files = [path.name for path in folder.iterdir()]
        self._newest = folder
        self._last = self._upload("a checkpoint", folder, files, place, f"Checkpoint {folder.name}")

    def push_run(self, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
        """Upload a finished run, and wait for it. Returns `summary` with the outcome as "hub", as in results.json then.

        The outcome is {"repo", "revision", "pushed", "url" or "error"}. A failure loses nothing and is a warning that
        names the command which does it later. A run that is there already is not uploaded again.
        """
        outcome = {"repo": self.repo_id, "revision": self.revision or "main"}
        before = summary.get("hub") or {}
        if before.get("pushed") and outcome.items() <= before.items():
            return summary
        files = run_files(folder)
        limit = PATIENCE + (self._waiting_bytes + _size(folder, files)) / BYTES_PER_SECOND
        done = self._upload("the run", folder, files, None, f"{folder.resolve().name}, at the end of its training")
        try:
            outcome |= {"pushed": True, "url": done.result(timeout=limit).commit_url}
            logger.info(f"hub: pushed to {outcome['url']}")
        except Exception as error:
            why = f"not done within {limit:.0f} s" if isinstance(error, TimeoutError) else str(error)
            outcome |= {"pushed": False, "error": why}
            self.close(0)
            logger.warning(f"hub: {self.repo_id} has not got the run ({why}); it is whole in {folder}. Later:")
            logger.warning(self.command(folder, files))
        summary = summary | {"hub": outcome}
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        write_text(folder / "results.json", json.dumps(results | {"summary": summary}, indent=2))
        return summary

    def command(self, folder: Path, files: list[str]) -> str:
        """The command line that uploads a finished run."""
        words = ["hf", "upload", self.repo_id, str(folder), "."]
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join([*words, *(word for name in files for word in ("--include", name))])

    def close(self, seconds: float = STOP_SECONDS) -> None:
        """Wait so long for a checkpoint that is on its way, and give up what is not done then."""
        try:
            self._last.exception(timeout=seconds)
        except TimeoutError:
            logger.warning("hub: the last checkpoint is not uploaded yet; it is whole in the output folder")
        if not self._last.done() or seconds == 0:
            self._thread.given_up = True
            set_client_factory(_no_client)  # and closes the one there is, so that no thread holds the process

    def _upload(self, what: str, folder: Path, files: list[str], place: str | None, message: str) -> Future:
        size = _size(folder, files)
        self._waiting_bytes += size

        def upload():
            try:
                if place == "last-checkpoint" and folder != self._newest:
                    return None
                return HfApi(token=self.token).upload_folder(
                    repo_id=self.repo_id,
                    folder_path=folder,
                    path_in_repo=place,
                    allow_patterns=files,
                    revision=self.revision,
                    commit_message=message,
                )
            except BaseException as error:
                raise InputError(explain(error, self.token)) from None
            finally:
                self._waiting_bytes -= size

        return self._thread.call(f"upload of {what}", upload)


def explain(error: BaseException, token: str | None) -> str:
    """What went wrong with the hub, in one line and without the token."""
    text = f"{type(error).__name__}: {error}" + (f" ({error.__cause__!r})" if error.__cause__ else "")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        text = f"{error.response.status_code}: {error.server_message or str(error)}"
    text = re.sub(r"\?[^\s'\"]+=[^\s'\"]+", "", redact(" ".join(text.split())))  # what signs an address for uploading
    text = text.replace(token, HIDDEN) if token else text
    return text if len(text) < 300 else text[:300] + "…"


def _size(folder: Path, files: list[str]) -> int:
    return sum((folder / name).stat().st_size for name in files)


def _client():
    """huggingface_hub's HTTP client, which by itself waits for ever."""
    client = default_client_factory()
    client.timeout = SILENCE
    return client


def _no_client():
    raise InputError("given up")
