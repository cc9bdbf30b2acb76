"""Tiny models on disk, made once per session (no test writes into them), and loaded as the program loads them."""

import atexit
import functools
import tempfile

import torch
from conftest import CAUSAL, COMMON, ENCODERS, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from rm.config.options import RewardConfig
from rm.data.tokenizer import load_tokenizer
from rm.model.load import load_reward_model

root = tempfile.TemporaryDirectory()
atexit.register(root.cleanup)


@functools.cache
def base(kind: str = "llama", pad_token: str | None = "<pad>", **extra) -> str:
    """A folder with a language model and its tokenizer."""
    folder = tempfile.mkdtemp(dir=root.name)
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **(COMMON | (CAUSAL | ENCODERS)[kind] | extra))
    auto.from_config(config).save_pretrained(folder)
    tiny_tokenizer(pad_token).save_pretrained(folder)
    return folder


def options(name, **more) -> RewardConfig:
    return RewardConfig(model_name_or_path=str(name), dataset_name="toy", **more)


def load(name, **more):
    """The `RewardModel` to train from the folder `name`."""
    return load_reward_model(load_tokenizer(options(name)), options(name, **more))
