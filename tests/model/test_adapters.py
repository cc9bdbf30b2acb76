"""PEFT: every option of LoRA, other methods, adapters that are continued or merged; whole runs and their exports."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import CAUSAL, COMMON, tiny_tokenizer
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
from runs import SMALL, assert_same_bits, in_copy, lines, reset_accelerate
from safetensors.torch import load_file
from tiny import base, load, options
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import train_rm
from rm.config.errors import InputError
from rm.model.adapters import lora_config, read_peft_config
from rm.model.load import load_saved_classifier

ALL = "--lora_target_modules=all-linear"
METHODS = {
    "ia3": dict(peft_type="IA3"),
    "loha": dict(peft_type="LOHA", r=4, target_modules=["q_proj", "v_proj"]),
    "vera": dict(peft_type="VERA", r=8, target_modules=["q_proj", "v_proj"]),
}


def adapter_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def peft_file(tmp_path):
    def make(name="peft.yaml", **values) -> str:
        text = json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


@pytest.fixture(scope="module")
def adapter(pretrained, tmp_path_factory):
    """The output folder of a LoRA run."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    reset_accelerate()
    given = [f"--model_name_or_path={pretrained}", "--use_peft", "--lora_r=4", "--lora_dropout=0", ALL]
    train_rm.main(["dataset_name=toy", *SMALL, *given, f"--output_dir={folder}", "--learning_rate=1e-2"])
    return folder


# ---------------------------------------------------------------------------------------------- a new one


def test_options_reach_peft():
    given = dict(use_peft=True, lora_r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, use_dora=True)
    lora = lora_config(options("x", **given))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora, lora.use_dora) == (3, 5, 0.1, True, True)
    for targets, meant in (("q_proj", {"q_proj"}), (["q_proj"], {"q_proj"}), (["all-linear"], "all-linear")):
        assert lora_config(options("x", use_peft=True, lora_target_modules=targets)).target_modules == meant
    pattern = r".*\.q_proj"  # of the whole path
    assert lora_config(options("x", use_peft=True, lora_target_modules=pattern)).target_modules == pattern


