"""Precision and memory: eval_dtype, TF32, quantization, offloading, Liger, checkpointing, NEFTune, fp16."""

import importlib.util
import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
import transformers
from conftest import PAD, random_pairs, tiny_classifier
from runs import SMALL, assert_same_bits, in_copy, lines, reset_accelerate
from safetensors.torch import load_file
from tiny import base, load, options
from transformers import AutoModelForSequenceClassification

import rm.model.reward_model
from rm.collate import collate
from rm.config.errors import InputError
from rm.data.plan import Layout, MicroBatch
from rm.evaluate import __main__ as evaluate
from rm.forward import concatenated_forward, score_batch
from rm.model.adapters import quantization_config
from rm.model.reward_model import RewardModel, cast_weights, is_half_precision, set_tf32, use_liger_kernels

ROW = MicroBatch([[0, 1, 2], [3, 4, 5]])
EACH = MicroBatch([[i] for i in range(6)])


def batch_of(layout):
    return collate(random_pairs(), ROW if layout == "shared_prefix" else EACH, Layout(layout, PAD))


def gradients(model, layout="shared_prefix") -> dict[str, torch.Tensor]:
    model.zero_grad()
    chosen_B, rejected_B, _ = concatenated_forward(model, batch_of(layout))
    (chosen_B - 2 * rejected_B).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------- eval_dtype, tf32


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_weights_come_back_as_they_were(kind):
    model = RewardModel(tiny_classifier(kind))
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    batch = batch_of("concatenated")
    exact = score_batch(model, batch)
    with pytest.raises(KeyError), cast_weights(model, "bfloat16"), torch.no_grad():
        assert model.classifier.dtype == torch.bfloat16 and next(model.buffers()).dtype != torch.bfloat16
        assert is_half_precision(model, "no", None)
        rough = score_batch(model, batch)
        raise KeyError  # also after an error
    assert 0 < (rough - exact).abs().max() < 0.1
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])
    with cast_weights(model, None):
        assert torch.equal(score_batch(model, batch), exact)


