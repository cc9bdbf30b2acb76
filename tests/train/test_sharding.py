"""FSDP2 with its real state: types, shares of gradients, loading by one process, checkpoints, the final model."""

import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from runs import KILL_AT, ROOT, SMALL, assert_same_bits, assert_same_run, lines, weights
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm.config import files

RUN = ["dataset_name=toy", *SMALL, "--micro_batch_tokens=300", "--save_steps=2", "--eval_steps=2"]
LATEST = "--resume_from_checkpoint=latest"
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0"]

# the types of rewards, loss and gradients, and of what is summed over processes
TYPES = """
import sys, torch, train_rm
from accelerate import Accelerator
seen = {}
def note(name, tensor):
    seen.setdefault(name, set()).add(str(tensor.dtype).removeprefix("torch."))
forward, loss, clip = train_rm.concatenated_forward, train_rm.pairwise_loss, Accelerator.clip_grad_norm_
scatter = torch.distributed.reduce_scatter_tensor
def noted_forward(model, batch):
    outputs = forward(model, batch)
    note("rewards", outputs[0])
    return outputs
def noted_loss(*args, **kwargs):
    values = loss(*args, **kwargs)
    note("loss", values)
    return values
def noted_scatter(output, input, *args, **kwargs):
    note("reduced", input)
    return scatter(output, input, *args, **kwargs)
def noted_clip(self, parameters, max_norm):
    parameters = list(parameters)
    for p in parameters:
        if p.grad is not None:
            note("gradients", p.grad)
    print({name: sorted(found) for name, found in seen.items()}, file=sys.stderr)
    return clip(self, parameters, max_norm)
train_rm.concatenated_forward, train_rm.pairwise_loss = noted_forward, noted_loss
torch.distributed.reduce_scatter_tensor, Accelerator.clip_grad_norm_ = noted_scatter, noted_clip
"""
HIDDEN = """
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
layer = LlamaDecoderLayer.forward
def noted_layer(self, hidden, **kwargs):
    note("hidden", hidden)
    return layer(self, hidden, **kwargs)
LlamaDecoderLayer.forward = noted_layer
"""


@pytest.mark.parametrize(
    "engine, options, gradients, hidden",
    [
        ("ddp", ["--mixed_precision=bf16"], ["float32"], ["float32"]),  # the residual stream of autocast
        ("fsdp2", ["--mixed_precision=bf16"], ["float32"], ["bfloat16"]),
        (
            "fsdp2",
            ["--dtype=bfloat16"],
            ["bfloat16", "float32"],
            ["bfloat16"],
        ),  # float32: the head
    ],
    ids=["ddp", "fsdp2", "fsdp2-bf16-weights"],
)
def test_types(zygote, fsdp_zygote, tmp_path, engine, options, gradients, hidden):
    """Rewards, loss and reductions are float32; under FSDP2 hidden states are bf16."""
    given = [*RUN, *options, "--max_steps=1", "--save_steps=0", "--output_dir=out"]
    done = (zygote if engine == "ddp" else fsdp_zygote).run(2, given, tmp_path, fault=TYPES + HIDDEN)
    found = eval(re.findall(r"^\{.*\}$", done.stderr, re.M)[0])
    assert found.pop("reduced", ["float32"]) == ["float32"]
    assert found == {"rewards": ["float32"], "loss": ["float32"], "gradients": gradients, "hidden": hidden}


# after every backward pass, each process has at most its share of each gradient, rounded up
SHARES = """
import sys
from accelerate import Accelerator
backward, passes = Accelerator.backward, []
def checked(self, loss):
    backward(self, loss)
    passes.append(1)
    for p in self._models[0].parameters():
        assert p.grad.to_local().numel() * 2 <= p.numel() + p[:1].numel(), "more than a share"
    print(f"{len(passes)} backward passes", file=sys.stderr)
def no_sync(self, model):
    raise RuntimeError("without synchronization, each process holds the gradients of all weights")
Accelerator.backward, Accelerator.no_sync = checked, no_sync
"""


def test_no_process_holds_a_full_gradient(fsdp_zygote, tmp_path):
    given = [*RUN, "--max_steps=1", "--save_steps=0", "--micro_batch_tokens=100", "--output_dir=out"]
    done = fsdp_zygote.run(2, given, tmp_path, fault=SHARES)
    assert "4 backward passes" in done.stderr  # several micro-batches in one step


