"""Optimizers, parameter groups and schedules; on whole runs too."""

import inspect
import json
import math

import pytest
import torch
from conftest import tiny_classifier
from runs import SMALL, lines, weights
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rm.config.errors import InputError
from rm.config.options import Optimizer, Schedule
from rm.model.reward_model import RewardModel, find_head
from rm.train.optimizer import FOLLOW_A_METRIC, OPTIMIZERS, make_optimizer, make_scheduler, parameter_groups


def test_names_are_those_of_transformers():
    assert set(Schedule.__args__) == {kind.value for kind in SchedulerType}
    assert set(Optimizer.__args__) == set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


def test_groups():
    model = RewardModel(tiny_classifier("gpt2"))
    next(model.parameters()).requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, head_learning_rate=1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups]
    assert sorted(name for group, *_ in found for name in group) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )
    assert found[-1] == ({"classifier.score.weight"}, 1e-2, 0.1)
    for group, lr, decay in found[:-1]:
        assert lr == 1e-3 and "classifier.score.weight" not in group
        assert all(("bias" in name or ".ln_" in name) == (decay == 0.0) for name in group)
    assert [g["lr"] for g in parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)] == [1e-3, 1e-3]


def test_the_head_of_an_adapter_has_its_own_rate():
    from peft import LoraConfig, get_peft_model

    model = RewardModel(get_peft_model(tiny_classifier("llama"), LoraConfig(task_type="SEQ_CLS", r=2)))
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0, head_learning_rate=1e-2)
    assert [id(p) for p in groups[-1]["params"]] == [id(find_head(model.bare).weight)]
    assert groups[-1]["lr"] == 1e-2 and groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_decay_acts_on_matrices_alone(optim):
    """A step with a gradient of 0 changes what decays and nothing else."""
    torch.manual_seed(0)
    model = RewardModel(tiny_classifier("gpt2"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.5)
    optimizer = make_optimizer(groups, optim=optim, learning_rate=1e-2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim < 2), name


def test_arguments_reach_the_optimizer():
    group = [{"params": [torch.nn.Parameter(torch.ones(2, 2))]}]
    sgd = make_optimizer(group, optim="sgd", optim_args={"momentum": 0.9, "nesterov": True}, learning_rate=0.5)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9 and sgd.defaults["lr"] == 0.5
    adam = make_optimizer(group, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, optim_args={"amsgrad": True})
    assert adam.defaults["betas"] == (0.8, 0.9) and adam.defaults["eps"] == 1e-6 and adam.defaults["fused"]
    assert adam.defaults["amsgrad"]
    for args, message in [
        ({"momentun": 0.9}, "optim_args: sgd takes no 'momentun' here; it takes momentum, dampening"),
        ({"lr": 0.9}, "sgd takes no 'lr' here"),
        ({"nesterov": True}, "does not suit sgd: Nesterov momentum requires"),
    ]:
        with pytest.raises(InputError, match=message):
            make_optimizer(group, optim="sgd", optim_args=args)


KWARGS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 5},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
    "cosine": {"num_cycles": 0.4},
}


@pytest.mark.parametrize("name", [name for name in Schedule.__args__ if name not in FOLLOW_A_METRIC])
def test_schedules_are_functions_of_the_step(name):
    """As transformers has them, from any step on, and each group in proportion to its own rate."""

    def optimizer():
        return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 1.0)], lr=0.1)

    warmup, kwargs = 0 if name == "constant" else 3, KWARGS.get(name)
    theirs = get_scheduler(name, optimizer(), warmup, 12, dict(kwargs or {}))
    expected = []
    for _ in range(12):
        expected.append(theirs.get_last_lr())
        theirs.optimizer.step()
        theirs.step()
    for start in (0, 5):
        options = dict(total_steps=12, kwargs=kwargs, steps_done=start)
        ours = make_scheduler(name, optimizer(), warmup_steps=warmup, **options)
        for rates in expected[start:]:
            assert [group["lr"] for group in ours.optimizer.param_groups] == rates
            assert rates[1] == pytest.approx(10 * rates[0])
            ours.optimizer.step()
            ours.step()
    ratio = make_scheduler(name, optimizer(), warmup_ratio=warmup / 12, total_steps=12, kwargs=kwargs)
    fraction = make_scheduler(name, optimizer(), warmup_steps=warmup / 12, total_steps=12, kwargs=kwargs)
    assert fraction.get_last_lr() == ratio.get_last_lr()
    assert ratio.get_last_lr() == expected[0]


@pytest.mark.parametrize("name, kwargs", [("linear", {"power": 2}), ("constant", {"x": 1}), ("greedy", {"x": 1})])
def test_arguments_that_a_schedule_does_not_take(name, kwargs):
    with pytest.raises(InputError, match="lr_scheduler_kwargs="):
        make_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=0.1), total_steps=5, kwargs=kwargs)


@pytest.mark.parametrize("greater", [False, True])
def test_plateau_follows_the_direction_of_its_metric(greater):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options = dict(total_steps=9, kwargs={"patience": 0, "factor": 0.5}, greater_is_better=greater)
    scheduler = make_scheduler("reduce_lr_on_plateau", optimizer, **options)
    for value in (0.1, 0.2, 0.3):
        scheduler.step(value)
    assert optimizer.param_groups[0]["lr"] == (1.0 if greater else 0.25)


