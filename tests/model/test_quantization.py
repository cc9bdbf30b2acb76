"""4 and 8 bits: really trained, saved, resumed and loaded again where bitsandbytes is installed; and the errors."""

import importlib.util

import pytest
from runs import SMALL, assert_same_bits, lines, reset_accelerate
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rm.config.errors import InputError
from rm.evaluate import __main__ as evaluate
from rm.model.quantization import quantization_config

LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0", "--learning_rate=1e-2"]


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_trained_resumed_and_loaded_again(train, pretrained, bits, capsys):
    pytest.importorskip("bitsandbytes")
    options = [f"--model_name_or_path={pretrained}", *LORA, bits, "--save_steps=2"]
    summary, whole = train("whole", *options)  # which checks its export
    assert lines(whole)[-1] < lines(whole)[0]
    assert {w.dtype.itemsize for w in load_file(whole / "adapter_model.safetensors").values()} == {4}
    checkpoint = f"--resume_from_checkpoint={whole / 'checkpoints' / 'step-2'}"
    _, parts = train("parts", *options, checkpoint)
    assert_same_bits(whole, parts, also_kept=False)
    # evaluations leave the quantised weights as they are
    _, evaluated = train("evaluated", *options, "--eval_steps=1")
    assert lines(evaluated) == lines(whole)
    reset_accelerate()
    metrics = evaluate.main([f"--model={whole}"])
    assert metrics["eval/loss"] == pytest.approx(summary["eval/loss"], abs=1e-3)


def test_processes(zygote, fsdp_zygote, pretrained, tmp_path):
    """DDP trains as one process; FSDP would shard what it cannot, and is refused."""
    options = ["dataset_name=toy", *SMALL, f"--model_name_or_path={pretrained}", *LORA, "--load_in_4bit"]
    (run, _) = fsdp_zygote.start_many(2, [*options, "--output_dir=fsdp"], tmp_path)
    assert run.wait() == 2
    assert "load_in_4bit=True: cannot act under FSDP; use DDP or one process" in run.stderr
    pytest.importorskip("bitsandbytes")
    options += ["--save_steps=2"]
    zygote.run(1, [*options, "--output_dir=one"], tmp_path)
    zygote.run(2, [*options, "--output_dir=two"], tmp_path)
    zygote.run(2, [*options, "--output_dir=on", "--resume_from_checkpoint=one/checkpoints/step-2"], tmp_path)
    assert lines(tmp_path / "one") == pytest.approx(lines(tmp_path / "two"), abs=1e-5)
    assert lines(tmp_path / "one") == pytest.approx(lines(tmp_path / "on"), abs=1e-5)


@pytest.mark.parametrize("bits", [["--load_in_4bit", "--use_bnb_nested_quant"], ["--load_in_8bit"]])
def test_merged_into_what_the_quantised_weights_stand_for(train, pretrained, bits):
    pytest.importorskip("bitsandbytes")
    _, folder = train("out", f"--model_name_or_path={pretrained}", *LORA, *bits, "--merge_adapter")
    assert not hasattr(AutoModelForSequenceClassification.from_pretrained(folder).config, "quantization_config")


def test_without_the_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert quantization_config() is None
    with pytest.raises(InputError, match="load_in_8bit=True needs the package bitsandbytes: pip install bitsandbytes"):
        quantization_config(load_in_8bit=True)


def test_the_config_is_trls(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    options = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
    config = quantization_config(load_in_4bit=True, dtype="bfloat16", **options).to_dict()
    assert config["load_in_4bit"] and config["bnb_4bit_quant_type"] == "fp4" and config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == config["bnb_4bit_quant_storage"] == "bfloat16"
    assert "score" in config["llm_int8_skip_modules"]


def test_options_that_cannot_act(fails):
    assert "load_in_4bit=True: does nothing while use_peft is false" in fails("--load_in_4bit")
    assert "load_in_4bit is given too" in fails("--use_peft", "--load_in_4bit", "--load_in_8bit")
    assert "does nothing while load_in_4bit is false" in fails("--use_peft", "--load_in_8bit", "--use_bnb_nested_quant")
