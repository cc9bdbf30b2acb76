"""Precedence, forms of the command line, one-line errors that name the fix, and the sections of options."""

import dataclasses
import subprocess
import sys

import pytest
import yaml
from runs import ROOT

from rm.config.cli import help_text, make_config, parse, parse_config
from rm.config.errors import InputError
from rm.config.options import DataOptions, LoraOptions, LossOptions, ModelOptions, RewardConfig, changed_options
from rm.config.section import Section, fields_of, option


@pytest.fixture
def write(tmp_path):
    def make(text: str, name: str = "c.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "argv",
    [
        "--learning_rate=1e-5|--use_peft=true|--lora_target_modules=['q_proj', 'v_proj']|--max_length=none",
        "--learning_rate|1e-5|--use_peft|--lora_target_modules|q_proj|v_proj|--max_length|None",
        'learning_rate=1e-5|use_peft=True|lora_target_modules=["q_proj", "v_proj"]|max_length=null',
        "--learning-rate=0.00001|--use-peft|True|--lora-target-modules=('q_proj', 'v_proj')|max_length=none",
    ],
)
def test_forms_of_the_command_line(argv):
    config = parse_config(argv.split("|"))
    assert config.learning_rate == 1e-5 and isinstance(config.learning_rate, float)
    assert config.use_peft is True and config.max_length is None
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_a_dict_may_be_given_as_pairs():
    for text in ("momentum=0.9,nesterov=true,x=1e-5", '{"momentum": 0.9, "nesterov": true, "x": 1e-5}'):
        assert RewardConfig(optim_args=text).optim_args == {"momentum": 0.9, "nesterov": True, "x": 1e-5}
    assert RewardConfig(optim_args="betas=(0.8,0.9),amsgrad=true").optim_args == {"betas": [0.8, 0.9], "amsgrad": True}


def test_text_stays_text():
    config = RewardConfig(run_name="1e5", dataset_config="007", output_dir="(x)", report_to="wandb, tensorboard")
    assert (config.run_name, config.dataset_config, config.output_dir) == ("1e5", "007", "(x)")
    assert config.report_to == ["wandb", "tensorboard"] and RewardConfig(report_to="none").report_to == []
    assert RewardConfig(eval_dataset_name="lr=1/x.jsonl").eval_dataset_name == "lr=1/x.jsonl"


def test_forms_of_several_data_sets(write):
    text = "dataset_name: [a.jsonl, org/b]\ndataset_weights: [1, 5e-1]\ndataset_config: [null, main]\n"
    text += "eval_dataset_name: {x: a.jsonl, y: org/b}\neval_dataset_config: [null, main]\nmodel_name_or_path: m\n"
    argv = ["--dataset_name", "a.jsonl", "org/b", "--dataset_weights", "1", "5e-1", '--dataset_config=[null, "main"]']
    argv += ["eval_dataset_name={'x': 'a.jsonl', 'y': 'org/b'}", "eval_dataset_config=[None, 'main']"]
    config = parse_config([*argv, "--model_name_or_path=m"])
    assert config == parse_config(["--config", write(text)])
    assert (config.dataset_name, config.dataset_weights) == (["a.jsonl", "org/b"], [1.0, 0.5])
    assert (config.dataset_config, config.eval_dataset_name) == ([None, "main"], {"x": "a.jsonl", "y": "org/b"})
    one = parse_config(["--dataset_name", "a.jsonl", "--model_name_or_path=m", "--eval_dataset_name", "b.jsonl"])
    assert (one.dataset_name, one.eval_dataset_name) == ("a.jsonl", "b.jsonl")


def test_precedence_default_yaml_command_line(write):
    first = write("learning_rate: 1e-5\nseed: 1\nmixed_precision: no\nreport_to: wandb\n", "a.yaml")
    second = write("seed: 2\nchat_template_kwargs: {date_string: 1 Jan}\nmax_grad_norm: 0.5\n", "b,c.yaml")
    config = parse_config(["--config", first, f"--config={second}", "--max_grad_norm=2"])
    assert config.learning_rate == 1e-5  # YAML reads 1e-5 as a string
    assert (config.seed, config.max_grad_norm, config.weight_decay) == (2, 2.0, 0.0)
    assert config.mixed_precision == "no"  # YAML reads no as false
    assert config.report_to == ["wandb"] and config.chat_template_kwargs == {"date_string": "1 Jan"}


