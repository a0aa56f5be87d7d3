"""One optimizer step: clipping, refusing what is not finite, the learning rate, and what is random in it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from closeness import assert_close_to_scale
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.engine.gradients import grad_norm
from finetune.engine.optimizers import build_optimizer
from finetune.engine.schedule import build_schedule, set_schedule_step
from finetune.engine.step import StepResult, run_step
from finetune.models.batch import Batch
from finetune.recipe.optimizers import AdamW
from finetune.recipe.schema import Schedule
from finetune.runtime.distributed import Runtime
from finetune.training.job import Job

BuildJob = Callable[..., Job]


def batches_of(job: Job, step: int) -> list[Batch]:
    accumulation = job.split.accumulation
    return [job.micro_batches()[step * accumulation + index] for index in range(accumulation)]


def steps(job: Job, count: int) -> list[StepResult]:
    return [job.step(step, batches_of(job, step)) for step in range(count)]


def trained_weights(job: Job) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    return {name: value.clone() for name, value in get_model_state_dict(job.state.transformer, options=options).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Clipping


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_as_torch_clips_them(runtime: Runtime, limit: float) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model(torch.randn(4, 7)).square().sum().backward()
    theirs = copy.deepcopy(model)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        other.grad = ours.grad.clone()
    norm = grad_norm(list(model.parameters()), limit)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert_close_to_scale(ours.grad, other.grad)


def test_without_a_limit_gradients_are_left_alone(runtime: Runtime) -> None:
    model = nn.Linear(7, 5)
    (1e6 * model(torch.randn(4, 7))).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    grad_norm(list(model.parameters()), None)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), before, strict=True))


def test_the_accumulated_gradient_is_clipped_once_to_the_global_norm(build_job: BuildJob) -> None:
    """With plain gradient descent at rate 1 the change of the weights is the gradient: its norm is the limit."""
    job = build_job("train.micro_batch_size=1", "train.max_grad_norm=1e-3")
    assert job.split.accumulation == 4
    job.state.optimizer = torch.optim.SGD(job.state.parameters, lr=1.0)
    job.state.schedule = build_schedule(job.state.optimizer, Schedule(), 10)
    before = trained_weights(job)
    result = run_step(job.state, 0, batches_of(job, 0))
    change = torch.cat([(value - before[name]).flatten() for name, value in trained_weights(job).items()])
    assert result.grad_norm > 10 * 1e-3
    torch.testing.assert_close(change.norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_the_reported_norm_is_that_before_clipping(build_job: BuildJob) -> None:
    clipped, free = (build_job(f"train.max_grad_norm={limit}") for limit in ("1e-3", "none"))
    assert steps(clipped, 1)[0].grad_norm == steps(free, 1)[0].grad_norm


# What is not finite


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("micro_step", [0, 1])
def test_a_loss_that_is_not_finite_changes_no_parameter(build_job: BuildJob, value: float, micro_step: int) -> None:
    job = build_job()
    steps(job, 2)
    before, rate, optimizer = trained_weights(job), job.state.schedule.get_last_lr(), optimizer_state(job)
    batches = batches_of(job, 2)
    batches[micro_step].only.target[0, 0, 0] = value
    result = job.step(2, batches)
    assert not result.updated
    assert not math.isfinite(result.loss)
    assert equal(trained_weights(job), before)
    assert equal(optimizer_state(job), optimizer)
    assert job.state.schedule.get_last_lr() == rate


def optimizer_state(job: Job) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
        for index, state in enumerate(job.state.optimizer.state.values())
        for name, value in state.items()
    }


def test_a_gradient_that_is_not_finite_changes_no_parameter_though_the_loss_is(build_job: BuildJob) -> None:
    job = build_job()
    before = trained_weights(job)
    batches = batches_of(job, 0)
    batches[0].only.weight.fill_(1e30)  # the loss still fits float32, the squares of its gradients do not
    result = job.step(0, batches)
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert not result.updated
    assert equal(trained_weights(job), before)


def test_a_refused_step_leaves_no_gradient_behind(build_job: BuildJob) -> None:
    """The next step is the one that an untouched job makes."""
    job, untouched = build_job(), build_job()
    broken = batches_of(job, 0)
    broken[0].only.target.fill_(math.inf)
    job.step(0, broken)
    assert steps(job, 2) == steps(untouched, 2)
    assert equal(trained_weights(job), trained_weights(untouched))


# Learning rate

SCHEDULES = [
    Schedule(name="constant"),
    Schedule(name="constant_with_warmup", warmup_steps=5),
    Schedule(name="linear", warmup_steps=5),
    Schedule(name="cosine", warmup_steps=3),
    Schedule(name="cosine_with_restarts", warmup_steps=2, cycles=3),
    Schedule(name="polynomial", warmup_steps=2, power=2.0),
]


def optimizer() -> torch.optim.Optimizer:
    return build_optimizer({"weight": nn.Parameter(torch.zeros(2))}, AdamW(lr=1e-3))


def rates(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, count: int) -> list[float]:
    """The rates of the next `count` steps."""
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [found[-1]]
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda settings: settings.name)
def test_the_rate_follows_diffusers_schedule(build_job: BuildJob, settings: Schedule) -> None:
    names = {"num_warmup_steps": "warmup_steps", "num_cycles": "cycles", "power": "power"}
    theirs = optimizer()
    arguments = {name: getattr(settings, key) for name, key in names.items()}
    expected = rates(theirs, get_scheduler(settings.name, theirs, num_training_steps=6, **arguments), 6)
    job = build_job(
        *(f"schedule.{key}={getattr(settings, key)}" for key in ("name", "warmup_steps", "cycles", "power")),
        "train.steps=6",
    )
    assert [result.lr for result in steps(job, 6)] == expected


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda settings: settings.name)
@pytest.mark.parametrize("step", [0, 1, 4, 11, 20])
def test_a_schedule_set_to_a_step_is_one_that_was_stepped_there(settings: Schedule, step: int) -> None:
    straight = optimizer()
    expected = rates(straight, build_schedule(straight, settings, 20), 25)
    resumed = optimizer()
    schedule = build_schedule(resumed, settings, 20)
    set_schedule_step(schedule, step)
    assert rates(resumed, schedule, 25 - step) == expected[step:]


def test_the_optimizer_is_the_recipes() -> None:
    settings = AdamW(lr=3e-4, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3)
    (group,) = build_optimizer({"weight": nn.Parameter(torch.zeros(2))}, settings).param_groups
    found = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    assert found == {"lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


# What is random


def test_dropout_does_not_depend_on_what_was_drawn_before(build_job: BuildJob) -> None:
    results = []
    for other_use in (1, 2):
        job = build_job("lora.dropout=0.5")
        for step in range(3):
            torch.manual_seed(other_use)
            results.append(job.step(step, batches_of(job, step)))
    assert results[:3] == results[3:]


@pytest.mark.parametrize("changed", ["seed", "step", "rank"])
def test_dropout_follows_seed_step_and_rank(build_job: BuildJob, changed: str) -> None:
    """Same weights and batch; the gradient of the first step shows which inputs were dropped."""
    first, second = build_job("lora.dropout=0.5"), build_job("lora.dropout=0.5")
    batches, step = batches_of(first, 0), 0
    if changed == "seed":
        second.state.seed += 1
    elif changed == "step":
        step = 1
    else:
        second.state.runtime = replace(second.state.runtime, rank=1)
    assert first.step(0, batches).grad_norm != second.step(step, batches).grad_norm


def test_the_same_recipe_gives_the_same_steps(build_job: BuildJob) -> None:
    assert steps(build_job("lora.dropout=0.1"), 4) == steps(build_job("lora.dropout=0.1"), 4)


# Stopping


def test_a_wish_to_stop_is_reported_and_the_step_is_made(build_job: BuildJob) -> None:
    job = build_job()
    result = job.step(0, batches_of(job, 0), stop=True)
    assert result.stop
    assert result.updated
