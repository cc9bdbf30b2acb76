"""What is saved is what was evaluated: with plain transformers, its pipeline, and PEFT, also where pad was EOS."""

import numpy as np
import pytest
import torch
from conftest import COMMON, ENCODERS, EOS, PAD, random_pairs, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from rm.collate import collate
from rm.data.plan import MicroBatch
from rm.forward import concatenated_forward
from rm.model.adapters import add_adapter, load_trained, lora_config
from rm.model.load import load_classifier, load_tokenizer
from rm.model.reward_model import RewardModel
from rm.train.checkpoint import full_state_dict
from rm.train.export import ExportError, save_model, verify_export


def with_eos(pairs):
    def add(row):
        return {side: list(row[side]) + [EOS] for side in ("input_ids_chosen", "input_ids_rejected")}

    return pairs.map(add).with_format("numpy")


def trained_like(folder, tokenizer, lora=False):
    """A reward model from `folder` whose adapter and head have moved, as after training."""
    classifier = load_classifier(folder, tokenizer, seed=1)
    if lora:
        lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
        classifier = add_adapter(classifier, lora_config(lora))
    model = RewardModel(classifier).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def rewards_of(model, pairs, tokenizer):
    batch = collate(pairs, MicroBatch([[i for i in range(len(pairs))]]), "shared_prefix", tokenizer.pad_token_id)
    with torch.no_grad():
        chosen, rejected = concatenated_forward(model, batch)
    sequences = [np.asarray(row[s]) for row in pairs for s in ("input_ids_chosen", "input_ids_rejected")]
    return sequences, torch.stack([chosen, rejected], dim=1).flatten().tolist()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>", None])
def test_export_gives_the_same_rewards(tiny_model_folder, tmp_path, pairs, pad_token, lora, merge):
    if merge and not lora:
        pytest.skip("nothing to merge")
    folder = tiny_model_folder("llama", pad_token)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    model = trained_like(folder, tokenizer, lora)
    sequences, rewards = rewards_of(model, with_eos(pairs), tokenizer)
    out = tmp_path / "out"
    save_model(model, full_state_dict(model), tokenizer, out, merge_adapter=merge)
    assert verify_export(out, sequences, rewards, tolerance=1e-4) < 1e-4
    if lora and merge:
        assert verify_export(out / "adapter", sequences, rewards, tolerance=1e-4) < 1e-4

    # what users write, word by word
    reloaded = AutoTokenizer.from_pretrained(out)
    if not lora or merge:
        plain = AutoModelForSequenceClassification.from_pretrained(out)
    else:
        from peft import AutoPeftModelForSequenceClassification

        plain = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1)
        plain.config.pad_token_id = reloaded.pad_token_id
    classify = pipeline("text-classification", model=plain, tokenizer=reloaded, function_to_apply="none")
    texts = [reloaded.decode(s) for s in sequences]
    np.testing.assert_allclose([r["score"] for r in classify(texts, batch_size=4)], rewards, atol=1e-4)


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_lora_in_float32_over_weights_stored_in_bf16(tiny_model_folder, tmp_path, pairs, merge):
    """transformers loads the type that is stored: the adapter's base must come back in the type it was trained in."""
    folder = tiny_model_folder("llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    model = trained_like(folder, tokenizer, lora=True)
    sequences, rewards = rewards_of(model, with_eos(pairs), tokenizer)
    out = tmp_path / "out"
    save_model(model, full_state_dict(model), tokenizer, out, merge_adapter=merge, dtype="float32")
    assert verify_export(out, sequences, rewards, tolerance=1e-4, dtype="float32") < 1e-4


def test_lora_holds_the_modules_that_the_checkpoint_lacks(tmp_path):
    """A masked language model has no pooler: it is drawn, and must be trained and saved with the adapter."""
    config = AutoConfig.for_model("bert", **(COMMON | ENCODERS["bert"]))
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    tokenizer = load_tokenizer(str(tmp_path / "bert"))
    model = trained_like(str(tmp_path / "bert"), tokenizer, lora=True)
    pairs = with_eos(random_pairs())
    batch = collate(pairs, MicroBatch([[i] for i in range(6)]), "concatenated", tokenizer.pad_token_id)
    with torch.no_grad():
        rewards = torch.stack(concatenated_forward(model, batch), dim=1).flatten().tolist()
    sequences = [row[s] for row in pairs for s in ("input_ids_chosen", "input_ids_rejected")]
    save_model(model, full_state_dict(model), tokenizer, tmp_path / "out")
    assert verify_export(tmp_path / "out", sequences, rewards, tolerance=1e-4) < 1e-4


def test_a_wrong_export_is_refused(tiny_model_folder, tmp_path, pairs):
    folder = tiny_model_folder("gpt2")
    tokenizer = load_tokenizer(folder)
    model = trained_like(folder, tokenizer)
    sequences, rewards = rewards_of(model, with_eos(pairs), tokenizer)
    save_model(model, full_state_dict(model), tokenizer, tmp_path / "out")
    model.config.pad_token_id = EOS  # what happens with pad == EOS: pooled one token early
    model.config.save_pretrained(tmp_path / "out")
    with pytest.raises(ExportError, match="differs from the evaluated one"):
        verify_export(tmp_path / "out", sequences, rewards, tolerance=1e-4)


def test_a_saved_reward_model_keeps_its_head(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    tokenizer = load_tokenizer(folder)
    model = trained_like(folder, tokenizer)
    save_model(model, full_state_dict(model), tokenizer, tmp_path / "out")
    again = load_classifier(str(tmp_path / "out"), tokenizer, seed=99)
    torch.testing.assert_close(again.score.weight, model.bare.score.weight)
    assert load_trained(str(tmp_path / "out"), tokenizer).config.pad_token_id == PAD