@pytest.mark.parametrize("lora", [[], LORA], ids=["all", "lora"])
def test_one_process_reads_the_weights(fsdp_zygote, tiny_model_folder, tmp_path, lora):
    """With a new head, resized embeddings and an adapter: the same bits as if every process had read them."""
    model = tiny_model_folder("llama", None)  # no pad token: the embeddings grow by one
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"chosen": f"w{i % 50 + 3} w7 w9", "rejected": f"w{i % 50 + 3} w8"}) for i in range(60))
    )
    given = [
        *SMALL,
        "--dataset_name=rows.jsonl",
        f"--model_name_or_path={model}",
        "--eval_fraction=0.2",
        *lora,
    ]
    given += ["--max_train_samples=none", "--max_eval_samples=none", "--max_steps=3"]
    for name in ("false", "true"):
        env = {"FSDP_CPU_RAM_EFFICIENT_LOADING": name}
        fsdp_zygote.run(2, [*given, f"--output_dir={name}"], tmp_path, fault=META if name == "true" else "", **env)
    assert_same_bits(tmp_path / "false", tmp_path / "true")
    assert (tmp_path / "meta").exists()


META = """
import train_rm, os
shard = train_rm.shard_model
def checked(model, accelerator):
    if os.environ["RANK"] == "1":
        devices = [p.device.type for name, p in model.named_parameters() if "lora" not in name and "score" not in name]
        assert set(devices) == {"meta"}, devices
        open("meta", "w").close()
    shard(model, accelerator)
train_rm.shard_model = checked
"""


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def whole(fsdp_zygote, tmp_path_factory):
    """A run of four steps on two processes, with checkpoints after steps 2 and 4."""
    cwd = tmp_path_factory.mktemp("whole")
    fsdp_zygote.run(2, [*RUN, "--output_dir=run"], cwd)
    return cwd / "run"


def test_a_checkpoint_has_a_file_of_each_process(whole):
    folder = whole / "checkpoints" / "step-2"
    shards = [f"shards/shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest) == ["optimizer.json", *shards, "state.json"]
    assert all(manifest[name] == files.digest(folder / name) for name in manifest)
    sizes = [manifest[name]["size"] for name in shards]
    assert 0.8 < sizes[0] / sizes[1] < 1.25  # nothing is gathered
    parts = [load_file(folder / name) for name in shards]
    for name in (f"classifier.model.norm.weight{moment}" for moment in ("", "/exp_avg", "/exp_avg_sq")):
        assert [part[name].shape for part in parts] == [(16,), (16,)]


@pytest.mark.parametrize("count, engine", [(2, "fsdp"), (3, "fsdp"), (1, "one"), (2, "ddp")])
def test_it_resumes_on_any_number_of_processes(whole, zygote, fsdp_zygote, tmp_path, count, engine):
    shutil.copytree(whole, tmp_path / "run")
    given = [*RUN, "--output_dir=run", "--resume_from_checkpoint=run/checkpoints/step-2"]
    (fsdp_zygote if engine == "fsdp" else zygote).run(count, given, tmp_path)
    if (count, engine) == (2, "fsdp"):
        assert_same_bits(whole, tmp_path / "run", also_kept=False)
    assert_same_run(whole, tmp_path / "run")


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip_bit, os.remove, lambda path: os.truncate(path, 99)], ids=["bit", "gone", "cut"])
def test_a_damaged_shard_is_found(whole, fsdp_zygote, tmp_path, harm):
    shutil.copytree(whole / "checkpoints" / "step-2", tmp_path / "step-2")
    assert files.damage(tmp_path / "step-2", "state.json") is None
    harm(tmp_path / "step-2" / "shards" / "shard-00002-model-00001-of-00001.safetensors")
    assert "shards/shard-00002-model-00001-of-00001.safetensors" in files.damage(tmp_path / "step-2", "state.json")


FULL = """
import os, resource
from rm.train import checkpoint
save, calls = checkpoint.save_shards, []
def full(*args):
    calls.append(1)
    limit = 20_000 if len(calls) == 2 and os.environ["RANK"] == "1" else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        return save(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoint.save_shards = full
"""


