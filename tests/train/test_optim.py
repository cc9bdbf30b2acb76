"""Optimizers, parameter groups and schedules; on whole runs too."""

import json
import math

import pytest
import torch
from conftest import tiny_classifier
from examples import options
from peft import LoraConfig, get_peft_model
from runs import lines, weights
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rm.config.errors import InputError
from rm.config.options import FOLLOW_EVALUATIONS, Optimizer, Schedule
from rm.model.reward_model import RewardModel, find_head
from rm.train.optimizer import OPTIMIZERS, make_optimizer, make_scheduler, parameter_groups


def test_names_are_those_of_transformers():
    assert set(Schedule.__args__) == {kind.value for kind in SchedulerType}
    assert set(Optimizer.__args__) == set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


def test_groups():
    model = RewardModel(tiny_classifier("gpt2"))
    next(model.parameters()).requires_grad_(False)
    given = {"learning_rate": 1e-3, "weight_decay": 0.1}
    groups = parameter_groups(model, options(**given, head_learning_rate=1e-2))
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups]
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert sorted(name for group, *_ in found for name in group) == trained
    assert found[-1] == ({"classifier.score.weight"}, 1e-2, 0.1)
    for group, lr, decay in found[:-1]:
        assert lr == 1e-3 and "classifier.score.weight" not in group
        assert all(("bias" in name or ".ln_" in name) == (decay == 0.0) for name in group)
    assert [g["lr"] for g in parameter_groups(model, options(**given))] == [1e-3, 1e-3]
    model = RewardModel(get_peft_model(tiny_classifier("llama"), LoraConfig(task_type="SEQ_CLS", r=2)))
    groups = parameter_groups(model, options(**given, head_learning_rate=1e-2))
    assert [id(p) for p in groups[-1]["params"]] == [id(find_head(model.classifier).weight)]
    assert groups[-1]["lr"] == 1e-2 and groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_decay_acts_on_matrices_alone(optim):
    """A step with a gradient of 0 changes what decays and nothing else."""
    torch.manual_seed(0)
    model = RewardModel(tiny_classifier("gpt2"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, options(optim=optim, learning_rate=1e-2, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim < 2), name


def test_arguments_reach_the_optimizer():
    model = RewardModel(tiny_classifier("gpt2"))
    args = {"momentum": 0.9, "nesterov": True}
    sgd = make_optimizer(model, options(optim="sgd", optim_args=args, learning_rate=0.5))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9 and sgd.defaults["lr"] == 0.5
    betas = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    adam = make_optimizer(model, options(**betas, optim_args={"amsgrad": True}))
    assert adam.defaults["betas"] == (0.8, 0.9) and adam.defaults["eps"] == 1e-6 and adam.defaults["fused"]
    assert adam.defaults["amsgrad"]
    for args, name in [({"momentun": 0.9}, "momentun"), ({"lr": 0.9}, "lr"), ({"params": []}, "params")]:
        with pytest.raises(InputError, match=f"optim_args: sgd takes no '{name}' here; it takes momentum, dampening"):
            make_optimizer(model, options(optim="sgd", optim_args=args))


KWARGS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 5},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
    "cosine": {"num_cycles": 0.4},
}


