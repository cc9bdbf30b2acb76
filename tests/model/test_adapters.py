"""PEFT: every option of LoRA, other methods, adapters that are continued or merged; whole runs and their exports."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CAUSAL, COMMON, tiny_tokenizer
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, TaskType, get_peft_model
from runs import SMALL, assert_same_bits, lines, reset_accelerate
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import train_rm
from rm.config.errors import InputError
from rm.config.options import LORA_OPTIONS
from rm.model.adapters import LORA, add_adapter, lora_config, read_peft_config
from rm.model.load import load_classifier, load_tokenizer

ALL = "--lora_target_modules=all-linear"


def adapter_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def peft_file(tmp_path):
    def make(name="peft.yaml", **values) -> str:
        text = json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


# ---------------------------------------------------------------------------------------------- LoRA


def test_the_options_of_the_config_are_those_of_lora():
    assert set(LORA) == set(LORA_OPTIONS)
    lora = lora_config({"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True, "use_dora": True})
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora, lora.use_dora) == (3, 5, 0.1, True, True)
    for given, meant in (("q_proj", {"q_proj"}), (["q_proj"], {"q_proj"}), (["all-linear"], "all-linear")):
        assert lora_config({"lora_target_modules": given}).target_modules == meant
    assert lora_config({"lora_target_modules": r".*\.q_proj"}).target_modules == r".*\.q_proj"  # PEFT's pattern


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("options", [["--use_rslora"], ["--use_dora", "--lora_modules_to_save=embed_tokens"]])
def test_lora_of_every_kind_is_saved_as_it_was_evaluated(train, pretrained, options, merge):
    """The run itself checks its export, and merges."""
    some = [f"--model_name_or_path={pretrained}", "--use_peft", "--lora_r=4", ALL, *options]
    _, folder = train("out", *some, *(["--merge_adapter"] if merge else []))
    assert len(set(lines(folder))) > 1
    saved = adapter_config(folder / "adapter" if merge else folder)
    assert saved["task_type"] == "SEQ_CLS" and saved["r"] == 4
    assert (saved["use_rslora"], saved["use_dora"]) == ("--use_rslora" in options, "--use_dora" in options)
    weights = load_file((folder / "adapter" if merge else folder) / "adapter_model.safetensors")
    assert any("magnitude" in name for name in weights) == ("--use_dora" in options)
    assert any("embed_tokens" in name for name in weights) == ("--use_dora" in options)
    assert (folder / "model.safetensors").exists() is merge


def test_parameters_that_are_no_layers(tmp_path):
    config = AutoConfig.for_model(
        "mixtral", **(COMMON | CAUSAL["llama"] | dict(num_local_experts=2, num_experts_per_tok=1))
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), load_tokenizer(str(tmp_path)), seed=0)
    names = {"lora_target_modules": ["q_proj"], "lora_target_parameters": ["mlp.experts.gate_up_proj"]}
    adapted = add_adapter(model, lora_config(names | {"lora_dropout": 0.0}))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("experts" in name and "lora_A" in name for name in trained)


def test_wrong_names_of_modules(fails, pretrained):
    some = [f"--model_name_or_path={pretrained}", "--use_peft"]
    assert "lora_modules_to_save: LlamaForSequenceClassification has no module 'nope'" in fails(
        *some, "--lora_modules_to_save=nope"
    )
    assert "lora_target_modules=['nope']" in fails(*some, "--lora_target_modules=nope", "--overwrite_output_dir")


# ---------------------------------------------------------------------------------------------- continuing


@pytest.fixture(scope="module")
def adapter(pretrained, tmp_path_factory):
    """A LoRA run's output folder."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    reset_accelerate()
    options = [f"--model_name_or_path={pretrained}", "--use_peft", "--lora_r=4", "--lora_dropout=0", ALL]
    train_rm.main(["dataset_name=toy", *SMALL, *options, f"--output_dir={folder}", "--learning_rate=1e-2"])
    return folder


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_adapter_is_continued(train, adapter, pretrained, merge):
    options = [f"--model_name_or_path={adapter}", "--use_peft", "--lora_r=4"]  # lora_r as in the adapter: no harm
    summary, folder = train("more", *options, *(["--merge_adapter"] if merge else []))
    out = folder / "adapter" if merge else folder
    assert adapter_config(out)["base_model_name_or_path"] == pretrained  # the same base, not the adapter
    assert adapter_config(out)["r"] == 4 and adapter_config(out)["modules_to_save"] == ["classifier", "score"]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, out))
    assert before.keys() == after.keys()
    head = next(name for name in before if "score" in name)
    assert 0 < (before[head] - after[head]).abs().max() < 0.01  # goes on from it: 4 steps of at most 1e-4
    assert lines(folder)[0] == pytest.approx(lines(adapter)[-1], abs=0.2) and lines(folder)[0] < 0.75
    if merge:
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_without_use_peft_it_is_merged_and_all_weights_are_trained(train, adapter):
    tiny = ["--learning_rate=1e-30", "--max_steps=1"]  # so that what is saved is what was merged
    _, folder = train("all", f"--model_name_or_path={adapter}", *tiny)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trained = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1)
    trained.config.pad_token_id = model.config.pad_token_id
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(model(ids).logits, trained(ids).logits, atol=1e-5, rtol=1e-5)
    state = json.loads((folder / "results.json").read_text())
    assert not state["config"]["use_peft"]
    _, moved = train("moved", f"--model_name_or_path={adapter}")
    a, b = (load_file(path / "model.safetensors") for path in (folder, moved))
    assert all(not torch.equal(a[name], b[name]) for name in a)  # every weight


