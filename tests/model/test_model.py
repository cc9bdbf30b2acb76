"""Loading: which head, which pad token, which weights are trained; and one-line errors."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, ENCODERS, EOS, PAD, ROOT, random_pairs, tiny_classifier, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from runs import SMALL, assert_same_bits, in_copy, lines, weights
from safetensors.torch import load_file
from tiny import base, load, options
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm.collate import collate
from rm.config.errors import InputError
from rm.data.plan import Layout, MicroBatch
from rm.data.tokenizer import PAD_TOKEN, load_tokenizer
from rm.forward import forward_batch, score_batch
from rm.loss import pairwise_loss
from rm.model import load as loader
from rm.model import reward_model
from rm.model.load import check_positions, load_saved_classifier, load_saved_model
from rm.model.reward_model import RewardModel, find_head, max_positions, unwrapped

TINY_LLAMA = str(ROOT / "configs" / "tiny_llama")


# ---------------------------------------------------------------------------------------------- head and tokenizer


def test_a_new_head_has_the_spread_of_the_paper_and_depends_on_the_seed():
    folder = base("llama", hidden_size=256)
    one, same, other = (load(folder, seed=s).classifier for s in (1, 1, 2))
    weight = one.score.weight
    assert weight.shape == (1, 256) and weight.dtype == torch.float32
    assert weight.std().item() == pytest.approx(1 / 257**0.5, rel=0.15)
    assert torch.equal(weight, same.score.weight) and not torch.equal(weight, other.score.weight)
    assert torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)  # pretrained, not drawn


def test_a_folder_without_weights_is_initialized_from_its_config(caplog):
    caplog.set_level("INFO")
    one, same, other = (load(TINY_LLAMA, seed=s) for s in (1, 1, 2))
    assert "holds no weights: initialized from its config" in caplog.text
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim < 2 or not torch.equal(a, c), name


def test_an_existing_reward_model_keeps_its_head(tmp_path):
    """Also without `num_labels` in its config.json, which means two labels to transformers."""
    expected = tiny_classifier("llama")
    expected.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 2
    model = load(tmp_path, seed=5)
    saved = load_saved_classifier(str(tmp_path), tiny_tokenizer(), options(tmp_path))
    for head in (model.classifier.score, saved.score):
        assert torch.equal(head.weight, expected.score.weight)


@pytest.mark.parametrize("pad_token, expected", [("<pad>", "<pad>"), ("<eos>", PAD_TOKEN), (None, PAD_TOKEN)])
def test_pad_token_is_never_eos(pad_token, expected):
    tokenizer, model = load_tokenizer(options(base("gpt2", pad_token))), load(base("gpt2", pad_token))
    assert tokenizer.pad_token == expected and tokenizer.pad_token_id != EOS and tokenizer.padding_side == "right"
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.classifier.get_input_embeddings().num_embeddings


def test_heads_of_all_shapes_are_found():
    assert find_head(tiny_classifier("llama")).in_features == find_head(tiny_classifier("bert")).in_features == 32
    roberta = AutoConfig.for_model("roberta", **(COMMON | ENCODERS["bert"]))
    classifier = AutoModelForSequenceClassification.from_config(roberta)
    assert find_head(classifier) is classifier.classifier.out_proj
    head = find_head(get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS")))
    assert head.out_features == 1 and head.weight.requires_grad  # the copy that PEFT trains


def test_chat_template_from_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(options(base(), chat_template_path=str(tmp_path / "t.jinja")))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5"
    for path, message in ((tmp_path / "none.jinja", "neither a Jinja file nor"), (base(), "has no chat template")):
        with pytest.raises(InputError, match=message):
            load_tokenizer(options(base(), chat_template_path=str(path)))


# ---------------------------------------------------------------------------------------------- the model


def test_dropout_is_off_also_in_functional_attention():
    folder = base("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    ids = torch.arange(3, 40)[None]
    off, on = (load(folder, disable_dropout=disable).classifier.train() for disable in (True, False))
    assert torch.equal(off(ids).logits, off(ids).logits) and not torch.equal(on(ids).logits, on(ids).logits)
    assert off.config.resid_pdrop == 0.3  # the saved config stays that of the base model


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_bf16_weights_with_float32_rewards(kind):
    model = load(base(kind), dtype="bfloat16")
    assert model.classifier.dtype == torch.bfloat16
    assert kind == "bert" or model.classifier.score.weight.dtype == torch.float32
    ends = torch.tensor([0]), torch.tensor([4])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rewards = model(torch.arange(3, 8)[None], torch.ones(1, 5), *ends)
            assert rewards.dtype == torch.float32 and rewards.shape == (1, 1)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for more in ({}, {"gradient_checkpointing": True}):
        model = load(base(), **more).classifier.train()
        assert model.is_activation_checkpointing is bool(more)
        model(torch.arange(3, 20)[None]).logits.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_reward_is_the_first_of_several_outputs(tmp_path, monkeypatch):
    """A second output needs one constant; what is saved opens again, and the pipeline names the reward LABEL_0."""
    from transformers import pipeline

    for module in (reward_model, loader):
        monkeypatch.setattr(module, "NUM_OUTPUTS", 2)
    tokenizer, model = load_tokenizer(options(base())), load(base())
    batch = collate(random_pairs(), MicroBatch([[0, 1], [2]]), Layout("shared_prefix", PAD))
    outputs_NK = forward_batch(model.eval(), batch)
    assert outputs_NK.shape == (6, 2) and torch.equal(score_batch(model, batch), outputs_NK[:, 0])
    assert torch.equal(unwrapped(SimpleNamespace(module=model)).classifier.score.weight, model.classifier.score.weight)
    model.classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_saved_model(str(tmp_path), tokenizer, options(tmp_path)).eval()
    torch.testing.assert_close(forward_batch(again, batch), outputs_NK)
    classify = pipeline("text-classification", model=str(tmp_path), function_to_apply="none")
    served = {out["label"]: out["score"] for out in classify("w5 w6", top_k=None)}
    expected = again.classifier(**tokenizer("w5 w6", return_tensors="pt")).logits[0]
    assert [served["LABEL_0"], served["LABEL_1"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_learned_positions(tmp_path):
    roberta = AutoConfig.for_model("roberta", **(COMMON | ENCODERS["bert"]))
    assert max_positions(RewardModel(AutoModelForSequenceClassification.from_config(roberta))) == 256 - 1 - PAD
    assert [max_positions(load(base(kind))) for kind in ("gpt2", "opt", "bert")] == [256] * 3
    check_positions(options(base("llama")), 10_000)  # rotary
    shutil.copytree(base("gpt2"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    check_positions(options(tmp_path), 256)
    with pytest.raises(InputError, match="up to 257 tokens, the model 256 positions: set max_length"):
        check_positions(options(tmp_path), 257)


# ---------------------------------------------------------------------------------------------- trainable


def trained_names(model) -> set[str]:
    return {name.removeprefix("classifier.") for name, p in model.named_parameters() if p.requires_grad}


def test_the_head_is_always_trained():
    assert trained_names(load(base(), trainable="score")) == {"score.weight"}
    last = trained_names(load(base(), trainable=r"layers\.1\."))
    assert len(last) == 10 and all("layers.1." in name or name == "score.weight" for name in last)
    drawn = trained_names(load(base("bert"), trainable="embeddings.word"))  # a masked LM has no pooler
    assert {name.rpartition(".")[0] for name in drawn} == {
        "classifier", "bert.pooler.dense", "bert.embeddings.word_embeddings",
    }  # fmt: skip
    with pytest.raises(InputError, match="trainable=layers.7 is found in no parameter name; there are model.embed"):
        load(base(), trainable="layers.7")
    with pytest.raises(InputError, match=r"trainable=\( is not a regular expression: "):
        load(base(), trainable="(")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_frozen_backbone_stores_no_activations(kind):
    reentrant = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = load(base(kind), trainable="^(score|classifier)", **(reentrant if kind == "llama" else {})).train()
    batch = collate(random_pairs(), MicroBatch([[0], [1], [2]]), Layout("concatenated", PAD))
    saved, hidden = [], []
    unwrapped(model.classifier).base_model.register_forward_hook(lambda *args: hidden.append(args[2][0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        rewards = score_batch(model, batch)
    assert not hidden[0].requires_grad or kind == "bert"  # whose pooler is new, and trained
    limit = 3 * max(6 * 32, 32 * 32)  # [N, D], and the pooler
    assert saved and sum(saved) <= limit < hidden[0].numel() * 2
    pairwise_loss(rewards[:3], rewards[3:]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"classifier.{name}" for name in trained_names(model)
    }


@pytest.mark.parametrize("trainable", ["score", r"layers\.1\."])
def test_a_run_with_frozen_weights(train, zygote, fsdp_zygote, pretrained, tmp_path, trainable):
    """It resumes to the same bits, its checkpoints hold the trained weights alone, and processes change nothing."""
    given = [f"--model_name_or_path={pretrained}", f"--trainable={trainable}", "--save_steps=2", "--learning_rate=1e-2"]
    _, whole = train("whole", *given)
    _, parts = train("parts", *given, in_copy(whole, "parts", 2))
    assert_same_bits(whole, parts, also_kept=False)
    before, after = load_file(f"{pretrained}/model.safetensors"), weights(whole)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if trainable.replace("\\", "") in name or "score" in name}
    stored = load_file(whole / "checkpoints" / "step-2" / "model.safetensors")
    assert {name.removeprefix("classifier.") for name in stored} == changed
    (fsdp_zygote if trainable == "score" else zygote).run(
        2, ["dataset_name=toy", *SMALL, *given, "--output_dir=two"], tmp_path
    )
    assert lines(tmp_path / "two") == pytest.approx(lines(whole), abs=1e-5)


# ---------------------------------------------------------------------------------------------- errors


def test_models_that_cannot_be_used(tmp_path, caplog):
    tiny_classifier("llama", num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="two': the folder has no tokenizer files; copy those of the base model"):
        load(tmp_path / "two")
    tiny_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match=r"score.weight has the shape \[2, 32\]; a reward model .* \[1, 32\]"):
        load(tmp_path / "two")
    with pytest.raises(InputError, match="no tokenizer could be loaded from 'no/such-model'"):
        load("no/such-model")
    with pytest.raises(InputError, match="it lacks score.weight"):
        load_saved_model(base(), None, options(base()))
    with pytest.raises(InputError, match="needs a pretrained model; "):
        load(TINY_LLAMA, use_peft=True)
    for attention, message in (("flex_attention", "is not supported; use sdpa"), ("no", "could not be loaded as a")):
        with pytest.raises(InputError, match=message):
            load(base(), attn_implementation=attention)


def test_an_unknown_architecture_is_one_short_line(tmp_path):
    shutil.copytree(base(), tmp_path / "odd")
    AutoConfig.for_model("clip").save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match="no sequence classifier for the architecture CLIP") as error:
        load(tmp_path / "odd")
    assert len(str(error.value)) < 400 + len(str(tmp_path))