# ---------------------------------------------------------------- whole runs

GREEDY = json.dumps({"min_lr": 1e-6, "max_lr": 1e-2, "patience": 0, "factor": 0.5})


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name != "adamw_torch_fused"])
def test_every_optimizer_resumes_to_the_same_bits(zygote, tmp_path, optim):
    options = ["dataset_name=toy", *SMALL, f"--optim={optim}", "--learning_rate=1e-2", "--head_learning_rate=5e-2"]
    options += ["--optim_args=momentum=0.9"] if optim in ("sgd", "rmsprop") else []
    options += ["--save_steps=2", "--max_steps=4", "--output_dir=run", "--warmup_steps=2", "--lr_scheduler_type=cosine"]
    zygote.run(1, options, tmp_path)
    whole, rows = weights(tmp_path / "run"), lines(tmp_path / "run", "optim/learning_rate")
    assert rows == pytest.approx([0.0, 5e-3, 1e-2, 5e-3])
    assert lines(tmp_path / "run", "optim/head_learning_rate") == pytest.approx([5 * rate for rate in rows])
    (tmp_path / "run" / "results.json").unlink()
    zygote.run(1, [*options, "--resume_from_checkpoint=run/checkpoints/step-2"], tmp_path)
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    losses = lines(tmp_path / "run")
    assert losses[-1] != losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name, kwargs", [("reduce_lr_on_plateau", '{"patience": 0}'), ("greedy", GREEDY)])
def test_schedules_that_follow_a_metric_resume(zygote, tmp_path, name, kwargs):
    options = ["dataset_name=toy", *SMALL, f"--lr_scheduler_type={name}", f"--lr_scheduler_kwargs={kwargs}"]
    options += ["--max_steps=8", "--eval_steps=1", "--save_steps=4", "--metric_for_best_model=eval/reward_std"]
    options += ["--greater_is_better=false", "--output_dir=run", "--learning_rate=1e-3"]
    zygote.run(1, options, tmp_path)
    rates, whole = lines(tmp_path / "run", "optim/learning_rate"), weights(tmp_path / "run")
    assert len(set(rates[:4])) > 1 and len(set(rates[4:])) > 1  # it has acted before and after
    (tmp_path / "run" / "results.json").unlink()
    zygote.run(1, [*options, "--resume_from_checkpoint=run/checkpoints/step-4"], tmp_path)
    assert lines(tmp_path / "run", "optim/learning_rate") == rates
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path / "run").items())


def test_the_plain_optimizer_is_the_same_as_the_fused_one(train):
    _, plain = train("plain", "--optim=adamw_torch")
    _, fused = train("fused")
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(fused)[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--optim=adamw"], "command line: optim='adamw' does not fit; expected adamw_torch_fused, adamw_torch, ada"),
        (["--optim=sgd", "--adam_beta1=0.8"], "adam_beta1=0.8: does nothing with optim=sgd; see optim_args"),
        (["--optim=sgd", "--optim_args=moment=1"], "optim_args: sgd takes no 'moment' here; it takes momentum"),
        (["--lr_scheduler_type=reduce_lr_on_plateau"], "lr_scheduler_type='reduce_lr_on_plateau': goes by evaluations"),
        (["--lr_scheduler_type=greedy", "--warmup_steps=2"], "warmup_steps=2: lr_scheduler_type=greedy has no warm-up"),
        (["--early_stopping_patience=2"], "early_stopping_patience=2: does nothing while eval_steps is 0"),
        (["--early_stopping_threshold=2"], "early_stopping_threshold=2.0: needs early_stopping_patience"),
        (["--eval_steps=1.5"], "eval_steps=1.5: must be a number of steps, or a fraction of all steps below 1"),
        (["--load_best_model_at_end"], "load_best_model_at_end=True: does nothing while eval_steps is 0"),
    ],
)
def test_options_that_cannot_act(fails, options, message):
    assert fails(*options).startswith(message)


def test_signature_of_every_optimizer_starts_with_the_weights():
    """`make_optimizer` takes the first parameter for them."""
    assert {list(inspect.signature(make).parameters)[0] for make, _ in OPTIMIZERS.values()} == {"params"}


@pytest.mark.parametrize(
    "optim, args",
    [
        ("adamw_torch", {"betas": [0.9]}),
        ("adamw_torch_fused", {"amsgrad": "x"}),
        ("adafactor", {"eps": 1e-30}),
        ("adafactor", {"beta1": "x"}),
        ("sgd", {"differentiable": True}),
    ],
)
def test_an_argument_that_fails_in_the_first_step_only(optim, args):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    with pytest.raises(InputError, match=f"does not suit {optim}: ") as error:
        make_optimizer(groups, optim=optim, optim_args=args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, kwargs", [("reduce_lr_on_plateau", {"patience": "x"}), ("inverse_sqrt", {"timescale": 0})]
)
def test_an_argument_that_fails_at_the_first_evaluation_only(name, kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    with pytest.raises(InputError, match="lr_scheduler_kwargs="):
        make_scheduler(name, optimizer, total_steps=10, kwargs=kwargs)