def test_options_that_an_adapter_contradicts(fails, adapter, peft_file):
    some = [f"--model_name_or_path={adapter}", "--use_peft"]
    assert f"lora_r=8: the adapter '{adapter}' has r=4, and keeps it; leave the option out" in fails(
        *some, "--lora_r=8"
    )
    again = [*some, "--overwrite_output_dir"]
    assert "has use_dora=False, and keeps it" in fails(*again, "--use_dora")
    assert "is an adapter with its own configuration" in fails(*again, f"--peft_config={peft_file(peft_type='IA3')}")


def test_adapters_of_others(fails, train, pretrained, tmp_path):
    """One for SEQ_CLS over a base that needs a new head, without a tokenizer; and one that has no head."""
    base = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=1)
    adapted = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        adapted.base_model.model.score.weight.fill_(0.25)
    adapted.save_pretrained(tmp_path / "theirs")
    own = ["--lora_r=2", "--lora_target_modules=q_proj"]  # which may be said again
    _, folder = train("more", f"--model_name_or_path={tmp_path / 'theirs'}", "--use_peft", *own)
    head = next(v for k, v in load_file(folder / "adapter_model.safetensors").items() if "score" in k)
    torch.testing.assert_close(head, torch.full_like(head, 0.25), atol=1e-3, rtol=0)

    causal = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=1)
    get_peft_model(causal, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "causal")
    assert "is an adapter without a reward head" in fails(f"--model_name_or_path={tmp_path / 'causal'}", "--use_peft")


# ---------------------------------------------------------------------------------------------- other methods

