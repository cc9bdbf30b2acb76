"""Precedence, forms of the command line, and one-line errors that name the place and the fix."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from rm.config.cli import help_text, parse_config
from rm.config.errors import InputError
from rm.config.options import RewardConfig


@pytest.fixture
def write(tmp_path):
    def make(text: str, name: str = "c.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate=1e-5", "--use_peft=true", "--lora_target_modules=['q_proj', 'v_proj']", "--max_length=none"],
        ["--learning_rate", "1e-5", "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--max_length", "None"],
        ["learning_rate=1e-5", "use_peft=True", 'lora_target_modules=["q_proj", "v_proj"]', "max_length=null"],
        [
            "--learning-rate=0.00001",
            "--use-peft",
            "True",
            "--lora-target-modules=('q_proj', 'v_proj')",
            "max_length=none",
        ],
    ],
)
def test_forms_of_the_command_line(argv):
    config = parse_config(argv)
    assert config.learning_rate == 1e-5 and isinstance(config.learning_rate, float)
    assert config.use_peft is True and config.max_length is None
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_a_dict_may_be_given_as_pairs():
    for text in ("momentum=0.9,nesterov=true,x=1e-5", '{"momentum": 0.9, "nesterov": true, "x": 1e-5}'):
        config = parse_config([f"--optim_args={text}", "--optim=sgd", "--dataset_name=toy", "--model_name_or_path=m"])
        assert config.optim_args == {"momentum": 0.9, "nesterov": True, "x": 1e-5}
    config = parse_config(["optim_args=betas=(0.8,0.9),amsgrad=true", "dataset_name=toy", "model_name_or_path=m"])
    assert config.optim_args == {"betas": (0.8, 0.9), "amsgrad": True}


def test_forms_of_several_data_sets(write):
    text = "dataset_name: [a.jsonl, org/b]\ndataset_weights: [1, 5e-1]\ndataset_config: [null, main]\n"
    text += "eval_dataset_name: {x: a.jsonl, y: org/b}\neval_dataset_config: [null, main]\nmodel_name_or_path: m\n"
    argv = ["--dataset_name", "a.jsonl", "org/b", "--dataset_weights", "1", "5e-1", '--dataset_config=[null, "main"]']
    argv += ["eval_dataset_name={'x': 'a.jsonl', 'y': 'org/b'}", "eval_dataset_config=[None, 'main']"]
    config = parse_config([*argv, "--model_name_or_path=m"])
    assert config == parse_config(["--config", write(text)])
    assert (config.dataset_name, config.dataset_weights) == (["a.jsonl", "org/b"], [1.0, 0.5])
    assert (config.dataset_config, config.eval_dataset_name) == ([None, "main"], {"x": "a.jsonl", "y": "org/b"})
    assert parse_config(["--config", write(config.to_yaml())]) == config
    one = parse_config(["--dataset_name", "a.jsonl", "--model_name_or_path=m", "--eval_dataset_name", "b.jsonl"])
    assert (one.dataset_name, one.eval_dataset_name) == ("a.jsonl", "b.jsonl")


def test_precedence_default_yaml_command_line(write):
    first = write("learning_rate: 1e-5\nseed: 1\nmixed_precision: no\nreport_to: wandb\n", "a.yaml")
    second = write("seed: 2\nchat_template_kwargs: {date_string: 1 Jan}\nmax_grad_norm: 0.5\n", "b.yaml")
    config = parse_config(["--config", first, "--config", second, "--max_grad_norm=2"])
    assert config.learning_rate == 1e-5  # YAML reads 1e-5 as a string
    assert (config.seed, config.max_grad_norm, config.weight_decay) == (2, 2.0, RewardConfig().weight_decay)
    assert config.mixed_precision == "no"  # YAML reads no as false
    assert config.report_to == ["wandb"] and config.chat_template_kwargs == {"date_string": "1 Jan"}


def test_no_argument_is_the_quickstart():
    quickstart = parse_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    assert parse_config([]) == quickstart
    assert parse_config(["seed=1"]) == dataclasses.replace(quickstart, seed=1)
    named = parse_config(["--model_name_or_path=gpt2", "--dataset_name=x.jsonl"])  # as TRL's command lines do
    assert named == RewardConfig(model_name_or_path="gpt2", dataset_name="x.jsonl")


def test_resolved_config_reads_back(write):
    config = parse_config(
        ["--use_peft", "--lora_target_modules=all-linear", "--report_to=wandb,tensorboard", "--seed=7"]
    )
    assert config.report_to == ["wandb", "tensorboard"]
    assert parse_config(["--config", write(config.to_yaml())]) == config


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learnin_rate=1"], "command line: unknown key 'learnin_rate'; did you mean learning_rate?"),
        (["--seed=abc"], "command line: seed='abc' does not fit; expected int"),
        (["--seed=true"], "command line: seed='true' does not fit; expected int"),
        (["--use_peft=maybe"], "command line: use_peft='maybe' does not fit; expected bool"),
        (["--layout=packed"], "does not fit; expected auto, shared_prefix, concatenated"),
        (["--learning_rate=nan"], "does not fit"),
        (["--learning_rate"], "--learning_rate needs a value"),
        (["1e-5"], "'1e-5' is not an option; write --key=value or key=value"),
        (["--config=missing.yaml"], "missing.yaml: cannot be read (No such file or directory)"),
        (["--lora_r=8"], "lora_r=8: does nothing while use_peft is false"),
        (["--learning_rate=-1"], "learning_rate=-1.0: must be greater than 0"),
        (["--train_batch_size=8", "--per_device_train_batch_size=8"], "train_batch_size is given too"),
        (["--label_smoothing_factor=0.5"], "must be in [0, 0.5)"),
        (["--run_name=../../x"], "must be a plain name, not a path"),
        (["--dataset_name=my.jsonl"], "model_name_or_path is not given, but dataset_name is"),
        (["--dtype=float16", "--mixed_precision=fp16"], "fp16 autocast needs float32 weights"),
        (["--resume_from_checkpoint=latest"], "name the run to go on with: output_dir or run_name"),
        (["--save_total_limit=2"], "does nothing while save_steps is 0"),
        (["--warmup_ratio=0.1", "--warmup_steps=3"], "warmup_steps is given too"),
        (["--warmup_ratio=0.1", "--lr_scheduler_type=constant"], "lr_scheduler_type=constant has no warm-up"),
        (["--lr_scheduler_type=sawtooth"], "does not fit; expected linear, cosine"),
    ],
)
def test_errors_are_one_line_with_the_fix(argv, message, write):
    with pytest.raises(InputError) as error:
        parse_config(["--config", write("dataset_name: toy\n"), *argv])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2\n", "c.yaml: line 2: key 'seed' is given twice"),
        ("sed: 1\n", "c.yaml: unknown key 'sed'; did you mean seed?"),
        ("learning_rate: [1, 2]\n", "c.yaml: learning_rate=[1, 2] does not fit; expected float"),
        ("seed: true\n", "c.yaml: seed=True does not fit"),
        ("- a\n", "c.yaml: expected `key: value` lines"),
        ("a: [\n", "c.yaml: "),
    ],
)
def test_yaml_errors_name_file_and_key(text, message, write):
    with pytest.raises(InputError) as error:
        parse_config(["--config", write(text)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_trl_batch_size():
    config = RewardConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert config.global_batch_size(num_processes=3) == 24
    assert RewardConfig(gradient_accumulation_steps=2).global_batch_size(1) == 16
    assert RewardConfig(train_batch_size=10).global_batch_size(3) == 10
    assert RewardConfig().global_batch_size(3) == 64


def test_every_field_has_a_help_line(capsys):
    text = help_text()
    for f in dataclasses.fields(RewardConfig):
        assert f"\n  --{f.name}=" in text and len(f.metadata["help"]) > 3
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    assert "Optimization" in capsys.readouterr().out


def test_every_recipe_parses():
    recipes = [path for path in (ROOT / "configs").glob("*.yaml") if path.name != "sweep.yaml"]
    assert {"quickstart.yaml", "hh_rlhf_gpt2.yaml", "ultrafeedback_qwen.yaml", "local_jsonl.yaml", "mixture.yaml"} <= {
        p.name for p in recipes
    }
    for path in recipes:
        parse_config(["--config", str(path)])


def test_sweep_parameters_exist():
    sweep = yaml.safe_load(Path(ROOT / "configs" / "sweep.yaml").read_text())
    assert set(sweep["parameters"]) <= {f.name for f in dataclasses.fields(RewardConfig)}


def test_accelerate_configs_parse():
    from accelerate.commands.config.config_args import load_config_from_file

    files = {path.stem: path for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    assert set(files) == {"cpu", "ddp", "fsdp2", "deepspeed_zero3", "multi_node"}
    kinds = {name: str(load_config_from_file(str(path)).distributed_type.value) for name, path in files.items()}
    assert kinds == {
        "cpu": "NO",
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "deepspeed_zero3": "DEEPSPEED",
        "multi_node": "MULTI_GPU",
    }
