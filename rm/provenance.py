"""Where a run's numbers come from: code, packages, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("torch", "accelerate", "transformers", "datasets", "peft", "wandb", "tokenizers")


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
    """The command, the commit and what differs from it, package versions, and the machine; for `results.json`."""
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": git("diff", "HEAD"),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine,
    }