METHODS = {
    "ia3": dict(peft_type="IA3"),
    "loha": dict(peft_type="LOHA", r=4, target_modules=["q_proj", "v_proj"]),
    "vera": dict(peft_type="VERA", r=8, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_method_is_trained_saved_and_continued(train, pretrained, peft_file, method):
    file = peft_file(**METHODS[method])
    options = ["--use_peft", "--learning_rate=1e-2", "--layout=shared_prefix"]  # which must be proved
    _, folder = train("out", f"--model_name_or_path={pretrained}", f"--peft_config={file}", *options)
    saved = adapter_config(folder)
    assert saved["peft_type"] == METHODS[method]["peft_type"] and saved["task_type"] == "SEQ_CLS"
    assert "proved" in json.loads((folder / "results.json").read_text())["layout"]
    _, merged = train("merged", f"--model_name_or_path={folder}", "--use_peft", "--merge_adapter")
    assert adapter_config(merged / "adapter")["peft_type"] == METHODS[method]["peft_type"]
    assert lines(merged)[0] < lines(folder)[0]


@pytest.mark.parametrize("method", ["ia3", "vera"])
def test_another_method_resumes_to_the_same_bits(train, pretrained, peft_file, method):
    file = peft_file(**METHODS[method])
    options = [f"--model_name_or_path={pretrained}", "--use_peft", f"--peft_config={file}", "--save_steps=2"]
    _, whole = train("whole", *options, "--learning_rate=1e-2")
    checkpoint = f"--resume_from_checkpoint={whole / 'checkpoints' / 'step-2'}"
    _, parts = train("parts", *options, "--learning_rate=1e-2", checkpoint)
    assert_same_bits(whole, parts, also_kept=False)
    stored = load_file(whole / "checkpoints" / "step-2" / "model.safetensors")
    assert all("score" in name or method in name or "vera" in name for name in stored)  # the trained ones
    moved = Path(shutil.copy(file, Path(file).with_stem("moved")))  # the same content may lie elsewhere
    train("moved", *options, "--learning_rate=1e-2", checkpoint, f"--peft_config={moved}")
    moved.write_text(moved.read_text() + "\n")
    with pytest.raises(InputError, match="the content of peft_config has changed"):
        train("other", *options, "--learning_rate=1e-2", checkpoint, f"--peft_config={moved}")


def test_another_method_on_two_processes(zygote, fsdp_zygote, pretrained, peft_file, tmp_path):
    """DDP and FSDP2, and from a checkpoint of FSDP2 on one process: as one process all along."""
    options = ["dataset_name=toy", *SMALL, f"--model_name_or_path={pretrained}", "--use_peft", "--save_steps=2"]
    options += [f"--peft_config={peft_file(**METHODS['ia3'])}"]
    zygote.run(1, [*options, "--output_dir=one"], tmp_path)
    zygote.run(2, [*options, "--output_dir=ddp"], tmp_path)
    fsdp_zygote.run(2, [*options, "--output_dir=fsdp"], tmp_path)
    zygote.run(1, [*options, "--output_dir=on", "--resume_from_checkpoint=fsdp/checkpoints/step-2"], tmp_path)
    for name in ("ddp", "fsdp", "on"):
        assert lines(tmp_path / "one") == pytest.approx(lines(tmp_path / name), abs=1e-5)
        a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", name))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=0)


def test_what_pefts_own_file_says(peft_file, pretrained, tmp_path):
    """adapter_config.json as PEFT writes it; base, task and mode in it do not count."""
    LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path="other").save_pretrained(tmp_path)
    config = read_peft_config(str(tmp_path / "adapter_config.json"))
    assert config.r == 3 and config.base_model_name_or_path is None
    model = add_adapter(load_classifier(pretrained, load_tokenizer(pretrained), seed=0), config)
    assert model.peft_config["default"].task_type == TaskType.SEQ_CLS
    assert PeftConfig.from_pretrained(tmp_path).r == 3


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(r=3), "expected `key: value` lines, among them peft_type"),
        (dict(peft_type="LORRA"), "peft_type is unknown to this PEFT; there are ADALORA"),
        (
            dict(peft_type="IA3", feedforwardmodules=[]),
            "IA3 has no key 'feedforwardmodules'; did you mean feed",
        ),
        (
            dict(peft_type="lora", r=3, target_module="x"),
            "LORA has no key 'target_module'; did you mean target",
        ),
        (
            dict(peft_type="PROMPT_TUNING", num_virtual_tokens=2),
            "peft_type PROMPT_TUNING adds tokens or calls",
        ),
        (
            dict(peft_type="PREFIX_TUNING", num_virtual_tokens=2),
            "peft_type PREFIX_TUNING adds tokens or calls",
        ),
        (dict(peft_type="lora", lora_dropout="1e-2"), "lora_dropout=1e-2 is text in YAML; write it with a point"),
        (dict(peft_type="ADALORA", total_step=9), "peft_type ADALORA adds tokens or calls"),
    ],
)
def test_wrong_files(peft_file, values, message):
    for name in ("peft.yaml", "peft.json"):
        file = peft_file(name, **values)
        with pytest.raises(InputError) as error:
            read_peft_config(file)
        assert f"peft_config={file}: {message}" in str(error.value) and "\n" not in str(error.value)


def test_a_method_that_does_not_fit_the_model(fails, pretrained, peft_file):
    some = [f"--model_name_or_path={pretrained}", "--use_peft"]
    assert "peft_config=" in fails(*some, f"--peft_config={peft_file(peft_type='IA3', target_modules=['nope'])}")
    again = [*some, "--overwrite_output_dir"]
    assert "cannot be read" in fails(*again, "--peft_config=none.yaml")
    assert "peft_config is given too" in fails(*again, "--peft_config=x.yaml", "--lora_r=4")
    assert "does nothing while use_peft is false" in fails("--peft_config=x.yaml")


def test_a_run_does_not_replace_the_model_it_begins_with(train, fails, pretrained, tmp_path):
    """Saving removes what lies in the folder, and an adapter would have lost its base."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(pretrained, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    some = ["--use_peft", "--max_steps=1", "--max_train_samples=16", "--max_eval_samples=4"]
    train("adapter", f"--model_name_or_path={base}", *some)
    for model, folder in ((base, base), (adapter, adapter), (adapter, base)):
        message = fails(*some, f"--model_name_or_path={model}", f"--output_dir={folder}", "--overwrite_output_dir")
        assert f"output_dir={folder} would replace '{folder}', which the run begins with; choose another" in message
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}


@pytest.mark.parametrize("option", ["lora_target_modules", "lora_target_parameters"])
def test_a_target_that_the_model_has_not(fails, pretrained, option):
    """PEFT adapts the others and says nothing, or not in our log."""
    known = "q_proj" if option == "lora_target_modules" else "q_proj.weight"
    message = fails("--use_peft", f"--model_name_or_path={pretrained}", f"--{option}={[known, 'nope']}")
    assert message == f"{option}={sorted([known, 'nope'])}: LlamaForSequenceClassification has no 'nope'"