def schedule(name: str, greater_is_better: bool = False, total_steps: int = 12, **changes):
    """The schedule `name` of two parameter groups with learning rates 0.1 and 1."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 1.0)], lr=0.1)
    by_evaluation = {"eval_steps": 1} if name in FOLLOW_EVALUATIONS else {}
    config = options(lr_scheduler_type=name, **by_evaluation, **changes)
    return make_scheduler(optimizer, total_steps, config, greater_is_better)


@pytest.mark.parametrize("name", [name for name in Schedule.__args__ if name not in FOLLOW_EVALUATIONS])
def test_schedules_are_those_of_transformers(name):
    """Each group in proportion to its own rate; after a restart the rest is the same."""
    warmup, kwargs = 0 if name == "constant" else 3, KWARGS.get(name)
    ours = schedule(name, warmup_steps=warmup, lr_scheduler_kwargs=kwargs)
    theirs = get_scheduler(name, schedule("constant").optimizer, warmup, 12, dict(kwargs or {}))
    for step in range(12):
        rates = [group["lr"] for group in ours.optimizer.param_groups]
        assert rates == theirs.get_last_lr() and rates[1] == pytest.approx(10 * rates[0])
        if step == 5:
            state = json.loads(json.dumps(ours.state_dict()))
            ours = schedule(name, warmup_steps=warmup, lr_scheduler_kwargs=kwargs)
            ours.load_state_dict(state)
        for scheduler in (ours, theirs):
            scheduler.optimizer.step()
            scheduler.step()
    first = schedule(name, warmup_steps=warmup, lr_scheduler_kwargs=kwargs).get_last_lr()
    for ratio in ({"warmup_ratio": warmup / 12}, {"warmup_steps": warmup / 12}):
        assert schedule(name, lr_scheduler_kwargs=kwargs, **ratio).get_last_lr() == first


@pytest.mark.parametrize("name, kwargs", [("linear", {"power": 2}), ("constant", {"x": 1}), ("greedy", {"x": 1})])
def test_arguments_that_a_schedule_does_not_take(name, kwargs):
    with pytest.raises(InputError, match="lr_scheduler_kwargs="):
        schedule(name, lr_scheduler_kwargs=kwargs)


@pytest.mark.parametrize("greater", [False, True])
def test_plateau_follows_the_direction_of_its_metric(greater):
    scheduler = schedule("reduce_lr_on_plateau", greater, lr_scheduler_kwargs={"patience": 0, "factor": 0.5})
    for value in (0.1, 0.2, 0.3):
        scheduler.step(value)
    assert scheduler.optimizer.param_groups[1]["lr"] == (1.0 if greater else 0.25)


# ---------------------------------------------------------------- whole runs

GREEDY = json.dumps({"min_lr": 1e-6, "max_lr": 1e-2, "patience": 0, "factor": 0.5})


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name != "adamw_torch_fused"])
def test_every_optimizer_resumes_to_the_same_bits(train, tmp_path, optim):
    given = [f"--optim={optim}", "--learning_rate=1e-2", "--head_learning_rate=5e-2", "--lr_scheduler_type=cosine"]
    given += ["--optim_args=momentum=0.9"] if optim in ("sgd", "rmsprop") else []
    given += ["--save_steps=2", "--warmup_steps=2"]
    _, folder = train("run", *given)
    whole, rows = weights(folder), lines(folder, "optim/learning_rate")
    assert rows == pytest.approx([0.0, 5e-3, 1e-2, 5e-3])
    assert lines(folder, "optim/head_learning_rate") == pytest.approx([5 * rate for rate in rows])
    train("run", *given, f"--resume_from_checkpoint={folder}/checkpoints/step-2")
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(folder).items())
    losses = lines(folder)
    assert losses[-1] != losses[0] and all(map(math.isfinite, losses)) and len(losses) == 4


@pytest.mark.parametrize("name, kwargs", [("reduce_lr_on_plateau", '{"patience": 0}'), ("greedy", GREEDY)])
def test_schedules_that_follow_a_metric_resume(train, name, kwargs):
    given = [f"--lr_scheduler_type={name}", f"--lr_scheduler_kwargs={kwargs}", "--learning_rate=1e-3"]
    given += ["--max_steps=8", "--eval_steps=1", "--save_steps=4", "--num_print_samples=0"]
    given += ["--metric_for_best_model=eval/reward_std", "--greater_is_better=false"]
    _, folder = train("run", *given)
    rates, whole = lines(folder, "optim/learning_rate"), weights(folder)
    assert len(set(rates[:4])) > 1 and len(set(rates[4:])) > 1  # before and after
    train("run", *given, f"--resume_from_checkpoint={folder}/checkpoints/step-4")
    assert lines(folder, "optim/learning_rate") == rates
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(folder).items())


def test_the_plain_optimizer_is_the_same_as_the_fused_one(train):
    (_, plain), (_, fused) = train("plain", "--optim=adamw_torch"), train("fused")
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(fused)[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "given, message",
    [
        ("--optim=adamw", "optim='adamw': must be 'adamw_torch_fused', 'adamw_torch', 'ada"),
        ("--optim=sgd --adam_beta1=0.8", "adam_beta1=0.8: has no effect with optim=sgd; use optim_args"),
        ("--optim=sgd --optim_args=moment=1", "optim_args: sgd takes no 'moment' here; it takes momentum"),
        ("--optim_args=betas=(1,2)", "optim_args={'betas': [1, 2]}: Invalid beta parameter at index 0: 1"),
        ("--lr_scheduler_type=greedy", "lr_scheduler_type='greedy': depends on evaluations"),
        ("--lr_scheduler_type=greedy --warmup_steps=2", "warmup_steps=2: lr_scheduler_type=greedy has no warm-up"),
        ("--early_stopping_patience=2", "early_stopping_patience=2: has no effect without eval_steps"),
        ("--early_stopping_threshold=2", "early_stopping_threshold=2.0: has no effect without early_stopping_patience"),
        ("--eval_steps=1.5", "eval_steps=1.5: must be a number of steps, or a fraction of all steps below 1"),
        ("--load_best_model_at_end", "load_best_model_at_end=True: has no effect without eval_steps"),
    ],
)
def test_options_without_effect(fails, given, message):
    assert fails(*given.split()).startswith(message)
