"""A saved reward model, ready to score any number of answers to a prompt, the prompt computed once, in one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import numpy as np
import torch

from rm.config.errors import InputError
from rm.config.options import QuantizationOptions, TokenOptions
from rm.config.section import fields_of
from rm.data.formats import Encoding, RowError
from rm.data.tokenize import Tree
from rm.forward import choose_layout
from rm.model.load import load_saved_model, load_tokenizer
from rm.model.precision import cast_weights, is_half_precision, set_tf32
from rm.model.reward_model import max_positions, unwrapped
from rm.model.saved import RENDERED, conversations_from_text, read_result, read_scale, recorded_config
from rm.score.inputs import encode_inputs, read_input
from rm.score.rewards import TreeList, score_prompts

logger = logging.getLogger(__name__)

ACCEPTED = (*fields_of(TokenOptions), *fields_of(QuantizationOptions), "dtype", "trust_remote_code")
ACCEPTED += ("micro_batch_tokens", "layout", "mixed_precision", "eval_dtype", "tf32")
TREE_TOKENS = 512  # 30 answers of 60 tokens to a prompt of 120, SmolLM2 on a CPU: 0.87 of the time of one tree


class Scorer:
    """A saved reward model: `load_scorer("runs/my_run").rewards([{"prompt": …, "responses": […]}])`.

    It is on the accelerator if there is one. The rewards are those of `rm.evaluate`: the options are those of the run's
    config.yaml (of a model from elsewhere: the defaults).

    Args:
        model: the output folder of a run, or a hub name.
        normalize: return (r - mean) / std, with the moments of the rewards of answers of the training set.
        options: of `RewardConfig` (`ACCEPTED`). Without `max_length` only the model's positions limit
            a sequence; without `micro_batch_tokens` it is twice the training's, or its `eval_micro_batch_tokens`.

    Raises:
        InputError: one line.
    """

    def __init__(self, model: str, *, normalize: bool = False, **options: Any):
        if unknown := [name for name in options if name not in ACCEPTED]:
            raise InputError(f"{unknown[0]}: has no effect in scoring; there are {', '.join(ACCEPTED)}")
        config = recorded_config(model, {"dataset_name": "toy"} | options)  # no data set is read
        set_tf32(config.tf32)
        self.name, self.tokenizer = model, load_tokenizer(config)
        self.model = load_saved_model(model, self.tokenizer, config).eval()
        scale = read_scale(model, self.model) if normalize else {"reward_mean": 0.0, "reward_std": 1.0}
        self.mean, self.std = scale["reward_mean"], scale["reward_std"]
        as_conversation, why = conversations_from_text(config, self.tokenizer)
        if self.tokenizer.chat_template:
            logger.info(RENDERED, "conversations" if as_conversation else "text", why)
        self.encoding = Encoding(
            add_eos=config.add_eos,
            text_as_conversation=as_conversation,
            chat_template_kwargs=config.chat_template_kwargs or {},
            max_length=config.max_length if "max_length" in options else None,
            overlength=config.overlength if "overlength" in options else "drop",
            vocab_size=max(self.tokenizer.get_vocab().values()) + 1,
        )
        self.micro_batch_tokens = config.micro_batch_tokens
        if "micro_batch_tokens" not in options:
            self.micro_batch_tokens = config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens
        has_accelerator = torch.accelerator.is_available()
        self.device = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
        if not getattr(unwrapped(self.model.classifier), "is_quantized", False):  # bitsandbytes chose the device
            self.model = self.model.to(self.device)
        self.max_positions = max_positions(self.model.config)
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
        self.tolerance = 5e-2 if is_half_precision(self.model, config.mixed_precision, config.tf32) else 1e-4
        trees, pad = _random_trees(self.tokenizer), self.tokenizer.pad_token_id
        self.layout = choose_layout(config.layout, self.model, trees, pad, self.tolerance)
        self._cast = ExitStack()  # for as long as the scorer lives
        self._cast.enter_context(cast_weights(self.model, config.eval_dtype))

    def rewards(self, records: Sequence[dict]) -> list[np.ndarray]:
        """The rewards of each input's answers, float64 [1], [N] or [2] (chosen, rejected); see `rm.score.inputs`.

        Raises:
            InputError: an input cannot be scored; names its index.
        """
        trees = self.encode(records)
        for i, tree in enumerate(trees):
            if isinstance(tree, RowError):
                raise InputError(f"input {i}: {tree}")
        return self.score(trees)

    def encode(self, records: Sequence[Any]) -> list[Tree | RowError]:
        """Each input's token ids, or what is wrong with it."""
        return encode_inputs(records, self.tokenizer, self.encoding, self.max_positions)

    def warn_of_kind(self, records: Sequence[Any]) -> None:
        """Warn if the inputs are texts for a model that was trained on conversations alone, or the other way round."""
        formats = str(read_result(self.name, "data", "train", "format") or "").split(", ")
        trained = {"tokens" if name == "tokenized" else name.split("_")[0] for name in formats}
        for record in records if trained in ({"text"}, {"conversation"}) else ():
            with suppress(RowError):
                if (kind := read_input(record, self.encoding).kind) not in trained | {"tokens"}:
                    logger.warning(f"inputs are {kind}, and the model was trained on {trained.pop()}")
                    return

    def score(self, trees: Sequence[Tree]) -> list[np.ndarray]:
        """The rewards of each tree's answers, float64 [N]."""
        if not trees:
            return []
        pieces = TreeList([piece for tree in trees for piece in self._split(tree)])
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            scored = score_prompts(self.model, pieces, self.layout, self.micro_batch_tokens)
        rewards = (np.concatenate(scored) - self.mean) / self.std
        return np.split(rewards, np.cumsum([len(tree.answers) for tree in trees])[:-1])

    def _split(self, tree: Tree) -> list[Tree]:
        """The tree as several, each with its prefix, so that one fits into a forward pass if a single answer does.

        A kernel that computes a tree's whole square, though no answer sees another one, gets trees of `TREE_TOKENS`,
        or of twice the prefix.
        """
        limit = min(self.micro_batch_tokens, max(TREE_TOKENS, 2 * len(tree.prefix)))
        parts = [Tree(tree.prefix, [])]
        for answer in tree.answers:
            if parts[-1].answers and len(parts[-1]) + len(answer) > limit:
                parts.append(Tree(tree.prefix, []))
            parts[-1].answers.append(answer)
        return parts


def _random_trees(tokenizer: Any, count: int = 4) -> TreeList:
    """Pairs of random ordinary tokens, on which the layout is verified."""
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    vocabulary, rng = np.array(sorted(ordinary) or [tokenizer.pad_token_id]), np.random.default_rng(0)
    draws = [[rng.choice(vocabulary, n) for n in (20 + i, 8, 5 + i)] for i in range(count)]
    return TreeList([Tree(prefix, answers) for prefix, *answers in draws])
