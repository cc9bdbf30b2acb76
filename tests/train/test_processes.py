"""One, two and three processes, under DDP and FSDP2, do the same; and what happens when one of them fails."""

import json
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from runs import SMALL, assert_same_run, lines, mixture, program, wait_until
from safetensors.torch import load_file

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.train.processes import check_support

RAGGED = ["dataset_name=toy", *SMALL, "--train_batch_size=17", "--max_train_samples=50", "--eval_steps=2"]  # 17, 17, 16
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0"]
# every process writes down which prompts it computes, with which weight, and in which step
WRITE_PAIRS = """
import json, os, train_rm
forward, collate, seed, step, last = train_rm.concatenated_forward, train_rm.collate, train_rm.seed_everything, [0], []
def remember(data, micro_batch, layout):
    last[:] = [micro_batch.prompts, [float(not micro_batch.is_dummy)] * len(micro_batch.prompts)]
    return collate(data, micro_batch, layout)
def write(model, batch):
    with open(f"pairs-{os.environ.get('RANK', 0)}.jsonl", "a") as file:
        file.write(json.dumps([*last, step[0]]) + "\\n")
    return forward(model, batch)
train_rm.collate = remember
train_rm.concatenated_forward = write
train_rm.seed_everything = lambda s, t, rank: (step.__setitem__(0, t), seed(s, t, rank))
"""