def test_what_counts_as_half_precision():
    model = RewardModel(tiny_classifier("llama"))
    assert [is_half_precision(model, *given) for given in ((None, None), ("no", False))] == [False, False]
    assert [is_half_precision(model, *given) for given in (("bf16", None), ("no", True))] == [True, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_with_evaluations_in_half_precision(train, dtype, capsys):
    """trains to the same bits, evaluates to about the same, and the command gives the numbers of the run."""
    given = ["--eval_steps=2", "--learning_rate=1e-2"]
    _, plain = train("plain", *given)
    summary, half = train("half", *given, f"--eval_dtype={dtype}")
    assert (plain / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    assert lines(plain) == lines(half)
    a, b = lines(plain, "eval/margin"), lines(half, "eval/margin")
    assert a != b and a == pytest.approx(b, abs=0.05)
    reset_accelerate()
    assert evaluate.main([f"--model={half}"])["eval/margin"] == pytest.approx(summary["eval/margin"], abs=1e-6)
    reset_accelerate()
    again = evaluate.main([f"--model={half}", "--eval_dtype=none"])
    assert again["eval/margin"] == pytest.approx(lines(plain, "eval/margin")[-1], abs=1e-6)


def test_two_processes(zygote, tmp_path):
    given = ["dataset_name=toy", *SMALL, "--eval_dtype=bfloat16", "--eval_steps=2"]
    zygote.run(2, [*given, "--output_dir=two"], tmp_path)
    zygote.run(1, [*given, "--output_dir=one"], tmp_path)
    assert lines(tmp_path / "one", "eval/margin") == pytest.approx(lines(tmp_path / "two", "eval/margin"), abs=2e-3)


@pytest.mark.parametrize("given", [["--eval_dtype=bfloat16"], ["--use_peft", "--load_in_4bit"]])
def test_fsdp_rejects_what_has_no_effect(fsdp_zygote, tmp_path, given):
    (run, _) = fsdp_zygote.start_many(2, ["dataset_name=toy", *SMALL, *given, "--output_dir=x"], tmp_path)
    assert run.wait() == 2
    assert f"{given[-1].removeprefix('--').split('=')[0]}=" in run.stderr and "use DDP or one process" in run.stderr


def test_tf32(monkeypatch):
    before = torch.backends.fp32_precision
    with pytest.raises(InputError, match="tf32=True: it needs an NVIDIA GPU"):
        set_tf32(True)
    monkeypatch.setattr(rm.model.reward_model, "is_torch_tf32_available", lambda: True)
    try:
        for enabled, expected in ((None, before), (True, "tf32"), (False, "ieee")):
            set_tf32(enabled)
            assert torch.backends.fp32_precision == expected
    finally:
        torch.backends.fp32_precision = before


# ---------------------------------------------------------------------------------------------- quantization

LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0", "--learning_rate=1e-2"]


def test_the_config_is_that_of_trl():
    more = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
    config = quantization_config(options("x", use_peft=True, load_in_4bit=True, dtype="bfloat16", **more)).to_dict()
    assert config["load_in_4bit"] and config["bnb_4bit_quant_type"] == "fp4" and config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == config["bnb_4bit_quant_storage"] == "bfloat16"
    assert "score" in config["llm_int8_skip_modules"] and quantization_config(options("x")) is None


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_the_package():
    with pytest.raises(InputError, match="could not be loaded as a reward model: ImportError: .*bitsandbytes"):
        load(base(), use_peft=True, load_in_8bit=True)


@pytest.mark.parametrize("bits", [["--load_in_4bit", "--use_bnb_nested_quant"], ["--load_in_8bit"]])
def test_quantized_weights_are_trained_resumed_merged_and_loaded_again(train, pretrained, bits, zygote, tmp_path):
    pytest.importorskip("bitsandbytes")
    given = [f"--model_name_or_path={pretrained}", *LORA, *bits, "--save_steps=2"]
    summary, whole = train("whole", *given)  # which checks its export
    assert lines(whole)[-1] < lines(whole)[0]
    assert {w.dtype.itemsize for w in load_file(whole / "adapter_model.safetensors").values()} == {4}
    _, parts = train("parts", *given, in_copy(whole, "parts", 2))
    assert_same_bits(whole, parts, also_kept=False)
    _, evaluated = train("evaluated", *given, "--eval_steps=1")  # evaluations leave the weights as they are
    assert lines(evaluated) == lines(whole)
    reset_accelerate()
    assert evaluate.main([f"--model={whole}"])["eval/loss"] == pytest.approx(summary["eval/loss"], abs=1e-3)
    _, merged = train("merged", *given, "--merge_adapter")
    assert not hasattr(AutoModelForSequenceClassification.from_pretrained(merged).config, "quantization_config")
    zygote.run(2, ["dataset_name=toy", *SMALL, *given, "--output_dir=two"], tmp_path)
    assert lines(whole) == pytest.approx(lines(tmp_path / "two"), abs=1e-5)


# ---------------------------------------------------------------------------------------------- offloading, Liger


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(monkeypatch, checkpointing, autocast):
    """Neither weights nor the half-precision copies of autocast are offloaded."""
    sizes = []

    def to_cpu(pin_memory):
        hooks = torch.autograd.graph.save_on_cpu(pin_memory)
        pack = hooks.pack_hook
        hooks.pack_hook = lambda tensor: sizes.append(tensor.shape) or pack(tensor)
        return hooks

    monkeypatch.setattr("rm.model.reward_model.save_on_cpu", to_cpu)
    classifier = tiny_classifier("llama")
    if checkpointing:
        classifier.activation_checkpointing_enable({"use_reentrant": False})
    model = RewardModel(classifier, activation_offloading=True).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, offloaded = gradients(RewardModel(classifier).train()), gradients(model)
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    shapes = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}
    assert len(sizes) > 10 and not shapes & set(sizes)
    sizes.clear()
    score_batch(model.eval(), batch_of("concatenated"))
    assert not sizes


def test_liger_gets_model_and_config(monkeypatch):
    """A stand-in for the package, which needs a GPU: its arguments, and that its patches are undone."""
    from transformers.models.llama import modeling_llama

    calls, plain = [], modeling_llama.apply_rotary_pos_emb

    def apply_to_llama(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ):
        if rope:
            modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, *_: (
                calls.append("rope") or plain(q, k, cos, sin)
            )
        calls.append((model, rope, cross_entropy, fused_linear_cross_entropy, rms_norm))

    patch, package = ModuleType("liger_kernel.transformers.monkey_patch"), ModuleType("liger_kernel.transformers")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    package._apply_liger_kernel_to_instance = lambda model, **kwargs: apply_to_llama(model=model, **kwargs)
    for name, module in (("", ModuleType("liger_kernel")), (".transformers", package)):
        monkeypatch.setitem(sys.modules, "liger_kernel" + name, module)
    model = RewardModel(tiny_classifier("llama"))
    with pytest.raises(InputError, match="use_liger_kernel=True needs the package liger-kernel"):
        use_liger_kernels(model, None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    with pytest.raises(InputError, match="Liger has no kernels for models of type bert"):
        use_liger_kernels(RewardModel(tiny_classifier("bert")), None)
    for losses in ("fused_linear_cross_entropy", "ropes"):
        with pytest.raises(InputError, match=f"liger_kernel_config: '{losses}' has no effect; there are rms_norm"):
            use_liger_kernels(model, {losses: True})
    expected = score_batch(model, batch_of("concatenated"))
    use_liger_kernels(model, {"rms_norm": False})
    assert calls == [(model.classifier, True, False, False, False)]
    assert torch.equal(score_batch(model, batch_of("concatenated")), expected) and "rope" in calls
    model.undo_liger()
    assert modeling_llama.apply_rotary_pos_emb is plain


@pytest.mark.parametrize("option", ["activation_offloading", "use_liger_kernel"])
def test_options_that_need_a_gpu(fails, option):
    assert f"{option}=True" in fails(f"--{option}")


# ---------------------------------------------------------------------------------------------- checkpointing


def test_arguments_of_checkpointing(monkeypatch):
    given, original = [], transformers.modeling_utils.checkpoint

    def checkpoint(function, *args, **kwargs):
        given.append(kwargs["use_reentrant"])
        return original(function, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", checkpoint)
    found = []
    for kwargs in (None, {"use_reentrant": True}):
        model = load(base(), gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        found.append(gradients(model.train()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert set(given) == {False, True}
    with pytest.raises(InputError, match="gradient_checkpointing with .*: TypeError: .* argument 'foo'"):
        load(base(), gradient_checkpointing=True, gradient_checkpointing_kwargs={"foo": 1})


def test_reentrant_checkpointing_under_frozen_weights():
    found = []
    for reentrant in (False, True):
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model = load(base(), trainable=r"layers\.1\.", **kwargs).train()
        chosen_B, *_ = concatenated_forward(model, batch_of("shared_prefix"))
        chosen_B.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items()) and len(found[0]) == 10


# ---------------------------------------------------------------------------------------------- NEFTune


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_noise_is_that_of_transformers(layout):
    """Uniform, at most alpha / sqrt(tokens in the row x width)."""
    model, seen = RewardModel(tiny_classifier("llama"), neftune_noise_alpha=5.0).train(), []
    table = model.classifier.get_input_embeddings()
    table.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    batch = batch_of(layout)
    score_batch(model, batch)
    noise_RLD = seen[0] - table.weight.detach()[batch.input_ids_RL]
    bound = 5.0 / (noise_RLD.shape[1] * 32) ** 0.5
    assert 0.95 * bound < noise_RLD.abs().max() <= bound * 1.001
    assert noise_RLD.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_noise_in_training_only():
    model, plain = (RewardModel(tiny_classifier("bert"), neftune_noise_alpha=alpha) for alpha in (5.0, None))
    batch = batch_of("concatenated")
    assert torch.equal(score_batch(model.eval(), batch), score_batch(plain, batch))
    noisy = score_batch(model.train(), batch)
    assert not torch.equal(noisy, score_batch(model, batch)) and not torch.equal(noisy, score_batch(plain, batch))
    assert torch.equal(score_batch(model.eval(), batch), score_batch(plain, batch))


def test_a_run_with_noise_resumes_to_the_same_bits(train, pretrained):
    given = ["--neftune_noise_alpha=5", "--save_steps=2", "--mixed_precision=bf16", "--gradient_checkpointing"]
    _, whole = train("whole", *given)
    _, parts = train("parts", *given, in_copy(whole, "parts", 2))
    assert_same_bits(whole, parts, also_kept=False)
    _, without = train("without", *given[1:])
    assert lines(without) != lines(whole)


# ---------------------------------------------------------------------------------------------- fp16 and its scaler

# Accelerate has fp16 on GPUs only; torch has the autocast and the scaler on CPUs too
FP16 = """
import torch, train_rm
make = train_rm.make_accelerator
def fp16(config):
    accelerator = make(config)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** {scale}, growth_interval=4)
    return accelerator
train_rm.make_accelerator = fp16
"""
HALF = ["dataset_name=toy", *SMALL, "--max_steps=8", "--micro_batch_tokens=300", "--output_dir"]


def test_fp16_trains_as_float32_does(zygote, tmp_path):
    zygote.run(1, [*HALF, "whole"], tmp_path)
    zygote.run(1, [*HALF, "half"], tmp_path, fault=FP16.format(scale=8))
    assert lines(tmp_path / "half", "optim/skipped_steps")[-1] == 0
    torch.testing.assert_close(lines(tmp_path / "half"), lines(tmp_path / "whole"), atol=5e-3, rtol=0)
    norms = [lines(tmp_path / name, "optim/grad_norm") for name in ("half", "whole")]  # unscaled
    torch.testing.assert_close(*norms, atol=0, rtol=2e-2)
    assert lines(tmp_path / "half") != lines(tmp_path / "whole")


def test_fp16_finds_its_scale_and_resumes_with_it(zygote, tmp_path):
    """Steps whose gradients overflow are left out without an error; the scale is in the checkpoint."""
    given, fault = [*HALF, "run", "--save_steps=6"], FP16.format(scale=22)
    zygote.run(1, given, tmp_path, fault=fault)
    skipped = lines(tmp_path / "run", "optim/skipped_steps")
    assert 2 <= skipped[-1] < 8
    scaler = json.loads((tmp_path / "run/checkpoints/step-6/state.json").read_text())["scaler"]
    assert 0 < scaler["scale"] < 2**22
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    zygote.run(1, [*given, "--resume_from_checkpoint=run/checkpoints/step-6"], tmp_path, fault=fault)
    assert_same_bits(tmp_path / "before", tmp_path / "run", also_kept=False)


def test_two_half_precisions_are_rejected(fails):
    """torch has no norms of a bfloat16 input and float16 weights; the first evaluation would end the run."""
    assert "eval_dtype=float16" in fails("--eval_dtype=float16", "--mixed_precision=bf16", "--eval_steps=1")
