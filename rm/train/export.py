"""Save the final model for plain transformers, and check that the saved one gives the rewards of the evaluated one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, pipeline

from rm.config.errors import RunError
from rm.config.options import RewardConfig
from rm.model.load import load_saved_classifier, merge_saved_adapter
from rm.model.reward_model import RewardModel
from rm.model.saved import set_scale

logger = logging.getLogger(__name__)


class ExportError(RunError):
    """The final model could not be saved, or its rewards differ from those of the evaluated one."""


def save_model(
    model: RewardModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: RewardConfig,
    scale: dict[str, float | int] | None = None,
) -> None:
    """Write model and tokenizer to a new folder for `AutoModelForSequenceClassification.from_pretrained`.

    With `merge_adapter` the merged model goes to `folder` and the adapter to `folder/adapter`.

    Args:
        model: unwrapped; its own tensors are not read, since they may be shards.
        weights: all of them on the CPU (`full_weights`).
        scale: mean and standard deviation of rewards, for the model's config; None: none, nor that of the base model.
    """
    weights = {name.removeprefix("classifier."): tensor for name, tensor in weights.items()}
    is_merged = config.merge_adapter and hasattr(model.classifier, "peft_config")
    first = folder / "adapter" if is_merged else folder
    set_scale(model.config, scale)
    model.classifier.save_pretrained(first, state_dict=weights)
    tokenizer.save_pretrained(first)
    if is_merged:
        merged = merge_saved_adapter(str(first), tokenizer, config)
        set_scale(merged.config, scale)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # by PEFT; the model card replaces it


@torch.no_grad()
def verify_export(
    folder: Path, sequences: Sequence[Sequence[int]], rewards: Sequence[float], tolerance: float, config: RewardConfig
) -> dict[str, float | int]:
    """Score `sequences` (token ids) with the saved model and compare with `rewards`, those of the evaluated model.

    Once as token ids in a padded batch through the model. A whole model is also opened as the model card describes,
    with `pipeline("text-classification", model=folder)`, and scores the texts that it tokenizes to the same ids.
    `tolerance` is relative to the largest reward (at least 1).

    Returns the largest difference and the numbers of sequences compared. Raises `ExportError` above the tolerance.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    model = load_saved_classifier(str(folder), tokenizer, config).eval()
    expected = np.asarray(rewards, dtype=np.float64)
    bound = tolerance * max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))

    def compare(what: str, found: np.ndarray, expected: np.ndarray) -> float:
        is_number = np.isfinite(expected)  # NaN in one answer of a packed row can spread to the other
        is_finite = np.isfinite(found[is_number]).all()
        difference = float(np.abs(found - expected)[is_number].max(initial=0)) if is_finite else math.inf
        if difference > bound:
            raise ExportError(f"{what} differs from the evaluated model by {difference:.3g}, allowed {bound:.1g}")
        return difference

    ids = [list(sequence) for sequence in sequences]
    padded = tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
    logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    worst = compare(f"the model saved in {folder}", logits.double().numpy(), expected)
    del model  # the pipeline loads its own
    texts = [tokenizer.decode(s, skip_special_tokens=False) for s in ids]
    if tokenizer.bos_token and tokenizer(texts[0])["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]  # the tokenizer adds it again
    same, special = [], {}
    if not (folder / "adapter_config.json").exists():  # the pipeline opens whole models only
        for special in ({}, {"add_special_tokens": False}):  # the model card: for texts, and for rendered conversations
            same = [i for i, text in enumerate(texts) if tokenizer(text, **special)["input_ids"] == ids[i]]
            if same:
                break
    if same:
        options = {"function_to_apply": "none", "device": "cpu", "trust_remote_code": config.trust_remote_code}
        classify = pipeline("text-classification", model=str(folder), **options)
        answers = classify([texts[i] for i in same], batch_size=len(same), top_k=None, **special)
        name = classify.model.config.id2label[0]
        served = np.asarray([out["score"] for outputs in answers for out in outputs if out["label"] == name])
        worst = max(worst, compare(f"transformers' pipeline on {folder}", served, expected[same]))
    logger.info(
        f"export checked: {len(ids)} sequences reloaded with transformers ({len(same)} of them through its pipeline), "
        f"rewards agree to {worst:.1g}"
    )
    return {"largest_difference": worst, "sequences": len(ids), "through_pipeline": len(same)}
