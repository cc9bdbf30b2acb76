"""Numbers that are not finite and disks that are full, on the real program."""

import json
import os
import random
import shutil

import pytest
from runs import KILL_AT, SMALL, assert_same_bits, lines, record, weights
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rm.config.files import GO_ON

LATEST = "--resume_from_checkpoint=latest"
RUN = ["dataset_name=toy", *SMALL, "--max_steps=8", "--save_steps=2", "--output_dir=out"]


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------ numbers


@pytest.fixture(scope="module")
def poisoned(pretrained, tmp_path_factory):
    """Options for a model to which the word "water" is NaN, and 48 pairs of which one has that word."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(pretrained, folder / "model")
    tensors = load_file(folder / "model" / "model.safetensors")
    (word,) = AutoTokenizer.from_pretrained(pretrained)(" water", add_special_tokens=False)["input_ids"][-1:]
    tensors["model.embed_tokens.weight"][word] = float("nan")
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    words = "be brief tell me how to make tea".split()
    sides = [(f"{words[i % 8]} {words[i // 8]}", words[-i % 7]) for i in range(48)]
    rows = [{"id": f"pair-{i}", "chosen": chosen, "rejected": rejected} for i, (chosen, rejected) in enumerate(sides)]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, rows[:10])))
    rows[7]["chosen"] = "make tea of water"
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [f"--model_name_or_path={folder / 'model'}", f"--dataset_name={folder / 'train.jsonl'}"]
    options += [f"--eval_dataset_name={folder / 'eval.jsonl'}", "--max_train_samples=none", "--max_eval_samples=none"]
    return [*SMALL, *options, "--train_batch_size=16", "--max_steps=6", "--save_steps=1"]  # two epochs of three steps


@pytest.mark.parametrize("count", [1, 2])
def test_a_pair_that_is_not_finite_ends_the_run_by_name(zygote, poisoned, tmp_path, count):
    runs = zygote.start_many(count, [*poisoned, "--output_dir=out"], tmp_path)
    assert [run.wait() for run in runs] == [3] * count
    message = runs[0].stderr.strip().splitlines()[-1]
    step = len(checkpoints(tmp_path / "out")) + 1 if (tmp_path / "out" / "checkpoints").exists() else 1
    assert message == f"error: step {step}: the rewards of 1 prompts are not finite; its prompts: pair-7"
    assert "Traceback" not in runs[0].stderr and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_pair_of_a_mixture_is_named_with_its_data_set(zygote, poisoned, tmp_path):
    (train,) = (option.partition("=")[2] for option in poisoned if option.startswith("--dataset_name="))
    shutil.copy(train, tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").write_text((tmp_path / "other.jsonl").read_text().replace("make tea of water", "tea"))
    names = ["--dataset_name", train, "other.jsonl", "--dataset_weights", "1", "0.5"]
    run = zygote.start([*poisoned, *names, "--output_dir=out"], tmp_path)
    assert run.wait() == 3 and run.stderr.strip().endswith("not finite; its prompts: train/pair-7")


def test_a_step_may_be_left_out_on_every_process(zygote, poisoned, tmp_path):
    """The weights, the means and the number of steps left out are the same however it is run."""
    for count in (1, 2):
        done = zygote.run(count, [*poisoned, "--max_nonfinite_steps=1", f"--output_dir=out{count}"], tmp_path)
        assert done.stderr.count("prompts: pair-7; the step is skipped (1 in a row of 1 allowed)") == 2  # once an epoch
    one, two = tmp_path / "out1", tmp_path / "out2"
    counts = lines(one, "optim/skipped_steps")
    assert counts == lines(two, "optim/skipped_steps") and counts[-1] == 2
    left_out = [after > before for before, after in zip([0, *counts], counts, strict=False)]
    assert [loss == "NaN" for loss in lines(one)] == left_out  # a mean over no pairs
    saved = [load_file(one / f"checkpoints/step-{step}/model.safetensors") for step in range(1, 7)]
    heads = [tensors["classifier.score.weight"] for tensors in saved]
    assert [bool((a == b).all()) for a, b in zip(heads, heads[1:], strict=False)] == left_out[1:]
    for name, tensor in weights(one).items():
        assert tensor.isnan().sum() == (32 if "embed_tokens" in name else 0)  # the poison and no more
        assert (tensor - weights(two)[name]).nan_to_num().abs().max() < 1e-5
    shutil.rmtree(one / "checkpoints" / "step-6")  # the count survives a restart
    (one / "results.json").unlink()
    before = record(one)
    zygote.run(1, [*poisoned, "--max_nonfinite_steps=1", "--output_dir=out1", LATEST], tmp_path)
    assert record(one) == before


INFINITE = """
import train_rm
loss = train_rm.pairwise_loss
train_rm.pairwise_loss = lambda *args, **kwargs: loss(*args, **kwargs) * float("inf")  # the rewards are finite
"""


def test_too_many_steps_in_a_row_also_over_a_restart(zygote, tmp_path, poisoned):
    options = [*poisoned, "--max_nonfinite_steps=3", "--output_dir=out"]
    kill = "import os\nfrom rm.train.checkpoint import Checkpoints\nsave = Checkpoints.save\n"
    kill += "die = lambda step: step == 2 and os.kill(os.getpid(), 9)\n"
    kill += "Checkpoints.save = lambda self: (save(self), die(self.state.step))"
    assert zygote.start(options, tmp_path, fault=INFINITE + kill).wait() == -9
    run = zygote.start([*options, LATEST], tmp_path, fault=INFINITE)
    assert run.wait() == 3 and run.stderr.count("the step is skipped") == 1
    assert "error: step 4: the gradient (norm nan) is not finite; its prompts: pair-" in run.stderr


INFINITE_LOSS = """
import os, train_rm
loss, calls = train_rm.pairwise_loss, []
def infinite_once(*args, **kwargs):
    values = loss(*args, **kwargs)
    calls.append(1)
    if len(calls) == 1 and os.environ.get("RANK", "0") == "{rank}":
        values = values + 1e38 * 10.0  # infinite, and its gradient is not
    return values
