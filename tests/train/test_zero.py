"""DeepSpeed ZeRO on CPUs trains, saves, exports and resumes as one process does. Needs `pip install deepspeed`."""

import importlib.util
import json
import shutil

import pytest
import torch
from runs import SMALL, assert_same_bits, assert_same_run, lines, summary, weights

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

OPTIONS = [*SMALL, "--micro_batch_tokens=300", "--max_steps=6", "--save_steps=3", "--warmup_steps=2"]
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0", "--merge_adapter"]
LATEST = "--resume_from_checkpoint=latest"


@pytest.fixture(scope="module")
def zero_zygote():
    from zygote import Zygote

    zygote = Zygote("deepspeed_on_cpu")
    yield zygote
    zygote.close()


@pytest.mark.parametrize("stage, more", [("1", []), ("2", LORA), ("3", []), ("3", LORA), ("2", ["--optim=sgd"])])
def test_trains_and_resumes_as_one_process(zero_zygote, zygote, tmp_path, pretrained, stage, more):
    options = [*OPTIONS, *more, f"--model_name_or_path={pretrained}"]
    env = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    zygote.run(1, [*options, "--output_dir=one"], tmp_path)
    done = zero_zygote.run(2, [*options, "--output_dir=zero"], tmp_path, **env)
    assert "export checked: 16 sequences" in done.stderr
    assert_same_run(tmp_path / "one", tmp_path / "zero")

    shutil.copytree(tmp_path / "zero", tmp_path / "again")
    (tmp_path / "again" / "results.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-6")
    zero_zygote.run(2, [*options, "--output_dir=again", LATEST], tmp_path, **env)
    assert_same_bits(tmp_path / "zero", tmp_path / "again")


def test_what_does_not_fit_its_checkpoint_is_rejected(zero_zygote, zygote, tmp_path):
    options = [*OPTIONS, "--max_steps=3", "--output_dir=out"]
    zero_zygote.run(2, options, tmp_path)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-3"
    names = json.loads((checkpoint / "manifest.json").read_text()).keys()
    assert "state.json" in names and sum(name.startswith("deepspeed/") for name in names) >= 3
    (tmp_path / "out" / "results.json").unlink()
    for runs in (zero_zygote.start_many(3, [*options, LATEST], tmp_path), [zygote.start([*options, LATEST], tmp_path)]):
        assert {run.wait() for run in runs} == {2}
        assert "was written with 2 processes under DeepSpeed; resume it in the same way" in runs[0].stderr
    next((checkpoint / "deepspeed").iterdir()).write_bytes(b"")
    runs = zero_zygote.start_many(2, [*options, LATEST], tmp_path)
    assert {run.wait() for run in runs} == {2} and "(size or sha256)" in runs[0].stderr


NAN = """
import os, train_rm
loss, calls = train_rm.pairwise_loss, []
def nan_once(*args, **kwargs):
    calls.append(1)
    return loss(*args, **kwargs) * (float("nan") if len(calls) == 1 and os.environ["RANK"] == "1" else 1)
train_rm.pairwise_loss = nan_once
"""


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_step_that_is_not_finite_is_skipped(zero_zygote, tmp_path, stage):
    options = [*OPTIONS, "--max_nonfinite_steps=1", "--save_steps=1", "--max_steps=2", "--output_dir=out"]
    zero_zygote.run(2, options, tmp_path, fault=NAN, ACCELERATE_DEEPSPEED_ZERO_STAGE=stage)
    assert lines(tmp_path / "out", "optim/skipped_steps") == [1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())


TYPES = """
import sys, train_rm
forward, loss = train_rm.concatenated_forward, train_rm.pairwise_loss
def noted_forward(model, batch):
    outputs = forward(model, batch)
    found = [next(model.parameters()), outputs[0]]
    reduced = [model.communication_data_type, model.optimizer.gradient_accumulation_dtype]
    print("types", *(tensor.dtype for tensor in found), *reduced, file=sys.stderr)
    return outputs
def noted_loss(*args, **kwargs):
    values = loss(*args, **kwargs)
    print("loss", values.dtype, file=sys.stderr)
    return values
train_rm.concatenated_forward, train_rm.pairwise_loss = noted_forward, noted_loss
"""


@pytest.mark.parametrize("stage", ["2", "3"])
def test_types_in_bf16(zero_zygote, tmp_path, stage):
    """Weights in bf16; rewards, loss, and the sums of gradients in float32, and so are the saved weights."""
    options = [*SMALL, "--mixed_precision=bf16", "--max_steps=1", "--output_dir=out"]
    done = zero_zygote.run(2, options, tmp_path, fault=TYPES, ACCELERATE_DEEPSPEED_ZERO_STAGE=stage)
    assert "types torch.bfloat16 torch.float32 torch.float32 torch.float32\nloss torch.float32\n" in done.stderr
    assert "export checked: 16 sequences" in done.stderr
    saved = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in saved.values())  # not rounded to bf16


def test_stage_0_is_rejected(zero_zygote, tmp_path):
    runs = zero_zygote.start_many(2, [*OPTIONS, "--output_dir=out"], tmp_path, ACCELERATE_DEEPSPEED_ZERO_STAGE="0")
    assert [run.wait() for run in runs] == [2, 2] and "zero_stage: 0 gives no gradient norm" in runs[0].stderr


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_the_best_weights_are_saved(zero_zygote, zygote, tmp_path, stage):
    options = [*OPTIONS, "--max_steps=12", "--warmup_steps=12", "--learning_rate=0.1", "--save_steps=0"]
    options += ["--lr_scheduler_type=constant_with_warmup", "--eval_steps=2", "--head_learning_rate=0.05"]
    options += ["--load_best_model_at_end", "--early_stopping_patience=2"]
    zygote.run(1, [*options, "--output_dir=one"], tmp_path)
    zero_zygote.run(2, [*options, "--output_dir=zero"], tmp_path, ACCELERATE_DEEPSPEED_ZERO_STAGE=stage)
    one, zero = (summary(tmp_path / name) for name in ("one", "zero"))
    assert one["train/best_step"] == zero["train/best_step"] < one["train/steps"] == zero["train/steps"]
    for name, tensor in weights(tmp_path / "zero").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], atol=1e-3, rtol=0)
