"""The best evaluation and early stopping."""

import math
import shutil

import pytest
import torch
from examples import GOOD
from runs import SMALL, record, reset_accelerate, summary, weights
from safetensors.torch import load_file

import rm.evaluate.__main__
from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.train.state import BestEvaluation


@pytest.fixture
def best_by(data_of):
    """best_by(metric, **options) → a `BestEvaluation` of evaluations on two pairs."""
    given, data = {"metric_for_best_model": "eval/accuracy", "eval_steps": 1}, data_of([GOOD, GOOD])
    return lambda **options: BestEvaluation(RewardConfig(**given | options), data)


@pytest.fixture
def feed(best_by):
    """feed(values, metric) → (`BestEvaluation`, whether each value was the best so far)."""

    def run(values, metric="eval/accuracy", **options):
        best = best_by(metric_for_best_model=metric, **options)
        return best, [best.update(i, {metric: value}) for i, value in enumerate(values, 1)]

    return run


def test_direction_and_ties(feed):
    assert feed([0.5, 0.6, 0.6, 0.4])[1] == [True, True, False, False]
    assert feed([0.5, 0.6, 0.4, 0.4], "eval/loss")[1] == [True, False, True, False]
    assert feed([0.5, 0.6], "eval/loss", greater_is_better=True)[1] == [True, True]
    assert feed([0.5, 0.4], "eval/margin", greater_is_better=False)[1] == [True, True]


def test_nan_is_never_the_best(feed):
    best, updates = feed([math.nan, 0.1, math.nan, 0.2], "eval/loss")
    assert updates == [False, True, False, False] and best.step == 2
    assert best.evaluations_waited == 2


def test_patience_and_threshold(feed):
    best, _ = feed([0.5, 0.6, 0.6], early_stopping_patience=2)
    assert not best.patience_is_over
    best.update(4, {"eval/accuracy": 0.55})
    assert best.patience_is_over and best.step == 2
    best, updates = feed([0.50, 0.52, 0.54, 0.55], early_stopping_patience=2, early_stopping_threshold=0.03)
    assert updates == [True] * 4 and best.step == 4  # better, but not by enough to go on for
    assert best.patience_is_over
    assert not feed([0.5, 0.4, 0.3, 0.2])[0].patience_is_over


def test_state(feed, best_by):
    best, _ = feed([0.5, 0.6, 0.4], early_stopping_patience=2)
    other = best_by(early_stopping_patience=2)
    vars(other).update(best.state_dict())
    for one in (best, other):
        assert not one.update(4, {"eval/accuracy": 0.6}) and one.patience_is_over and one.step == 2


def test_without_a_metric(best_by):
    """No evaluation is the best one, but the highest accuracy is shown."""
    best = best_by(metric_for_best_model=None)
    assert not any(best.update(step, {"eval/accuracy": value}) for step, value in ((1, 0.5), (2, 0.7), (3, 0.6)))
    assert best.summary == ["eval/accuracy", 0.7, 2] and best.step is None and not best.patience_is_over


def test_what_has_no_direction_needs_one(best_by):
    for metric in ("eval/temperature", "eval/reward_std"):
        with pytest.raises(InputError, match=f"metric_for_best_model={metric} has no direction; set greater_is_better"):
            best_by(metric_for_best_model=metric)
    with pytest.raises(InputError, match="metric_for_best_model=eval/nope: no such metric; the nearest: "):
        best_by(metric_for_best_model="eval/nope")
    assert best_by(metric_for_best_model="eval/reward_std", greater_is_better=False).update(1, {"eval/reward_std": 2.0})
    assert best_by().greater_is_better and best_by(metric_for_best_model="eval/margin_q05").greater_is_better
    for name in ("loss", "brier", "ece", "ties"):
        assert not best_by(metric_for_best_model=f"eval/{name}").greater_is_better


# ---------------------------------------------------------------- whole runs

# the loss rises in the end, since the learning rate does
RUN = ["dataset_name=toy", *SMALL, "--max_steps=12", "--eval_steps=2", "--logging_steps=5"]
RUN += ["--lr_scheduler_type=constant_with_warmup", "--warmup_steps=12", "--learning_rate=0.1"]
BEST = ["--load_best_model_at_end", "--save_total_limit=1"]
PATIENT = [*BEST, "--early_stopping_patience=2"]


