"""An optimizer whose state is in host memory makes the updates of one whose state is on the device, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.engine.step import StepResult
from finetune.training.job import Job

NAMES = ["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8"]
OFFLOADS = ["state", "state_and_gradients"]
WHOLE = ["train.global_batch_size=2", "train.micro_batch_size=2"]
every_offload = pytest.mark.parametrize("offload", OFFLOADS)


@pytest.fixture
def make_job(build_job: Callable[..., Job], family_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    def make(*overrides: str) -> Job:
        settings = [f"output={tmp_path / 'run'}", "train.method=full", "optimizer.lr=1e-3", *WHOLE]
        return build_job(*settings, *overrides, recipe_file=family_recipe("ltx"))

    return make


def train(job: Job, first: int = 0, last: int = 3) -> list[StepResult]:
    count, batches = job.split.accumulation, job.micro_batches()
    return [job.step(step, [batches[step * count + k] for k in range(count)]) for step in range(first, last)]


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    return {
        name: tensor.clone() for name, tensor in get_model_state_dict(job.state.transformer, options=options).items()
    }


def assert_equal_runs(ours: Job, theirs: Job) -> None:
    assert train(ours) == train(theirs)
    weights, others = weights_of(ours), weights_of(theirs)
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []


@every_offload
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", ["float32", "bf16"])
def test_updates_are_those_of_the_device(make_job: Callable[..., Job], offload: str, name: str, weights: str) -> None:
    settings = [f"optimizer.name={name}", f"train.weights={weights}"]
    assert_equal_runs(make_job(*settings, f"optimizer.offload={offload}"), make_job(*settings))


@every_offload
@pytest.mark.parametrize(
    "settings", [["train.max_grad_norm=0.05"], ["train.max_grad_norm=none"], ["train.method=lora"]]
)
def test_norms_are_clipped_the_same(make_job: Callable[..., Job], offload: str, settings: list[str]) -> None:
    assert_equal_runs(make_job(*settings, f"optimizer.offload={offload}"), make_job(*settings))


def test_gradients_are_accumulated_on_the_device(make_job: Callable[..., Job]) -> None:
    accumulated = ["train.global_batch_size=4", "train.micro_batch_size=1"]
    assert_equal_runs(make_job(*accumulated, "optimizer.offload=state"), make_job(*accumulated))


@every_offload
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_resumed_run_is_the_straight_one_with_or_without(
    make_job: Callable[..., Job], offload: str, name: str
) -> None:
    """The state of one is a checkpoint of the other."""
    settings = [f"optimizer.name={name}", "train.weights=bf16"]
    straight = make_job(*settings)
    expected = train(straight, 0, 4)
    broken = make_job(*settings, f"optimizer.offload={offload}")
    assert train(broken, 0, 2) == expected[:2]
    broken.save(2)
    for further in ([], [f"optimizer.offload={offload}"]):
        resumed = make_job(*settings, *further)
        assert resumed.resume() == 2
        assert train(resumed, 2, 4) == expected[2:]


@every_offload
def test_a_step_that_is_not_finite_changes_nothing(make_job: Callable[..., Job], offload: str) -> None:
    job, plain = make_job(f"optimizer.offload={offload}"), make_job()
    batch = job.micro_batches()[0]
    spoilt = [batch.to(torch.device("cpu"))]
    term = next(iter(spoilt[0].terms.values()))
    term.target.fill_(torch.nan)
    before = weights_of(job)
    assert not job.step(0, spoilt).updated
    after = weights_of(job)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert train(job, 0, 2) == train(plain, 0, 2)


def test_gradients_leave_the_device_in_the_backward_pass(make_job: Callable[..., Job]) -> None:
    job = make_job("optimizer.offload=state_and_gradients")
    seen = []
    job.state.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(parameter.grad is None for parameter in job.state.parameters)
    )
    train(job, 0, 1)
    assert len(seen) == len(job.state.parameters)
    assert all(seen)


@pytest.mark.parametrize("settings", [[], ["optimizer.name=adamw_8bit"], ["optimizer.offload=state_and_gradients"]])
def test_a_resume_holds_one_gradient_at_a_time(make_job: Callable[..., Job], settings: list[str]) -> None:
    """There may be no room for all of them."""
    saved = make_job(*settings)
    train(saved, 0, 1)
    saved.save(1)
    job, most = make_job(*settings), []
    job.state.optimizer.register_step_pre_hook(
        lambda *_: most.append(sum(parameter.grad is not None for parameter in job.state.parameters))
    )
    assert job.resume() == 1
    assert most == [1] * len(job.state.parameters)