def test_adapter_and_head_are_trained():
    model = load(base(), use_peft=True, lora_target_modules=["q_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5 and all("lora_" in name or "score" in name for name in trained)


def test_parameters_that_are_not_in_layers(tmp_path):
    extra = dict(num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **(COMMON | CAUSAL["llama"] | extra))
    ).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    names = dict(lora_target_modules=["q_proj"], lora_target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0)
    model = load(tmp_path, use_peft=True, **names)
    assert any("experts" in name and "lora_A" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("option", ["target_modules", "target_parameters", "modules_to_save"])
def test_a_name_that_the_model_does_not_have(option, peft_file):
    known = "q_proj.weight" if option == "target_parameters" else "q_proj"
    message = f"{option}=['nope', '{known}']: LlamaForSequenceClassification has no 'nope'"
    with pytest.raises(InputError) as error:
        load(base(), use_peft=True, **{f"lora_{option}": [known, "nope"]})
    assert str(error.value) == f"lora_{message}"
    file = peft_file(peft_type="LORA", **{option: [known, "nope"]})
    with pytest.raises(InputError) as error:
        load(base(), use_peft=True, peft_config=file)
    assert str(error.value) == f"peft_config={file}: {message}"
    with pytest.raises(InputError, match="lora_target_modules: .* target modules"):
        load(base(), use_peft=True, lora_target_modules=".*nope")


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("more", [["--use_rslora"], ["--use_dora", "--lora_modules_to_save=embed_tokens"]])
def test_lora_is_saved_as_it_was_evaluated(train, pretrained, more, merge):
    """The run itself checks its export, and merges."""
    given = [f"--model_name_or_path={pretrained}", "--use_peft", "--lora_r=4", ALL, *more]
    _, folder = train("out", *given, *(["--merge_adapter"] if merge else []))
    assert len(set(lines(folder))) > 1 and (folder / "model.safetensors").exists() is merge
    saved = adapter_config(folder / "adapter" if merge else folder)
    recorded = json.loads((folder / "results.json").read_text())["adapter"]
    assert recorded["r"] == 4 and recorded["target_modules"] == sorted(saved["target_modules"])
    assert (saved["task_type"], saved["r"]) == ("SEQ_CLS", 4)
    assert (saved["use_rslora"], saved["use_dora"]) == ("--use_rslora" in more, "--use_dora" in more)
    weights = load_file((folder / "adapter" if merge else folder) / "adapter_model.safetensors")
    for part in ("magnitude", "embed_tokens"):
        assert any(part in name for name in weights) == ("--use_dora" in more)


# ---------------------------------------------------------------------------------------------- an existing one


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_adapter_is_continued(train, adapter, pretrained, merge):
    _, folder = train("more", f"--model_name_or_path={adapter}", "--use_peft", *(["--merge_adapter"] if merge else []))
    out = folder / "adapter" if merge else folder
    assert adapter_config(out)["base_model_name_or_path"] == pretrained  # the same base, not the adapter
    assert adapter_config(out)["r"] == 4 and set(adapter_config(out)["modules_to_save"]) == {"classifier", "score"}
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, out))
    assert before.keys() == after.keys()
    head = next(name for name in before if "score" in name)
    assert 0 < (before[head] - after[head]).abs().max() < 0.01  # 4 steps of at most 1e-4
    assert lines(folder)[0] == pytest.approx(lines(adapter)[-1], abs=0.2) and lines(folder)[0] < 0.75
    if merge:
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_without_use_peft_it_is_merged_and_all_weights_are_trained(adapter):
    model = load(adapter)
    assert not hasattr(model.classifier, "peft_config") and all(p.requires_grad for p in model.parameters())
    trained = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1)
    trained.config.pad_token_id = model.config.pad_token_id
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(model.classifier.eval()(ids).logits, trained(ids).logits, atol=1e-5, rtol=1e-5)
    last = load(adapter, trainable=r"layers\.1\.")
    assert {p.requires_grad for name, p in last.named_parameters() if "layers.0." in name} == {False}


def test_an_adapter_keeps_its_configuration(adapter, peft_file):
    for given in ({"lora_r": 8}, {"use_dora": True}, {"peft_config": peft_file(peft_type="IA3")}):
        with pytest.raises(InputError, match=f"{next(iter(given))}: the adapter '{adapter}' keeps its own config"):
            load(adapter, use_peft=True, **given)


