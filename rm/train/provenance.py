"""Where a run's numbers come from: code, packages, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from torch import nn

from rm.config.redact import redact, redact_arguments

PASSING = ("_name_or_path", "architectures", "transformers_version")  # in a model's configuration, no part of it
PACKAGES = ("torch", "accelerate", "transformers", "datasets", "peft", "wandb", "tokenizers")


def model_fingerprint(model: nn.Module) -> str:
    """A sha256 over a model's configuration and the names, shapes, types and contents (CRC-32) of all its weights."""
    lines = [{k: v for k, v in model.config.to_diff_dict().items() if k not in PASSING}]
    for name, p in model.named_parameters():
        raw = p.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        lines.append([name, list(p.shape), str(p.dtype), zlib.crc32(raw)])
    return hashlib.sha256(json.dumps(lines, sort_keys=True, default=str).encode()).hexdigest()


def git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this code; None outside a checkout or without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance() -> dict:
    """The command, the commit and what differs from it, package versions, and the machine; for `results.json`.

    Without secrets (`rm.redact`).
    """
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": redact_arguments(sys.argv),
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": redact(git("diff", "HEAD")),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine,
    }
