"""Options for precision and memory: eval_dtype, TF32, offloading, Liger, checkpointing's own arguments; and NEFTune."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
import transformers
from conftest import PAD, random_pairs, tiny_classifier
from runs import SMALL, assert_same_bits, lines, reset_accelerate
from safetensors.torch import load_file

import rm.model.precision
from rm.collate import collate
from rm.config.errors import InputError
from rm.data.plan import MicroBatch
from rm.evaluate import __main__ as evaluate
from rm.forward import concatenated_forward, score_batch, sequence_lengths
from rm.model.load import load_classifier, load_tokenizer
from rm.model.precision import cast_weights, set_tf32
from rm.model.reward_model import RewardModel, use_liger_kernels

ROW = MicroBatch([[0, 1, 2], [3, 4, 5]])
EACH = MicroBatch([[i] for i in range(6)])


def batch_of(layout, pairs=None):
    return collate(pairs or random_pairs(), ROW if layout == "shared_prefix" else EACH, layout, PAD)


# ---------------------------------------------------------------------------------------------- eval_dtype


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_weights_come_back_as_they_were(kind):
    model = RewardModel(tiny_classifier(kind))
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    batch = batch_of("concatenated")
    exact = score_batch(model, batch)
    with pytest.raises(KeyError), cast_weights(model, "bfloat16"), torch.no_grad():
        assert model.dtype == torch.bfloat16 and next(b for b in model.buffers()).dtype != torch.bfloat16
        rough = score_batch(model, batch)
        raise KeyError  # also after an error
    assert 0 < (rough - exact).abs().max() < 0.1
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])
    with cast_weights(model, None):
        assert torch.equal(score_batch(model, batch), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_with_evaluations_in_half_precision(train, dtype, capsys):
    """trains to the same bits, evaluates to about the same, and the command gives the run's own numbers."""
    options = ["--eval_steps=2", "--learning_rate=1e-2"]
    _, plain = train("plain", *options)
    summary, half = train("half", *options, f"--eval_dtype={dtype}")
    assert (plain / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    assert load_file(half / "model.safetensors")["score.weight"].dtype == torch.float32
    assert lines(plain) == lines(half)
    a, b = lines(plain, "eval/margin"), lines(half, "eval/margin")
    assert a != b and a == pytest.approx(b, abs=0.05)
    reset_accelerate()
    assert evaluate.main([f"--model={half}"])["eval/margin"] == pytest.approx(summary["eval/margin"], abs=1e-6)
    reset_accelerate()
    again = evaluate.main([f"--model={half}", "--eval_dtype=none"])
    assert again["eval/margin"] == pytest.approx(lines(plain, "eval/margin")[-1], abs=1e-6)


def test_two_processes(zygote, tmp_path):
    options = ["dataset_name=toy", *SMALL, "--eval_dtype=bfloat16", "--eval_steps=2"]
    zygote.run(2, [*options, "--output_dir=two"], tmp_path)
    zygote.run(1, [*options, "--output_dir=one"], tmp_path)
    assert lines(tmp_path / "one", "eval/margin") == pytest.approx(lines(tmp_path / "two", "eval/margin"), abs=2e-3)


def test_under_fsdp_it_cannot_act(fsdp_zygote, tmp_path):
    (run, _) = fsdp_zygote.start_many(
        2, ["dataset_name=toy", *SMALL, "--eval_dtype=bfloat16", "--output_dir=x"], tmp_path
    )
    assert run.wait() == 2
    assert "eval_dtype=bfloat16: cannot act under FSDP; use DDP or one process" in run.stderr


# ---------------------------------------------------------------------------------------------- tf32, offloading


def test_tf32(monkeypatch, fails):
    before = torch.backends.fp32_precision
    with pytest.raises(InputError, match="tf32=True: it needs an NVIDIA GPU"):
        set_tf32(True)
    assert "tf32=True: it needs an NVIDIA GPU" in fails("--tf32=true")
    monkeypatch.setattr(rm.precision, "is_torch_tf32_available", lambda: True)
    try:
        set_tf32(None)
        assert torch.backends.fp32_precision == before
        set_tf32(True)
        assert torch.backends.fp32_precision == "tf32"
        set_tf32(False)
        assert torch.backends.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def gradients(model, layout="shared_prefix") -> dict[str, torch.Tensor]:
    model.zero_grad()
    chosen_B, rejected_B = concatenated_forward(model, batch_of(layout))
    (chosen_B - 2 * rejected_B).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(monkeypatch, checkpointing):
    sizes = []

    def to_cpu(pin_memory):
        hooks = torch.autograd.graph.save_on_cpu(pin_memory)
        pack = hooks.pack_hook
        hooks.pack_hook = lambda tensor: sizes.append(tensor) or pack(tensor)
        return hooks

    monkeypatch.setattr("rm.model.reward_model.save_on_cpu", to_cpu)
    classifier = tiny_classifier("llama")
    if checkpointing:
        classifier.activation_checkpointing_enable({"use_reentrant": False})
    plain = gradients(RewardModel(classifier).train())
    model = RewardModel(classifier, activation_offloading=True).train()
    offloaded = gradients(model)
    assert len(sizes) > 10  # weights are not among them
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in sizes)
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    sizes.clear()
    score_batch(model.eval(), batch_of("concatenated"))
    assert not sizes