def test_adapters_of_others(pretrained, tmp_path):
    """One for SEQ_CLS without a tokenizer; one without a head; one without a base."""

    def model():
        return AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=1)

    adapted = get_peft_model(model(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        adapted.base_model.model.score.weight.fill_(0.25)
    adapted.save_pretrained(tmp_path / "theirs")
    more = load(tmp_path / "theirs", use_peft=True)
    heads = {name: p for name, p in more.named_parameters() if "score" in name and p.requires_grad}
    assert len(heads) == 1 and all((p == 0.25).all() for p in heads.values())

    get_peft_model(model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "causal")
    with pytest.raises(InputError, match="is an adapter without a reward head"):
        load(tmp_path / "causal", use_peft=True)
    with pytest.raises(InputError, match="is an adapter without a reward head"):
        load_saved_classifier(str(tmp_path / "causal"), None, options("x"))
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="needs task_type SEQ_CLS and base_model_name_or_path"):
        load(tmp_path / "theirs", use_peft=True)


def test_a_run_does_not_replace_the_model_it_begins_with(train, fails, pretrained, tmp_path):
    """Saving removes the files in the folder, and an adapter would lose its base."""
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(pretrained, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    given = ["--use_peft", "--max_steps=1", "--max_train_samples=16", "--max_eval_samples=4"]
    train("adapter", f"--model_name_or_path={folder}", *given)
    for model, out in ((folder, folder), (adapter, adapter), (adapter, folder)):
        message = fails(*given, f"--model_name_or_path={model}", f"--output_dir={out}", "--overwrite_output_dir")
        assert f"output_dir={out} would replace '{out}', which the run begins with" in message
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- other methods


@pytest.mark.parametrize("method", METHODS)
def test_any_method_is_trained_resumed_saved_and_continued(train, pretrained, peft_file, method):
    """Resumed to the same bits; checkpoints hold the trained weights alone; the packed layout is verified."""
    file = peft_file(**METHODS[method])
    given = ["--use_peft", "--learning_rate=1e-2", "--layout=shared_prefix", "--save_steps=2"]
    started = [f"--model_name_or_path={pretrained}", f"--peft_config={file}", *given]
    _, whole = train("whole", *started)
    assert (adapter_config(whole)["peft_type"], adapter_config(whole)["task_type"]) == (method.upper(), "SEQ_CLS")
    step = whole / "checkpoints" / "step-2"
    stored = load_file(step / "model.safetensors")
    assert all("score" in name or method in name or "vera" in name or "hada" in name for name in stored)
    moved = shutil.copy(file, file.replace("peft.yaml", "moved.yaml"))  # the same content may be elsewhere
    resumed = [*started, in_copy(whole, "parts", 2), f"--peft_config={moved}"]
    _, parts = train("parts", *resumed)
    assert_same_bits(whole, parts, also_kept=False)
    with open(moved, "a") as text:
        text.write("\n")
    with pytest.raises(InputError, match="the content of peft_config has changed"):
        train("parts", *resumed)
    _, merged = train("merged", f"--model_name_or_path={whole}", *given, "--merge_adapter")
    assert adapter_config(merged / "adapter")["peft_type"] == method.upper()
    assert lines(merged)[0] < lines(whole)[0]


def test_two_processes(zygote, fsdp_zygote, pretrained, peft_file, tmp_path):
    """DDP and FSDP2, and from a checkpoint of FSDP2 on one process: as one process all along."""
    given = ["dataset_name=toy", *SMALL, f"--model_name_or_path={pretrained}", "--use_peft", "--save_steps=2"]
    given += [f"--peft_config={peft_file(**METHODS['ia3'])}"]
    zygote.run(1, [*given, "--output_dir=one"], tmp_path)
    zygote.run(2, [*given, "--output_dir=ddp"], tmp_path)
    fsdp_zygote.run(2, [*given, "--output_dir=fsdp"], tmp_path)
    zygote.run(1, [*given, "--output_dir=on", in_copy(tmp_path / "fsdp", "on", 2)], tmp_path)
    for name in ("ddp", "fsdp", "on"):
        assert lines(tmp_path / "one") == pytest.approx(lines(tmp_path / name), abs=1e-5)
        a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", name))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=0)


def test_the_file_that_peft_writes(tmp_path):
    """Base, task and mode in it have no effect; numbers such as 1e-5 are not text."""
    LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path="other").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = read_peft_config(str(file))
    assert config.r == 3 and config.base_model_name_or_path is None
    model = load(base(), use_peft=True, peft_config=str(file)).classifier
    assert model.peft_config["default"].task_type == TaskType.SEQ_CLS
    file.write_text("peft_type: lora\nlora_dropout: 1e-2\n")
    assert read_peft_config(str(file)).lora_dropout == 0.01


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(r=3), "needs `peft_type: METHOD`; supported methods: BEFT, "),
        (dict(peft_type="LORRA"), "needs `peft_type: METHOD`"),
        (
            dict(peft_type="IA3", feedforwardmodules=[]),
            "TypeError: .* keyword argument 'feedforwardmodules'",
        ),
        (dict(peft_type="PROMPT_TUNING", num_virtual_tokens=2), "needs `peft_type: METHOD`"),
        (dict(peft_type="ADALORA", total_step=9), "needs `peft_type: METHOD`"),
        (dict(peft_type="IA3", target_modules=["q_proj"], feedforward_modules=["v_proj"]), "ValueError: "),
    ],
)
def test_wrong_files(peft_file, values, message):
    for name in ("peft.yaml", "peft.json"):
        file = peft_file(name, **values)
        with pytest.raises(InputError, match=f"peft_config={file}: {message}") as error:
            read_peft_config(file)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="peft_config=none.yaml cannot be read: FileNotFoundError"):
        read_peft_config("none.yaml")
