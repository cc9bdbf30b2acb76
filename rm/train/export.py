"""Save the final model so that plain transformers serves it, and check that what was saved gives the same rewards."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, pipeline

from rm.config.files import GO_ON, fsync_folder
from rm.model.adapters import load_trained, merge_trained
from rm.model.normalization import set_scale
from rm.model.reward_model import RewardModel

logger = logging.getLogger(__name__)


class ExportError(RuntimeError):
    """The final model could not be saved, or does not give the rewards of the evaluated one."""


def save_model(
    model: RewardModel,
    state_dict: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    merge_adapter: bool = False,
    scale: dict[str, float | int] | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization_config: BitsAndBytesConfig | None = None,
) -> None:
    """Write model and tokenizer to `output_dir` for `AutoModelForSequenceClassification.from_pretrained`.

    Args:
        model: the unwrapped `RewardModel`; its own tensors are not read (they may be shards).
        state_dict: all its weights on the CPU (`rm.train.checkpoint.full_state_dict`).
        merge_adapter: under PEFT, write the merged weights to `output_dir` and the adapter to `output_dir/adapter`;
            otherwise the adapter goes to `output_dir`.
        scale: for the model's config, see `rm.normalization`; None: none, nor that of the model it began with.
        dtype, quantization_config: of the weights in training. An adapter is merged into weights of that type; after a
            quantised run into what its quantised weights stand for, and what is written is not quantised.

    Raises:
        ExportError: the disk is full, or the like.
    """
    state_dict = {name.removeprefix("classifier."): tensor for name, tensor in state_dict.items()}
    is_adapter = hasattr(model.classifier, "peft_config")
    folder = output_dir / "adapter" if is_adapter and merge_adapter else output_dir
    try:
        patterns = ("*.safetensors*", "adapter*", "config.json")
        for stale in {path for pattern in patterns for path in output_dir.glob(pattern)}:  # of an overwritten run
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        set_scale(model.config, scale)
        model.classifier.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)
        if is_adapter and merge_adapter:
            options = dict(dtype=dtype, trust_remote_code=trust_remote_code, quantization_config=quantization_config)
            merged = merge_trained(str(folder), tokenizer, **options)
            set_scale(merged.config, scale)
            merged.save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
        for written in {folder, output_dir}:
            fsync_folder(written)
    except (OSError, SafetensorError) as error:
        cause = str(error).splitlines()[0]
        raise ExportError(f"the model cannot be written to {output_dir} ({cause}); {GO_ON}") from error


@torch.no_grad()
def verify_export(
    output_dir: Path,
    sequences: Sequence[np.ndarray],
    rewards: Sequence[float],
    *,
    tolerance: float,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization_config: BitsAndBytesConfig | None = None,
) -> float:
    """Reload `output_dir` with plain transformers, score `sequences` again, and return the largest difference.

    Twice: token ids in one padded batch through the model, and texts through `pipeline("text-classification")` for the
    sequences whose text is tokenized back to the same ids.

    Args:
        sequences: token ids, as they were evaluated.
        rewards: their rewards by the trained model, without autocast: transformers serves the model so.
        tolerance: relative to the largest reward (at least 1).
        dtype, quantization_config: of the weights in training, for an adapter; a whole model is loaded as it was saved.

    Raises:
        ExportError: a reward differs by more than that.
    """
    tokenizer = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=trust_remote_code)
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code, quantization_config=quantization_config)
    model = load_trained(str(output_dir), tokenizer, **options).eval()
    expected = np.asarray(rewards, dtype=np.float64)
    bound = tolerance * max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))

    ids = [np.asarray(s).tolist() for s in sequences]
    padded = tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
    logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    worst = _largest_difference(logits.double().numpy(), expected)
    if not worst <= bound:
        raise ExportError(
            f"the model saved in {output_dir} differs from the evaluated one by {worst:.3g}, allowed {bound:.1g}"
        )

    texts = [tokenizer.decode(s, skip_special_tokens=False) for s in ids]
    if tokenizer.bos_token and tokenizer(texts[0])["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]  # the pipeline's tokenizer adds it again
    same = [i for i, text in enumerate(texts) if tokenizer(text)["input_ids"] == ids[i]]
    if same:
        serving = dict(tokenizer=tokenizer, function_to_apply="none", device="cpu")
        classify = pipeline("text-classification", model=model, **serving)
        answers = classify([texts[i] for i in same], batch_size=len(same), top_k=None)
        name = model.config.id2label[0]
        served = np.asarray([out["score"] for outputs in answers for out in outputs if out["label"] == name])
        worst_served = _largest_difference(served, expected[same])
        if not worst_served <= bound:
            raise ExportError(f"transformers' pipeline on {output_dir} differs by {worst_served:.3g} in reward")
        worst = max(worst, worst_served)
    logger.info(
        f"export checked: {len(ids)} sequences reloaded with transformers ({len(same)} of them through its pipeline), "
        f"rewards agree to {worst:.1g}"
    )
    return worst


def _largest_difference(rewards: np.ndarray, expected: np.ndarray) -> float:
    """Of the rewards that are expected to be finite; infinite if one is not. Others are not compared: NaN in one answer
    of a packed row can spread to the other."""
    is_number = np.isfinite(expected)
    if not np.isfinite(rewards[is_number]).all():
        return math.inf
    return float(np.abs(rewards - expected)[is_number].max(initial=0))
