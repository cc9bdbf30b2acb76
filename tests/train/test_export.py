"""What is saved is what was evaluated: with plain transformers, its pipeline, and PEFT, also where pad was EOS."""

import numpy as np
import pytest
import torch
from conftest import COMMON, ENCODERS, EOS, PAD, random_pairs, tiny_tokenizer
from examples import preference_data
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from rm.collate import collate
from rm.config.errors import RunError
from rm.config.options import RewardConfig
from rm.data.plan import Layout, MicroBatch
from rm.data.tokenizer import load_tokenizer
from rm.forward import score_batch
from rm.model.load import load_reward_model, load_saved_model
from rm.train.finish import save_model, verify_export


def trained_like(config: RewardConfig, tokenizer):
    """A reward model whose adapter and head have moved, as after training."""
    model = load_reward_model(tokenizer, config).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def config_of(folder, lora: bool = False, **more) -> RewardConfig:
    if lora:
        more |= dict(use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_modules="all-linear")
    return RewardConfig(model_name_or_path=str(folder), seed=1, **more)


def rewards_of(model, tokenizer, layout="shared_prefix"):
    """Token sequences and rewards of six random pairs that end with EOS, as in export_check.json."""
    prompts = [[[*ids.tolist(), EOS] for ids in tree.sequences()] for tree in random_pairs().trees(range(6))]
    data, layout = preference_data(prompts), Layout(layout, tokenizer.pad_token_id)
    with torch.no_grad():
        rewards = score_batch(model, collate(data, MicroBatch([[i] for i in range(len(data))]), layout))
    sequences = [ids for prompt in prompts for ids in prompt]
    return {"sequences": sequences, "rewards": rewards.tolist(), "tolerance": 1e-4}


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>", None])
def test_export_gives_the_same_rewards(tiny_model_folder, tmp_path, pad_token, lora, merge):
    if merge and not lora:
        pytest.skip("nothing to merge")
    config = config_of(tiny_model_folder("llama", pad_token), lora, **({"merge_adapter": True} if merge else {}))
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    model = trained_like(config, tokenizer)
    check = rewards_of(model, tokenizer)
    out = tmp_path / "out"
    save_model(model, [model.state_dict()], tokenizer, out, config)
    assert verify_export(out, check, config)["largest_difference"] < 1e-4
    if lora and merge:
        assert verify_export(out / "adapter", check, config)["largest_difference"] < 1e-4

    # what users write, word by word
    reloaded = AutoTokenizer.from_pretrained(out)
    if not lora or merge:
        plain = AutoModelForSequenceClassification.from_pretrained(out)
    else:
        from peft import AutoPeftModelForSequenceClassification

        plain = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1)
        plain.config.pad_token_id = reloaded.pad_token_id
    classify = pipeline("text-classification", model=plain, tokenizer=reloaded, function_to_apply="none")
    texts = [reloaded.decode(s) for s in check["sequences"]]
    np.testing.assert_allclose([r["score"] for r in classify(texts, batch_size=4)], check["rewards"], atol=1e-4)


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_lora_in_float32_over_weights_stored_in_bf16(tiny_model_folder, tmp_path, merge):
    """transformers loads the type that is stored: the adapter's base must come back in the type it was trained in."""
    folder = tiny_model_folder("llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = config_of(folder, lora=True, merge_adapter=merge)
    tokenizer = load_tokenizer(config)
    model = trained_like(config, tokenizer)
    check = rewards_of(model, tokenizer)
    out = tmp_path / "out"
    save_model(model, [model.state_dict()], tokenizer, out, config)
    assert verify_export(out, check, config)["largest_difference"] < 1e-4


def test_lora_holds_the_modules_that_the_checkpoint_lacks(tmp_path):
    """A masked language model has no pooler: it is drawn, and must be trained and saved with the adapter."""
    config = AutoConfig.for_model("bert", **(COMMON | ENCODERS["bert"]))
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    config = config_of(tmp_path / "bert", lora=True)
    tokenizer = load_tokenizer(config)
    model = trained_like(config, tokenizer)
    check = rewards_of(model, tokenizer, "concatenated")
    save_model(model, [model.state_dict()], tokenizer, tmp_path / "out", config)
    assert verify_export(tmp_path / "out", check, config)["largest_difference"] < 1e-4


def test_a_wrong_export_is_refused(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("gpt2")
    config = config_of(folder)
    tokenizer = load_tokenizer(config)
    model = trained_like(config, tokenizer)
    check = rewards_of(model, tokenizer)
    save_model(model, [model.state_dict()], tokenizer, tmp_path / "out", config)
    model.config.pad_token_id = EOS  # what happens with pad == EOS: pooled one token early
    model.config.save_pretrained(tmp_path / "out")
    with pytest.raises(RunError, match="differs from the evaluated model"):
        verify_export(tmp_path / "out", check, config)


def test_a_saved_reward_model_keeps_its_head(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    config = config_of(folder)
    tokenizer = load_tokenizer(config)
    model = trained_like(config, tokenizer)
    save_model(model, [model.state_dict()], tokenizer, tmp_path / "out", config)
    again = load_saved_model(str(tmp_path / "out"), tokenizer, config)
    torch.testing.assert_close(again.classifier.score.weight, model.classifier.score.weight)
    assert again.config.pad_token_id == PAD