@pytest.fixture(scope="module")
def runs(zygote, tmp_path_factory):
    """Folders of a run that saves its last weights, of one that saves the best, and of one that stops early."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {"last": [], "best": BEST, "early": PATIENT}.items():
        zygote.run(1, [*RUN, *options, f"--output_dir={name}"], folder)
    return folder


def evaluations(folder):
    return {row["step"]: row["eval/loss"] for row in record(folder) if "eval/loss" in row}


def test_the_best_weights_are_saved(runs):
    losses = evaluations(runs / "best")
    best = min(losses, key=losses.get)
    assert losses == evaluations(runs / "last") and list(losses) == [2, 4, 6, 8, 10, 12]
    assert best < 8 and losses[12] > losses[best] + 0.05  # the run does get worse
    end = summary(runs / "best")
    assert end["train/best_step"] == best and end["train/steps"] == 12 and end["eval/loss"] == losses[best]
    kept = load_file(runs / "best" / "checkpoints" / f"step-{best}" / "model.safetensors")
    saved = weights(runs / "best")
    assert all(torch.equal(kept[f"classifier.{name}"], tensor) for name, tensor in saved.items())
    assert not torch.equal(saved["score.weight"], weights(runs / "last")["score.weight"])


def test_what_was_saved_has_the_metrics_of_the_summary(runs, capsys):
    reset_accelerate()
    metrics = rm.evaluate.__main__.main([f"--model={runs / 'best'}"])
    assert metrics["eval/loss"] == pytest.approx(summary(runs / "best")["eval/loss"], abs=1e-6)


def test_it_stops_early(runs):
    losses = evaluations(runs / "early")
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(2, best + 5, 2)) and best + 4 < 12  # each evaluation once
    assert losses.items() <= evaluations(runs / "best").items()
    end = summary(runs / "early")
    assert end["train/steps"] == best + 4 and end["train/best_step"] == best and end["eval/loss"] == losses[best]
    steps = [row["step"] for row in record(runs / "early") if "train/loss" in row]
    assert steps[-1] == best + 4  # no step is missing in the means
    assert torch.equal(weights(runs / "early")["score.weight"], weights(runs / "best")["score.weight"])


@pytest.mark.parametrize("at", ["best", "after", "end"])
def test_it_resumes(runs, zygote, tmp_path, at):
    """From the best checkpoint, from one that waits, and from the one at which it stopped."""
    options = [*RUN, *PATIENT, "--save_steps=2", "--save_total_limit=none"]
    zygote.run(1, [*options, "--output_dir=run"], tmp_path)
    best = summary(tmp_path / "run")["train/best_step"]
    before = record(tmp_path / "run"), summary(tmp_path / "run"), weights(tmp_path / "run")
    assert before[0] == record(runs / "early")
    step = best + {"best": 0, "after": 2, "end": 4}[at]
    (tmp_path / "run" / "results.json").unlink()
    for later in [step + 2, step + 4]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later}", ignore_errors=True)
    zygote.run(1, [*options, "--output_dir=run", "--resume_from_checkpoint=latest"], tmp_path)
    assert (record(tmp_path / "run"), summary(tmp_path / "run")) == before[:2]
    assert all(torch.equal(before[2][name], tensor) for name, tensor in weights(tmp_path / "run").items())
    (tmp_path / "run" / "results.json").unlink()
    again = ["--output_dir=run", "--resume_from_checkpoint=latest", "--eval_steps=4"]
    done = zygote.start([*options, *again], tmp_path)
    assert done.wait() == 2 and "eval_steps: 2 -> 4" in done.stderr  # it decides when the run ends


def test_two_processes_agree(zygote, runs, tmp_path, pretrained):
    options = [*RUN, *PATIENT, f"--model_name_or_path={pretrained}", "--use_peft", "--lora_dropout=0"]
    for count in (1, 2):
        zygote.run(count, [*options, f"--output_dir={count}"], tmp_path)
    one, two = (summary(tmp_path / name) for name in "12")
    assert one["train/best_step"] == two["train/best_step"] < one["train/steps"]
    assert one["eval/loss"] == pytest.approx(two["eval/loss"], abs=1e-5)


def test_fsdp2(fsdp_zygote, runs, tmp_path):
    fsdp_zygote.run(2, [*RUN, *PATIENT, "--output_dir=fsdp"], tmp_path)
    fsdp, one = summary(tmp_path / "fsdp"), summary(runs / "early")
    assert fsdp["train/best_step"] == one["train/best_step"] and fsdp["train/steps"] == one["train/steps"]
    for name, tensor in weights(tmp_path / "fsdp").items():
        torch.testing.assert_close(tensor, weights(runs / "early")[name], atol=1e-4, rtol=0)


def test_a_damaged_best_checkpoint_loses_nothing(zygote, runs, tmp_path):
    spoil = "import rm.train.checkpoint as module\nmodule.damage = lambda folder, needed: 'it is gone'"
    done = zygote.run(1, [*RUN, *BEST, "--output_dir=run"], tmp_path, fault=spoil)
    assert "damaged (it is gone): the last weights are saved instead" in done.stderr
    assert evaluations(tmp_path / "run") == evaluations(runs / "last")
    assert torch.equal(weights(tmp_path / "run")["score.weight"], weights(runs / "last")["score.weight"])
    assert summary(tmp_path / "run")["eval/loss"] == summary(runs / "last")["eval/loss"]


def test_fractions_of_all_steps_and_the_start(zygote, runs, tmp_path):
    every = ["--eval_steps=0.25", "--save_steps=0.5", "--logging_steps=0.34", "--eval_on_start", "--full_determinism"]
    zygote.run(1, [*RUN, *every, "--save_total_limit=none", "--output_dir=run"], tmp_path)
    rows = record(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6, 9, 12]
    assert [row["step"] for row in rows if "train/loss" in row] == [5, 10, 12]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-12", "step-6"]
    torch.testing.assert_close(weights(tmp_path / "run"), weights(runs / "last"))  # none of it changes the training