def test_a_disk_that_is_full_for_one_process(whole, fsdp_zygote, tmp_path):
    runs = fsdp_zygote.start_many(2, [*RUN, "--output_dir=run"], tmp_path, fault=FULL)
    assert [run.wait() for run in runs] == [1, 1]
    message = runs[0].stderr.strip().splitlines()[-1]
    assert message.startswith("error: run/checkpoints/step-4 cannot be written (") and "File too large" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    fsdp_zygote.run(2, [*RUN, "--output_dir=run", LATEST], tmp_path)
    assert_same_bits(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_while_a_checkpoint_in_shards_is_written(whole, fsdp_zygote, tmp_path, rank):
    """Four operations on files of one process, drawn from a printed seed; KILL_SEED=all tries every one."""
    fsdp_zygote.run(2, [*RUN, "--output_dir=run"], tmp_path, fault=KILL_AT.format(n=0, rank=rank, step=4))
    moments = range(1, max(int(path.read_text()) for path in tmp_path.glob(f"saved-{rank}-*")) + 1)
    seed = os.environ.get("KILL_SEED", str(random.randrange(10**6)))
    print(f"KILL_SEED={seed}, {len(moments)} operations")
    for n in moments if seed == "all" else random.Random(int(seed)).sample(moments, min(4, len(moments))):
        fault = KILL_AT.format(n=n, rank=rank, step=4)
        runs = fsdp_zygote.start_many(2, [*RUN, "--output_dir=run", "--overwrite_output_dir"], tmp_path, fault=fault)
        assert runs[rank].wait() == -9
        os.kill(runs[1 - rank].pid, 9)  # as torchrun does
        runs[1 - rank].wait()
        fsdp_zygote.run(2, [*RUN, "--output_dir=run", LATEST], tmp_path)
        assert_same_bits(whole, tmp_path / "run", also_kept=False)
        assert files.damage(tmp_path / "run" / "checkpoints" / "step-4", "state.json") is None


# ---------------------------------------------------------------------------------------------- the final model


def test_the_model_is_written_in_parts(whole, fsdp_zygote, tmp_path):
    """transformers reads them as one model; the parts are limited in size."""
    small = "import rm.train.sharding as sharding\nsharding.PART_BYTES = 40_000"
    fsdp_zygote.run(2, [*RUN, "--output_dir=run"], tmp_path, fault=small)
    names = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert (
        names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)] and len(names) > 1
    )
    index = json.loads((tmp_path / "run" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in names:
        with safe_open(tmp_path / "run" / name, "pt") as part:
            assert {key for key, file in index.items() if file == name} == set(part.keys())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights(whole)[name]), name
    check = json.loads((tmp_path / "run" / "finished.json").read_text())["export_check"]
    assert check["passed"] and check["sequences"] == 16
    np.testing.assert_array_equal(lines(whole), lines(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------- memory

PEAKS = """
import os, sys, train_rm
from rm.train import sharding
sharding.FILE_BYTES = 10e6  # of some hundred MB of a process
def peak(name):
    status = dict(line.split(":") for line in open("/proc/self/status"))
    size = status["VmRSS" if name == "imports" else "VmHWM"]
    print(f"{name} {int(size.split()[0]) * 1024}", file=sys.stderr, flush=True)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
load, shard = train_rm.load_reward_model, train_rm.shard_model
def before_the_model(*given):
    import torch.distributed.checkpoint, transformers.models.llama.modeling_llama
    peak("imports")
    return load(*given)
def measured(model, accelerator):
    shard(model, accelerator)
    peak("loading")
    with open("weights", "w") as file:
        file.write(str(sum(p.numel() for p in model.parameters())))
def stop(*_):
    peak("training")
    os._exit(0)
train_rm.load_reward_model, train_rm.shard_model, train_rm.finish_run = before_the_model, measured, stop
"""


@pytest.mark.slow
def test_memory_of_four_processes(tmp_path, monkeypatch):
    """A process needs its share, two groups and 10%; the one that reads the model also the model.

    glibc gives freed memory back at once: otherwise the peak would be that of its heap.
    """
    from zygote import Zygote

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    zygote = Zygote("fsdp_on_cpu")
    size = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, num_labels=1)
    config = AutoConfig.from_pretrained(ROOT / "configs" / "tiny_llama", num_key_value_heads=16, head_dim=64, **size)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    for path in (ROOT / "configs" / "tiny_llama").glob("*"):
        if path.name != "config.json":
            shutil.copy(path, tmp_path / "model")
    given = [*RUN, f"--model_name_or_path={tmp_path / 'model'}", "--gradient_checkpointing", "--micro_batch_tokens=512"]
    given += ["--max_train_samples=24", "--max_eval_samples=4", "--train_batch_size=4", "--eval_steps=0"]
    given += ["--max_steps=3", "--save_steps=2", "--mixed_precision=bf16", "--output_dir=out", "--num_print_samples=0"]
    for part in ("first", "resumed"):
        env = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        runs = zygote.start_many(4, [*given, LATEST], tmp_path, fault=PEAKS, **env)
        assert [run.wait(600) for run in runs] == [0] * 4, runs[0].stderr[-3000:]
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-3")
        count = int((tmp_path / "weights").read_text())
        share, groups = 16 * count / 4, 2 * 4 * count / 24  # weights, gradients, two moments; two of 24 layers
        for rank, run in enumerate(runs):
            peaks = {name: int(value) for name, value in re.findall(r"^([a-z]+) (\d+)$", run.stderr, re.M)}
            used = {name: (peaks[name] - peaks["imports"]) / 1e6 for name in ("loading", "training")}
            print(
                part, rank, used, f"share {share / 1e6:.0f}, groups {groups / 1e6:.0f}, model {4 * count / 1e6:.0f} MB"
            )
            bound = 1.1 * (share + groups) / 1e6
            assert used["training"] <= bound and used["loading"] <= bound + (4 * count / 1e6 if rank == 0 else 0)
    zygote.close()
    assert "resumed from out/checkpoints/step-2" in runs[0].stderr