@pytest.fixture(scope="module")
def one(zygote, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    zygote.run(1, [*RAGGED, "--output_dir=out"], folder)
    return folder / "out"


@pytest.mark.parametrize("count, tokens", [(1, 100), (2, 100), (3, 300), (3, 100_000)])
def test_any_number_of_processes_trains_the_same(zygote, one, tmp_path, count, tokens):
    options = [*RAGGED, f"--micro_batch_tokens={tokens}"]
    zygote.run(count, [*options, "--output_dir=out"], tmp_path, fault=WRITE_PAIRS)
    computed = [json.loads(line) for file in tmp_path.glob("pairs-*.jsonl") for line in file.read_text().splitlines()]
    first_epoch = [part for part in computed if part[2] < 3]  # steps
    counted = [i for indices, weights, _ in first_epoch for i, weight in zip(indices, weights, strict=True) if weight]
    assert sorted(counted) == list(range(50))  # each once; pairs of dummy micro-batches weigh nothing
    assert_same_run(one, tmp_path / "out")
    for name in ("eval/accuracy", "eval/ties", "eval/comparisons"):
        assert lines(one, name) == lines(tmp_path / "out", name)
    for name in ("eval/loss", "eval/margin", "eval/reward_std"):
        np.testing.assert_allclose(lines(one, name), lines(tmp_path / "out", name), atol=1e-6)


def test_a_mixture_trains_the_same(zygote, tmp_path):
    """Two formats, weights, and two evaluation sets; the second process reads what the first one wrote."""
    options = [*SMALL, *mixture(tmp_path), "--train_batch_size=17", "--max_steps=7", "--eval_steps=2"]
    for count in (1, 2):
        zygote.run(count, [*options, "--micro_batch_tokens=300", f"--output_dir=out-{count}"], tmp_path)
    assert_same_run(tmp_path / "out-1", tmp_path / "out-2")
    for name in ("eval/plain/loss", "eval/talk/accuracy", "eval/talk/brief/accuracy", "eval/accuracy"):
        assert len(lines(tmp_path / "out-1", name)) == 4
        np.testing.assert_allclose(lines(tmp_path / "out-1", name), lines(tmp_path / "out-2", name), atol=1e-6)
    reports = [json.loads((tmp_path / f"out-{count}/data_report.json").read_text()) for count in (1, 2)]
    assert reports[0] == reports[1] and reports[0]["train"]["drawn"] == 60 + 20


def test_fsdp2_trains_the_same(fsdp_zygote, one, tmp_path):
    options = [*RAGGED, "--output_dir=out", "--micro_batch_tokens=300"]
    done = fsdp_zygote.run(2, options, tmp_path, fault=COUNT_SHARDS + NO_SYNC)
    assert_same_run(one, tmp_path / "out")
    assert "export checked: 16 sequences" in done.stderr and "sharded: 21 of 21" in done.stderr


COUNT_SHARDS = """
import sys, fsdp_on_cpu, train_rm
from torch.distributed.tensor import DTensor
choose = train_rm.choose_layout
def count(name, model, *args):
    weights = list(model.parameters())
    print(f"sharded: {sum(isinstance(w, DTensor) for w in weights)} of {len(weights)}", file=sys.stderr)
    return choose(name, model, *args)
train_rm.choose_layout = count
"""


NO_SYNC = """
from accelerate import Accelerator
def no_sync(self, model):
    raise RuntimeError("without synchronization, each process holds the gradients of all weights")
Accelerator.no_sync = no_sync
"""


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_lora(zygote, fsdp_zygote, pretrained, tmp_path, engine):
    options = [*RAGGED, *LORA, f"--model_name_or_path={pretrained}", "--gradient_checkpointing", "--merge_adapter"]
    zygote.run(1, [*options, "--output_dir=one"], tmp_path)
    (fsdp_zygote if engine == "fsdp2" else zygote).run(2, [*options, "--output_dir=two"], tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")


def test_fsdp2_in_bf16(fsdp_zygote, one, tmp_path):
    """Close to float32, on two processes; the saved model is checked in it."""
    done = fsdp_zygote.run(2, [*RAGGED, "--mixed_precision=bf16", "--output_dir=out"], tmp_path)
    np.testing.assert_allclose(lines(one), lines(tmp_path / "out"), atol=0.05)
    assert "export checked" in done.stderr


# ------------------------------------------------------------------------------ when one fails

FAILS = """
import os, sys, train_rm
def fail(*args, **kwargs):
    open("failed", "w").close()
    raise RuntimeError("as injected")
if os.environ["RANK"] == "{rank}":
    train_rm.{name} = fail
"""


@pytest.mark.slow
def test_one_that_fails_ends_the_job(tmp_path):
    """Under torchrun."""
    program_that_fails = FAILS.format(rank=1, name="pairwise_loss") + "sys.exit(train_rm.run())\n"
    (tmp_path / "run.py").write_text(program_that_fails)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    options = ["--max_steps=1000", "--output_dir=out"]
    done = program(*options, launcher=launcher, cwd=tmp_path, script=tmp_path / "run.py")
    assert done.returncode != 0 and "as injected" in done.stderr
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 30


@pytest.mark.parametrize("rank, name", [(0, "Checkpoints.save"), (1, "Evaluator.__call__")])
def test_one_that_fails_ends_the_others(zygote, tmp_path, rank, name):
    """Whatever the main process or another one does alone."""
    options = [*RAGGED, "--save_steps=2", "--max_steps=1000", "--output_dir=out"]
    runs = zygote.start_many(2, options, tmp_path, fault=FAILS.format(rank=rank, name=name))
    assert all(run.wait(timeout=30) != 0 for run in runs)


def test_a_process_that_is_killed_ends_the_others(zygote, tmp_path):
    runs = zygote.start_many(2, [*RAGGED, "--max_steps=100000", "--output_dir=out"], tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_until(lambda: runs[0].poll() is not None or metrics.exists() and lines(metrics.parent, "step"))
    assert runs[0].poll() is None, runs[0].stderr
    os.kill(runs[1].pid, 9)
    assert runs[0].wait(timeout=30) != 0


@pytest.mark.parametrize("options", [{"fsdp_version": 1}, {"fsdp_version": 2, "activation_checkpointing": True}])
def test_settings_of_fsdp_that_are_not_supported(options):
    plugin = FullyShardedDataParallelPlugin(**options)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        mixed_precision="no",
        device=SimpleNamespace(type="cuda"),
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    with pytest.raises(InputError, match="fsdp_version: 2; gradient_checkpointing=true"):
        check_support(RewardConfig(), accelerator)
    plugin.fsdp_version, plugin.activation_checkpointing = 2, False
    check_support(RewardConfig(), accelerator)
