"""Loading: which head, which pad token, which weights; and one-line errors."""

import pytest
import torch
from conftest import COMMON, EOS, ROOT, tiny_classifier
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm.config.errors import InputError
from rm.model.adapters import add_adapter, lora_config
from rm.model.load import PAD_TOKEN, load_classifier, load_tokenizer
from rm.model.reward_model import RewardModel, check_positions, find_head

TINY_LLAMA = str(ROOT / "configs" / "tiny_llama")


def test_new_head_has_the_papers_spread_and_depends_on_the_seed(tiny_model_folder):
    folder = tiny_model_folder("llama", hidden_size=256)
    tokenizer = load_tokenizer(folder)
    one, same, other = (load_classifier(folder, tokenizer, seed=s) for s in (1, 1, 2))
    weight = one.score.weight
    assert weight.shape == (1, 256) and weight.dtype == torch.float32
    assert weight.std().item() == pytest.approx(1 / 257**0.5, rel=0.15)
    assert torch.equal(weight, same.score.weight) and not torch.equal(weight, other.score.weight)
    assert torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)  # pretrained, not drawn


def test_a_folder_without_weights_is_initialised_from_its_config(caplog):
    caplog.set_level("INFO")
    tokenizer = load_tokenizer(TINY_LLAMA)
    one, same, other = (load_classifier(TINY_LLAMA, tokenizer, seed=s) for s in (1, 1, 2))
    assert "holds no weights: initialised from its config" in caplog.text
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim < 2 or not torch.equal(a, c), name


@pytest.mark.parametrize("pad_token, expected", [("<pad>", "<pad>"), ("<eos>", PAD_TOKEN), (None, PAD_TOKEN)])
def test_pad_token_is_never_eos(tiny_model_folder, pad_token, expected):
    folder = tiny_model_folder("gpt2", pad_token)
    tokenizer = load_tokenizer(folder)
    model = load_classifier(folder, tokenizer, seed=0)
    assert tokenizer.pad_token == expected and tokenizer.pad_token_id != EOS
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
    assert tokenizer.padding_side == "right"


def test_dropout_is_off_also_in_functional_attention(tiny_model_folder):
    folder = tiny_model_folder("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    tokenizer = load_tokenizer(folder)
    ids = torch.arange(3, 40)[None]
    off = load_classifier(folder, tokenizer, seed=0).train()
    assert torch.equal(off(ids).logits, off(ids).logits)
    on = load_classifier(folder, tokenizer, seed=0, disable_dropout=False).train()
    assert not torch.equal(on(ids).logits, on(ids).logits)
    assert off.config.resid_pdrop == 0.3  # the saved config stays the base model's


def test_bf16_weights_with_a_float32_head(tiny_model_folder):
    folder = tiny_model_folder("llama")
    tokenizer = load_tokenizer(folder)
    model = RewardModel(load_classifier(folder, tokenizer, seed=0, dtype="bfloat16"))
    assert model.dtype == torch.bfloat16 and model.bare.score.weight.dtype == torch.float32
    ends = torch.tensor([0]), torch.tensor([4])
    rewards = model(torch.arange(3, 8)[None], torch.ones(1, 5), *ends)
    assert rewards.dtype == torch.float32 and rewards.shape == (1,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.arange(3, 8)[None], torch.ones(1, 5), *ends).dtype == torch.float32


def test_an_encoder_in_bf16(tmp_path):
    model = RewardModel(tiny_classifier("bert").to(torch.bfloat16))
    ends = torch.tensor([0]), torch.tensor([4])
    assert model(torch.arange(3, 8)[None], torch.ones(1, 5), *ends).dtype == torch.float32


def test_heads_of_all_shapes_are_found():
    assert find_head(tiny_classifier("llama")).in_features == 32
    assert find_head(tiny_classifier("bert")).in_features == 32
    roberta = AutoConfig.for_model("roberta", **(COMMON | dict(intermediate_size=48)))
    assert find_head(AutoModelForSequenceClassification.from_config(roberta)).out_features == 1


def test_too_long_sequences_are_refused_before_training():
    check_positions(RewardModel(tiny_classifier("gpt2")), 256)
    check_positions(RewardModel(tiny_classifier("llama")), 10_000)  # rotary: no table
    with pytest.raises(InputError, match="up to 257 tokens, the model 256 positions: set max_length"):
        check_positions(RewardModel(tiny_classifier("gpt2")), 257)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model_folder):
    folder = tiny_model_folder("llama")
    tokenizer = load_tokenizer(folder)
    gradients = []
    for checkpointing in (False, True):
        model = load_classifier(folder, tokenizer, seed=0, gradient_checkpointing=checkpointing).train()
        assert model.is_activation_checkpointing is checkpointing
        model(torch.arange(3, 20)[None]).logits.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_lora_trains_adapter_and_head_only(tiny_model_folder):
    folder = tiny_model_folder("llama")
    tokenizer = load_tokenizer(folder)
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj"]}
    adapted = add_adapter(load_classifier(folder, tokenizer, seed=0), lora_config(lora))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained)
    with pytest.raises(InputError, match="lora_target_modules="):
        nope = lora_config(lora | {"lora_target_modules": ["nope"]})
        add_adapter(load_classifier(folder, tokenizer, seed=0), nope, origin="lora_target_modules")


def test_models_that_cannot_be_used(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    tokenizer = load_tokenizer(folder)
    two_labels = tiny_classifier("llama", num_labels=2)
    two_labels.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="classifier with 2 labels; a reward model has 1"):
        load_classifier(str(tmp_path / "two"), tokenizer, seed=0)
    with pytest.raises(InputError, match="no model could be loaded from 'no/such-model'"):
        load_classifier("no/such-model", tokenizer, seed=0)
    with pytest.raises(InputError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path / "two"))
    with pytest.raises(InputError, match="needs a model with weights to adapt"):
        weightless = load_classifier(TINY_LLAMA, load_tokenizer(TINY_LLAMA), seed=0)
        add_adapter(weightless, lora_config({"lora_target_modules": "all-linear"}))
    with pytest.raises(InputError, match="neither a Jinja file nor a tokenizer"):
        load_tokenizer(folder, chat_template_path=str(tmp_path / "none.jinja"))


def test_chat_template_from_a_file(tiny_model_folder, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(tiny_model_folder("llama"), chat_template_path=str(tmp_path / "t.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5"


def test_an_existing_reward_model_keeps_its_head(tmp_path, tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder("llama"))
    reward_model = tiny_classifier("llama")
    reward_model.save_pretrained(tmp_path / "rm")
    again = load_classifier(str(tmp_path / "rm"), tokenizer, seed=5)
    assert torch.equal(again.score.weight, reward_model.score.weight)
    assert torch.equal(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").score.weight, again.score.weight
    )
