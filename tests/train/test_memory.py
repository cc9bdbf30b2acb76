"""Out of memory: the step is repeated in smaller micro-batches with the same numbers, or a message says what to do."""

import sys

import numpy as np
import pytest
from accelerate import Accelerator
from runs import SMALL, assert_same_run, lines, merged, reset_accelerate

import train_rm
from rm.model.reward_model import RewardModel
from rm.train.processes import GradientAccumulation
from rm.train.state import Meter

# In the forward pass, or in the backward pass, of every micro-batch of more than `limit` padded tokens
INJECT = """
import os, torch
from rm.model.reward_model import RewardModel

def allocate(gradient=None):
    torch.empty(2**50)  # the allocator itself refuses, with its own message

def inject(limit, where, rank=None):
    forward = RewardModel.forward
    def limited(self, input_ids, **kwargs):
        too_much = input_ids.numel() > limit and self.training and rank in (None, os.environ.get("RANK"))
        if too_much and where == "forward":
            allocate()
        rewards = forward(self, input_ids=input_ids, **kwargs)
        if too_much:
            rewards.register_hook(allocate)
        return rewards
    RewardModel.forward = limited
"""
exec(INJECT)


@pytest.fixture
def limit_memory(monkeypatch):
    monkeypatch.setattr(RewardModel, "forward", RewardModel.forward)  # put back when the test ends
    return inject  # noqa: F821


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_runs_out_of_memory_is_repeated_with_the_same_numbers(train, limit_memory, caplog, where):
    _, whole = train("whole", "--micro_batch_tokens=4096")
    limit_memory(400, where)
    _, repeated = train("repeated", "--micro_batch_tokens=4096", "--auto_find_batch_size")
    assert_same_run(whole, repeated)
    messages = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    repeats = [f"out of memory: step 1 is repeated with micro_batch_tokens={n}" for n in (2048, 1024, 512, 256)]
    assert messages and messages == repeats[: len(messages)]


def test_pairs_of_the_failed_attempt_are_not_counted_twice(train, monkeypatch):
    """The third micro-batch of step 2 fails once, when two are in the meter and in the gradients already."""
    _, whole = train("whole", "--micro_batch_tokens=300")
    calls, attempt = [], GradientAccumulation.attempt
    monkeypatch.setattr(GradientAccumulation, "attempt", lambda *args: (calls.append([]), attempt(*args))[1])
    forward = RewardModel.forward

    def fails_once(self, input_ids, **kwargs):
        if self.training:
            calls[-1].append(input_ids.numel())
            if len(calls) == 2 and len(calls[-1]) == 3:
                allocate()  # noqa: F821
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(RewardModel, "forward", fails_once)
    _, repeated = train("repeated", "--micro_batch_tokens=300", "--auto_find_batch_size")
    assert len(calls) == 5 and len(calls[1]) == 3 < len(calls[2])
    assert_same_run(whole, repeated)
    np.testing.assert_allclose(lines(whole, "train/reward_chosen"), lines(repeated, "train/reward_chosen"), atol=1e-6)


def test_two_processes_repeat_a_step_together(train, zygote, tmp_path):
    """Only the second process runs out; both repeat, and their gradients are averaged after the step."""
    _, one = train("one", "--micro_batch_tokens=4096")
    options = [*SMALL, "--micro_batch_tokens=4096", "--auto_find_batch_size", "--output_dir=two"]
    done = zygote.run(2, options, tmp_path, fault=f"{INJECT}\ninject(300, 'backward', rank='1')")
    assert "out of memory: step 1 is repeated with micro_batch_tokens=2048" in done.stderr
    assert_same_run(one, tmp_path / "two")


def test_messages_when_nothing_helps(tmp_path, monkeypatch, capsys, limit_memory):
    def code(*options: str) -> tuple[int, str]:
        reset_accelerate()
        monkeypatch.setattr(sys, "argv", ["train_rm.py", *merged([*SMALL, *options])])
        return train_rm.run(), capsys.readouterr().err.strip().splitlines()[-1]

    monkeypatch.chdir(tmp_path)
    limit_memory(0, "forward")
    number, message = code("--output_dir=a")
    assert number == 1 and message.startswith("error: out of memory; set a smaller micro_batch_tokens")
    number, message = code("--output_dir=b", "--auto_find_batch_size")
    assert number == 1
    assert message == "error: out of memory in step 1 with its largest prompt alone: lower max_length"


def test_other_errors_pass():
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    accumulation = GradientAccumulation(accelerator, None, None, Meter(accelerator), may_repeat=True)
    with pytest.raises(RuntimeError, match="shape"), accumulation.attempt(0):
        raise RuntimeError("shape mismatch")
    with pytest.raises(ValueError), accumulation.attempt(0):
        raise ValueError("DefaultCPUAllocator: can't allocate memory")
    assert not accumulation.ran_out


def test_engines_that_would_hang_are_rejected(fsdp_zygote, tmp_path):
    run = fsdp_zygote.start([*SMALL, "--auto_find_batch_size", "--output_dir=out"], tmp_path)
    assert run.wait() == 2 and "auto_find_batch_size=True: not supported under FSDP; leave it out" in run.stderr