def test_no_argument_is_the_quickstart(monkeypatch, tmp_path):
    quickstart = parse_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    assert parse_config([]) == quickstart
    assert parse_config(["seed=1"]) == dataclasses.replace(quickstart, seed=1)
    named = parse_config(["--model_name_or_path=gpt2", "--dataset_name=x.jsonl"])  # as TRL's command lines do
    assert named == RewardConfig(model_name_or_path="gpt2", dataset_name="x.jsonl")
    monkeypatch.chdir(tmp_path)
    assert parse_config([]).model_name_or_path == str(ROOT / "configs" / "tiny_llama")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--learnin_rate=1", "command line: unknown key 'learnin_rate'; did you mean learning_rate?"),
        ("--lr=1", "command line: 'lr' is the name in another trainer; here: learning_rate"),
        ("cutoff_len=1", "command line: 'cutoff_len' is the name in another trainer; here: max_length"),
        ("--seed=1|--seed=2", "command line: seed is given twice"),
        ("seed=1|--seed|1", "command line: seed is given twice"),
        ("--learning_rate", "command line: --learning_rate needs a value"),
        ("1e-5", "command line: '1e-5' is not an option; write --key=value or key=value"),
        ("--config=missing.yaml", "missing.yaml: cannot be read (No such file or directory)"),
        ("--config=/dev/null", "/dev/null: is not a regular file"),
        ("--seed=abc", "seed='abc': must be a valid integer"),
        ("--seed=true", "seed=True: must not be true or false"),
        ("--seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("--seed=4294967296", "seed=4294967296: must be less than 4294967296"),
        ("--seed=none", "seed='none': must be a valid integer"),
        ("--use_peft=maybe", "use_peft='maybe': must be a valid boolean"),
        ("--layout=packed", "layout='packed': must be 'auto', 'shared_prefix' or 'concatenated'"),
        ("--learning_rate=NaN", "learning_rate=nan: must be a finite number"),
        ("--max_grad_norm=1e999", "max_grad_norm=inf: must be a finite number"),
        ("--learning_rate=-1", "learning_rate=-1: must be greater than 0"),
        ("--max_length=0", "max_length=0: must be greater than 0, or none"),
        ("--label_smoothing_factor=0.5", "label_smoothing_factor=0.5: must be less than 0.5"),
        ("--max_steps=0", "max_steps=0: must be greater than 0, or -1 to use num_train_epochs"),
        ("--logging_steps=2.5", "logging_steps=2.5: must be a number of steps, or a fraction of all steps below 1"),
        ("--run_name=../../x", "run_name='../../x': must be a plain name"),
        ("--project=..", "project='..': must be a plain name"),
        ("--lora_r=8", "lora_r=8: has no effect without use_peft"),
        ("--use_peft|--lora_r=8|--peft_config=x", "lora_r=8: peft_config is given too; give one of them"),
        ("--use_peft|--trainable=score", "trainable='score': use_peft is given too; give one of them"),
        (
            "--train_batch_size=8|--per_device_train_batch_size=8",
            "per_device_train_batch_size=8: train_batch_size is g",
        ),
        ("--warmup_ratio=0.1|--warmup_steps=3", "warmup_ratio=0.1: warmup_steps is given too"),
        ("--warmup_ratio=0.1|--lr_scheduler_type=constant", "warmup_ratio=0.1: lr_scheduler_type=constant has no warm"),
        ("--lr_scheduler_type=greedy", "lr_scheduler_type='greedy': depends on evaluations; set eval_steps"),
        ("--optim=sgd|--adam_beta1=0.8", "adam_beta1=0.8: has no effect with optim=sgd; use optim_args"),
        ("--dtype=float16|--mixed_precision=fp16", "dtype='float16': mixed_precision=fp16 needs float32"),
        ("--save_total_limit=2", "save_total_limit=2: has no effect without save_steps"),
        ("--load_best_model_at_end", "load_best_model_at_end=True: has no effect without eval_steps"),
        (
            "--metric_for_best_model=loss|--eval_steps=1",
            "metric_for_best_model='loss': must be one of the eval/ metrics",
        ),
        ("--greater_is_better=true", "greater_is_better=True: has no effect without metric_for_best_model"),
        ("--resume_from_checkpoint=true", "resume_from_checkpoint='true': write latest"),
        ("--resume_from_checkpoint=latest", "resume_from_checkpoint='latest': name the run to resume"),
        ("--dataset_name=my.jsonl", "model_name_or_path is needed, since dataset_name is given"),
        ("--hub_token=abc", "hub_token='[redacted]': has no effect without push_to_hub"),
        ("--push_to_hub|--hub_strategy=every_save", "hub_strategy='every_save': must be end, checkpoint or all"),
        ("--push_to_hub|--hub_model_id=a--b/c", "hub_model_id='a--b/c': must be user/name or name"),
        ("--chat_template_kwargs={'api_key': '[redacted]'}", "a secret was hidden here when the config was written"),
    ],
)
def test_errors_are_one_line_with_the_fix(argv, message, write):
    with pytest.raises(InputError) as error:
        parse_config(["--config", write("dataset_name: toy\n"), *argv.split("|")])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2\n", "c.yaml: line 2: key 'seed' is given twice"),
        ("optim_args: {a: 1, a: 2}\n", "c.yaml: line 1: key 'a' is given twice"),
        ("sed: 1\n", "c.yaml: unknown key 'sed'; did you mean seed?"),
        ("1: 1\n", "c.yaml: unknown key '1'"),
        ("? [a]\n: 1\n", "c.yaml: "),
        ("- a\n", "c.yaml: expected `key: value` lines"),
        ("a: [\n", "c.yaml: "),
        ("optim_args: &x {a: 1}\nlr_scheduler_kwargs: *x\n", "c.yaml: line 2: write the value instead of an alias"),
        ("a: " + "[" * 300, "c.yaml: "),
        ("seed: !!python/object/apply:os.getcwd []\n", "c.yaml: could not determine a constructor"),
    ],
)
def test_yaml_errors_name_the_file(text, message, write):
    with pytest.raises(InputError) as error:
        parse_config(["--config", write(text)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help_and_wrong_options_are_answered_before_heavy_imports():
    """In train_rm.py, on which a launcher starts several processes."""
    code = """import runpy, sys
sys.argv = ["train_rm.py", "{}"]
try:
    runpy.run_path("train_rm.py", run_name="__main__")
except SystemExit as end:
    print(end.code, *{{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules))"""
    for word, out, err in (("--help", "0", ""), ("--lr=1", "2", "error: command line: 'lr' is")):
        command = [sys.executable, "-c", code.format(word)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.stdout.splitlines()[-1] == out and done.stderr.startswith(err), done


# ---------------------------------------------------------------- sections


def test_pitfalls_of_pydantic():
    config = RewardConfig(seed="7", warmup_steps="5", eval_steps=2, early_stopping_patience=1)
    assert (config.seed, config.warmup_steps, config.metric_for_best_model) == (7, 5, "eval/loss")
    assert fields_of(RewardConfig)["seed"].default == 42 and RewardConfig().report_to == []
    assert RewardConfig().report_to is not RewardConfig().report_to
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1.5
    for wrong in ({"seed": True}, {"weight_decay": float("inf")}, {"sed": 1}, {"seed": None}, {"max_steps": 1.5}):
        with pytest.raises(InputError):
            dataclasses.replace(config, **wrong) if "sed" not in wrong else RewardConfig(**wrong)


def test_sections():
    config = RewardConfig(use_peft=True, lora_r=4, margin_column="m")
    assert isinstance(config, DataOptions) and isinstance(config, ModelOptions) and isinstance(config, LoraOptions)
    assert list(fields_of(LossOptions)) == ["loss_type", "center_rewards_coefficient", "label_smoothing_factor"]
    assert LoraOptions(lora_r=4).lora_r == 4  # `use_peft` is in another section
    assert list(dataclasses.asdict(config))[0] == "model_name_or_path"
    assert list(dataclasses.asdict(config)) == list(fields_of(RewardConfig))
    rules = [field.json_schema_extra for field in fields_of(RewardConfig).values()]
    assert {rule[key] for rule in rules for key in ("needs", "excludes")} <= {"", *fields_of(RewardConfig)}


def test_yaml_of_a_config_reads_back(write):
    options = ["--use_peft", "--lora_target_modules=all-linear", "--report_to=wandb,tensorboard", "--seed=7"]
    config = parse_config([*options, "optim_args=betas=(0.8,0.9)", "--push_to_hub", "--hub_token=abc"])
    assert "abc" not in config.to_yaml()
    assert parse_config(["--config", write(config.to_yaml())]) == dataclasses.replace(config, hub_token=None)


def test_trl_batch_size():
    config = RewardConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert config.global_batch_size(num_processes=3) == 24
    assert RewardConfig(gradient_accumulation_steps=2).global_batch_size(1) == 16
    assert RewardConfig(train_batch_size=10).global_batch_size(3) == 10
    assert RewardConfig().global_batch_size(3) == 64


def test_options_that_may_change_on_resume():
    before = RewardConfig(eval_steps=2).resolved(1, "no")
    free = RewardConfig(eval_steps=3, micro_batch_tokens=9, run_name="x").resolved(1, "no")
    assert changed_options(before, free) == changed_options(before, free, places_too=True) == []
    moved = before | {"dataset_name": "copy.jsonl"}
    assert changed_options(before, moved) == []
    assert changed_options(before, moved, places_too=True) == ["dataset_name: 'toy' -> 'copy.jsonl'"]
    other = RewardConfig(eval_steps=3, early_stopping_patience=1, margin_column="m").resolved(2, "bf16")
    names = {line.split(":")[0] for line in changed_options(before, other)}
    assert names == {
        "margin_column",
        "mixed_precision",
        "eval_steps",
        "early_stopping_patience",
        "metric_for_best_model",
    }


# ---------------------------------------------------------------- programs, files


class Program(Section):
    """usage: program

    Do it.
    """

    model: str = option(..., "a folder")
    files: list[str] = option([], "files")
    count: int = option(3, "a number", gt=0)


def test_a_program_with_options_of_its_own():
    own, given = parse(["--model=m", "a=b", "c", "--count", "5", "seed=1"], Program, ["seed"], positional="files")
    assert (own.model, own.files, own.count, given) == ("m", ["a=b", "c"], 5, {"seed": "1"})
    assert make_config(given).seed == 1
    assert parse(["--model=m", "--files=a", "b"], Program, positional="files")[0].files == ["a", "b"]
    for argv, message in {
        "--count=1": "--model is needed: a folder",
        "--model=m --count=0": "count=0: must be greater than 0",
        "--model=m --max_steps=1": "command line: max_steps has no effect in this program; see --help",
        "--model=m --modl=1": "command line: unknown key 'modl'; did you mean model?",
        "--model=m x": "command line: 'x' is not an option",
    }.items():
        with pytest.raises(InputError, match=message):
            parse(argv.split(), Program, ["seed"])


def test_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--seed=1", "--help"])
    text = capsys.readouterr().out
    for name, field in fields_of(RewardConfig).items():
        assert f"\n  --{name}=" in text and len(field.description) > 3
    assert text.index("\nModel\n") < text.index("\nLoRA\n") < text.index("\nData\n") < text.index("\nHub\n")
    text = help_text(Program, ["seed"])
    assert text.startswith("usage: program\n\nDo it.") and "--model=...  a folder" in text
    assert "--seed=42" in text and "--max_steps" not in text


SWEEPS = sorted((ROOT / "configs").glob("sweep*.yaml"))


def test_every_recipe_parses():
    recipes = [path for path in (ROOT / "configs").glob("*.yaml") if path not in SWEEPS]
    assert len(recipes) >= 5
    for path in recipes:
        parse_config(["--config", str(path)])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_parses(path):
    sweep = yaml.safe_load(path.read_text())
    command = [word for word in sweep["command"] if word.startswith("--") and word != "--config"]
    (recipe,) = [word for word in sweep["command"] if word.startswith("configs/")]
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values") or [parameter.get("value", parameter.get("min"))]:
            parse_config(["--config", str(ROOT / recipe), *command, f"--{name}={value}"])


def test_accelerate_configs_parse():
    from accelerate.commands.config.config_args import load_config_from_file

    files = {path.stem: path for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    kinds = {name: str(load_config_from_file(str(path)).distributed_type.value) for name, path in files.items()}
    assert kinds == {
        "cpu": "NO",
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "deepspeed_zero3": "DEEPSPEED",
        "multi_node": "MULTI_GPU",
        "multi_node_fsdp2": "FSDP",
    }