train_rm.pairwise_loss = infinite_once
"""


@pytest.mark.parametrize("count, rank", [(1, 0), (2, 0), (2, 1)])
def test_a_loss_that_is_infinite_on_one_process_moves_no_weight(zygote, tmp_path, count, rank):
    fault = INFINITE_LOSS.format(rank=rank)
    options = ["dataset_name=toy", *SMALL, "--max_steps=2", "--save_steps=1", "--output_dir=out"]
    zygote.run(count, [*options, "--max_nonfinite_steps=1"], tmp_path, fault=fault)
    moments = load_file(tmp_path / "out/checkpoints/step-1/optimizer.safetensors")
    assert not moments  # nor the optimizer's count of steps, which corrects its bias
    moments = load_file(tmp_path / "out/checkpoints/step-2/optimizer.safetensors")
    assert {int(value) for name, value in moments.items() if name.endswith("/step")} == {1}
    assert lines(tmp_path / "out", "optim/skipped_steps") == [1, 1]


# ------------------------------------------------------------------------------ disks


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    zygote.run(1, [*RUN, "--eval_steps=3"], cwd)
    return cwd / "out"


# what a full disk does to one who writes: in the n-th call of `name` no file may grow over `size` bytes
FULL = """
import resource, {module} as module
owner, _, name = "module.{name}".rpartition(".")
owner = eval(owner)
function, calls = getattr(owner, name), []
def full(*args, **kwargs):
    calls.append(1)
    if len(calls) == {n}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    try:
        return function(*args, **kwargs)
    finally:  # its message goes to a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