def test_offloading_needs_a_gpu(fails):
    assert "activation_offloading=True: it cannot act without a GPU" in fails("--activation_offloading")


# ---------------------------------------------------------------------------------------------- Liger


def test_liger_gets_model_and_config(monkeypatch):
    """A stand-in for the package, which needs a GPU: what it is called with, and that its patches are undone."""
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
        with pytest.raises(InputError, match=f"liger_kernel_config: '{losses}' cannot act here; there are rms_norm"):
            use_liger_kernels(model, {losses: True})
    expected = score_batch(model, batch_of("concatenated"))
    undo = use_liger_kernels(model, {"rms_norm": False})
    assert calls == [(model.bare, True, False, False, False)]
    assert torch.equal(score_batch(model, batch_of("concatenated")), expected) and "rope" in calls
    undo()
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_liger_needs_a_gpu(fails):
    assert "use_liger_kernel=True: it cannot act without a GPU" in fails("--use_liger_kernel")
    assert "does nothing while use_liger_kernel is false" in fails("--liger_kernel_config={'rope': False}")


# ---------------------------------------------------------------------------------------------- checkpointing


def test_what_checkpointing_is_told(tiny_model_folder, monkeypatch, fails):
    folder = tiny_model_folder("llama")
    tokenizer, told = load_tokenizer(folder), []
    original = transformers.modeling_utils.checkpoint

    def checkpoint(function, *args, **kwargs):
        told.append(kwargs["use_reentrant"])
        return original(function, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", checkpoint)
    found = []
    for kwargs in (None, {"use_reentrant": True}):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        classifier = load_classifier(folder, tokenizer, seed=0, **options)
        found.append(gradients(RewardModel(classifier).train()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert set(told) == {False, True}
    message = (
        "gradient_checkpointing_kwargs={'use_reentrant': True}: does nothing while gradient_checkpointing is false"
    )
    assert message in fails("--gradient_checkpointing_kwargs={'use_reentrant': True}")
    message = "gradient_checkpointing_kwargs: torch takes no 'foo'; there are context_fn, debug"
    assert message in fails(
        "--gradient_checkpointing", "--gradient_checkpointing_kwargs=foo=1", "--overwrite_output_dir"
    )


def test_reentrant_checkpointing_under_lora(train, pretrained):
    some = [f"--model_name_or_path={pretrained}", "--use_peft", "--lora_dropout=0", "--gradient_checkpointing"]
    _, one = train("one", *some)
    _, other = train("other", *some, '--gradient_checkpointing_kwargs={"use_reentrant": true}')
    assert lines(one, "optim/grad_norm") == pytest.approx(lines(other, "optim/grad_norm"), rel=1e-5)


# ---------------------------------------------------------------------------------------------- NEFTune


def noise(layout, alpha=5.0, kind="llama"):
    """(noise on the embeddings [R, L, D], batch) of one forward pass in training."""
    model, seen = RewardModel(tiny_classifier(kind), neftune_noise_alpha=alpha).train(), []
    table = model.bare.get_input_embeddings()
    table.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    batch = batch_of(layout)
    score_batch(model, batch)
    return seen[0] - table.weight.detach()[batch.input_ids_RL], batch


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_noise_is_bounded_by_the_length_of_the_tokens_own_sequence(layout):
    pairs, (found, batch) = random_pairs(), noise(layout)
    order = [(i, side) for side in ("chosen", "rejected") for i in range(6)]  # of the rows of `concatenated`
    lengths = [len(pairs[i][f"input_ids_{side}"]) for i, side in order]
    if layout == "concatenated":
        expected = {(row, t): length for row, length in enumerate(lengths) for t in range(length)}
    else:
        expected = {}
        for row, members in enumerate(ROW.rows):
            start = 0
            for i in members:
                cut, chosen, rejected = (
                    int(pairs[i][k]) for k in ("prefix_length", "length_chosen", "length_rejected")
                )
                parts = [max(chosen, rejected)] * cut + [chosen] * (chosen - cut) + [rejected] * (rejected - cut)
                expected |= {(row, start + t): length for t, length in enumerate(parts)}
                start += len(parts)
    of_batch = sequence_lengths(batch)
    for (row, t), length in expected.items():
        assert of_batch[row, t] == length
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.75 * bound < found[row, t].abs().max() <= bound * 1.001, (row, t)  # of 32 draws


def test_noise_in_training_only():
    model = RewardModel(tiny_classifier("bert"), neftune_noise_alpha=5.0)
    plain, batch = RewardModel(tiny_classifier("bert")), batch_of("concatenated")
    assert torch.equal(score_batch(model.eval(), batch), score_batch(plain, batch))
    noisy = score_batch(model.train(), batch)
    assert not torch.equal(noisy, score_batch(model, batch)) and not torch.equal(noisy, score_batch(plain, batch))
    assert torch.equal(score_batch(model.eval(), batch), score_batch(plain, batch))  # nothing stays


def test_a_run_with_noise_resumes_to_the_same_bits(train, pretrained):
    options = ["--neftune_noise_alpha=5", "--save_steps=2", "--mixed_precision=bf16", "--gradient_checkpointing"]
    _, whole = train("whole", *options)
    _, parts = train("parts", *options, f"--resume_from_checkpoint={whole / 'checkpoints' / 'step-2'}")
    assert_same_bits(whole, parts, also_kept=False)
    _, without = train("without", *options[1:])
    assert lines(without) != lines(whole)


# ---------------------------------------------------------------------------------------------- fp16 and its scaler

# Accelerate has fp16 on GPUs only; torch has the autocast and the scaler on CPUs too
FP16 = """
import torch, train_rm
make = train_rm.make_accelerator
def fp16(mixed_precision, max_grad_norm):
    accelerator = make("no", max_grad_norm)
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
    options, fault = [*HALF, "run", "--save_steps=6"], FP16.format(scale=22)
    zygote.run(1, options, tmp_path, fault=fault)
    skipped = lines(tmp_path / "run", "optim/skipped_steps")
    assert 2 <= skipped[-1] < 8
    scaler = json.loads((tmp_path / "run/checkpoints/step-6/state.json").read_text())["scaler"]
    assert 0 < scaler["scale"] < 2**22
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    (tmp_path / "run" / "results.json").unlink()
    again = [*options, "--resume_from_checkpoint=run/checkpoints/step-6"]
    zygote.run(1, again, tmp_path, fault=fault)
    assert_same_bits(tmp_path / "before", tmp_path / "run", also_kept=False)


def test_two_half_precisions_do_not_go_together(fails):
    """torch has no norms of a bfloat16 input and float16 weights; the first evaluation would end the run."""
    message = fails("--eval_dtype=float16", "--mixed_precision=bf16", "--eval_steps=1")
    assert message == "eval_dtype=float16: does not go with mixed_precision=bf16; use the same type, or none"