setattr(owner, name, full)
"""


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [1000, 150_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_full_at_a_checkpoint(zygote, tmp_path, size, count):
    fault = FULL.format(module="rm.train.checkpoint", name="Checkpoints.save", n=3, size=size)
    options = [*RUN, "--save_total_limit=1", "--num_print_samples=0"]
    runs = zygote.start_many(count, options, tmp_path, fault=fault)
    assert [run.wait(30) for run in runs] == [1] * count
    message = runs[0].stderr.strip().splitlines()[-1]
    assert message.startswith("error: out/checkpoints/step-6 cannot be written (") and "File too large" in message
    assert message.endswith(GO_ON) and "Traceback" not in runs[0].stderr
    assert checkpoints(tmp_path / "out") == ["step-4"]  # which is removed after the new one is in place, not before
    zygote.run(count, [*options, LATEST], tmp_path)
    zygote.run(count, [*options, "--output_dir=whole"], tmp_path)
    assert record(tmp_path / "out") == record(tmp_path / "whole")


@pytest.mark.parametrize(
    "module, name, n, size, file",
    [
        ("rm.log.trackers", "RunLog.log", 5, 1500, "out/metrics.jsonl cannot be written"),
        ("rm.evaluate.evaluator", "visualize_samples", 1, 500, "out/samples/step-3.jsonl cannot be written"),
        ("rm.train.finish", "save_model", 1, 2000, "the model in out cannot be written"),
        ("rm.train.run_dir", "Run.write_text", 4, 1000, "out/results.json cannot be written"),
        ("rm.train.run_dir", "Run.write_text", 5, 1000, "out/README.md cannot be written"),
    ],
)
def test_a_disk_that_is_full_elsewhere(zygote, whole, tmp_path, module, name, n, size, file):
    options = [*RUN, "--eval_steps=3"]
    run = zygote.start(options, tmp_path, fault=FULL.format(module=module, name=name, n=n, size=size))
    assert run.wait() == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.replace(f"{tmp_path}/", "").startswith(f"error: {file}") and "File too large" in message
    assert message.endswith(GO_ON) and "Traceback" not in run.stderr
    zygote.run(1, [*options, LATEST], tmp_path)
    assert_same_bits(tmp_path / "out", whole)


@pytest.mark.parametrize("folder", ["a-file/out", "/proc/out", "read-only/out"])
def test_a_folder_that_cannot_be_written_is_found_before_the_model(zygote, tmp_path, folder):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "read-only").mkdir(mode=0o555)
    if folder == "read-only/out" and os.geteuid() == 0:
        pytest.skip("to root nothing is read-only")
    run = zygote.start([*RUN, f"--output_dir={folder}", "--model_name_or_path=/no/such/model"], tmp_path)
    assert run.wait() == 2
    assert run.stderr.strip().startswith(f"error: output_dir={folder} cannot be written: ")


@pytest.mark.slow
def test_killed_at_moments_of_writing_a_checkpoint_or_after(zygote, tmp_path):
    """Eight operations on files up to the end of the run, drawn from a printed seed; KILL_SEED=all tries every one."""
    options = [*RUN, "--save_total_limit=1", "--num_print_samples=0"]
    zygote.run(1, [*options, "--output_dir=whole"], tmp_path, fault=KILL_AT.format(n=0, rank=0, step=6))
    operations = int((tmp_path / "saved-0-6").read_text())
    assert operations > 10
    seed = os.environ.get("KILL_SEED", str(random.randrange(10**6)))
    print(f"KILL_SEED={seed}, {operations} operations")
    moments = range(1, 3 * operations)  # those of the next checkpoint and of the end
    for n in moments if seed == "all" else random.Random(int(seed)).sample(moments, 8):
        run = zygote.start([*options, "--overwrite_output_dir"], tmp_path, fault=KILL_AT.format(n=n, rank=0, step=6))
        assert run.wait() == -9
        zygote.run(1, [*options, LATEST], tmp_path)
        assert_same_bits(tmp_path / "out", tmp_path / "whole", also_kept=False)
        assert "step-8" in checkpoints(tmp_path / "out")
