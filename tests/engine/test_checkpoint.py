"""Checkpoints are whole or absent, and going on from one is the same training as not having stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from finetune.engine.step import StepResult
from finetune.engine.weights.checkpoint import Pending
from finetune.runtime.errors import UserError
from finetune.training.job import Job

BuildJob = Callable[..., Job]
METHODS = {"lora": ["lora.dropout=0.2"], "full": ["train.method=full"]}


def run(job: Job, first: int, last: int, save_each: int | None = None) -> list[StepResult]:
    """Steps first .. last - 1, as the trainer makes them."""
    batches = iter(job.batches(first))
    results = []
    for step in range(first, last):
        results.append(job.step(step, [next(batches) for _ in range(job.split.accumulation)]))
        if save_each and (step + 1) % save_each == 0:
            job.save(step + 1)
    return results


def state_of(job: Job) -> dict[str, Tensor]:
    """Every trained weight and every tensor of the optimizer."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = dict(get_model_state_dict(job.state.transformer, options=options))
    moments = get_optimizer_state_dict(job.state.transformer, job.state.optimizer, options=options)["state"]
    return state | {f"{name}.{key}": value for name, entry in moments.items() for key, value in entry.items()}


def assert_same_state(first: Job, second: Job) -> None:
    ours, theirs = state_of(first), state_of(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Going on


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_checkpoint_is_the_saved_state(build_job: BuildJob, method: str) -> None:
    job = build_job(*METHODS[method])
    run(job, 0, 3)
    job.save(3)
    resumed = build_job(*METHODS[method])
    assert resumed.resume() == 3
    assert_same_state(job, resumed)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_checkpoint_is_the_same_as_not_having_stopped(build_job: BuildJob, method: str) -> None:
    """Bit for bit, with dropout, momentum and a moving learning rate."""
    overrides = [*METHODS[method], "schedule.name=cosine", "schedule.warmup_steps=4"]
    straight, first, second = (build_job(*overrides) for _ in range(3))
    expected = run(straight, 0, 6)
    before = run(first, 0, 3)
    first.save(3)
    after = run(second, second.resume(), 6)
    assert before + after == expected
    assert_same_state(straight, second)


def test_saving_does_not_change_training(build_job: BuildJob) -> None:
    saved, straight = build_job("lora.dropout=0.2"), build_job("lora.dropout=0.2")
    assert run(saved, 0, 4, save_each=1) == run(straight, 0, 4)


def test_a_run_without_a_checkpoint_starts_at_the_beginning(build_job: BuildJob) -> None:
    assert build_job().resume() == 0


def test_a_checkpoint_of_an_adapter_does_not_hold_the_frozen_weights(build_job: BuildJob, tiny_ltx: Path) -> None:
    job = build_job()
    run(job, 0, 1)
    size = sum(file.stat().st_size for file in job.save(1).rglob("*") if file.is_file())
    assert size < (tiny_ltx / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size


# Which are kept


@pytest.mark.parametrize("keep, left", [("1", [5]), ("3", [3, 4, 5]), ("all", [1, 2, 3, 4, 5])])
def test_the_newest_checkpoints_are_kept(build_job: BuildJob, keep: str, left: list[int]) -> None:
    job = build_job(f"checkpoint.keep_last={keep}")
    run(job, 0, 5, save_each=1)
    assert job.checkpoints.steps() == left
    assert sorted(job.checkpoints.folder.iterdir()) == [job.checkpoints.path(step) for step in left]


def test_a_step_that_is_saved_is_left_alone(build_job: BuildJob) -> None:
    job = build_job()
    run(job, 0, 1)
    files = {file: file.stat().st_mtime_ns for file in job.save(1).rglob("*")}
    assert {file: file.stat().st_mtime_ns for file in job.save(1).rglob("*")} == files


# Begun and finished


def begin(job: Job, step: int) -> Pending:
    return job.checkpoints.begin(step, job.state.parts, job.identity(), lambda folder: None)


def test_a_checkpoint_that_is_begun_is_none_until_it_is_finished(build_job: BuildJob) -> None:
    job = build_job("checkpoint.keep_last=1")
    run(job, 0, 2, save_each=2)
    run(job, 2, 3)
    pending = begin(job, 3)
    assert job.checkpoints.steps() == [job.checkpoints.latest()] == [2]
    assert job.checkpoints.finish(pending) == job.checkpoints.path(3)
    assert job.checkpoints.steps() == [job.checkpoints.latest()] == [3]


def test_steps_between_begin_and_finish_are_not_in_the_checkpoint(build_job: BuildJob) -> None:
    job, expected = build_job(), build_job()
    run(job, 0, 2)
    pending = begin(job, 2)
    run(job, 2, 4)
    job.checkpoints.finish(pending)
    run(expected, 0, 2)
    resumed = build_job()
    assert resumed.resume() == 2
    assert_same_state(resumed, expected)


def test_a_checkpoint_that_was_never_finished_is_cleared_away_by_the_next(build_job: BuildJob) -> None:
    job = build_job()
    run(job, 0, 1)
    begin(job, 1)
    run(job, 1, 2, save_each=2)
    assert list(job.checkpoints.folder.iterdir()) == [job.checkpoints.path(2)]


def test_a_checkpoint_that_cannot_be_finished_leaves_the_older_ones_and_nothing_else(build_job: BuildJob) -> None:
    job = build_job()
    run(job, 0, 2, save_each=2)
    pending = begin(job, 3)
    in_the_way = job.checkpoints.path(3) / "file"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    with pytest.raises(OSError, match="not empty"):
        job.checkpoints.finish(pending)
    assert job.checkpoints.steps() == [2]
    assert sorted(job.checkpoints.folder.iterdir()) == [job.checkpoints.path(2), in_the_way.parent]


def test_a_checkpoint_that_does_not_name_its_parts_holds_weights_and_optimizer(build_job: BuildJob) -> None:
    """As they were written before there were others."""
    job = build_job()
    run(job, 0, 2)
    file = job.save(2) / "trainer.json"
    facts = json.loads(file.read_text())
    assert facts.pop("parts") == ["model", "optimizer"]
    file.write_text(json.dumps(facts))
    resumed = build_job()
    assert resumed.resume() == 2
    assert_same_state(job, resumed)


# What is not whole


@pytest.fixture
def interrupted(build_job: BuildJob) -> Job:
    """A run that has saved its steps 2 and 4."""
    job = build_job("checkpoint.keep_last=all")
    run(job, 0, 4, save_each=2)
    return job


def test_a_folder_that_was_being_written_is_no_checkpoint(interrupted: Job) -> None:
    folder = interrupted.checkpoints.folder
    shutil.copytree(interrupted.checkpoints.path(4), folder / ".partial-step_00000006")
    assert interrupted.checkpoints.latest() == 4


def test_a_folder_that_was_being_written_is_cleared_away_by_the_next_save(interrupted: Job) -> None:
    folder = interrupted.checkpoints.folder
    for step in (5, 6):
        shutil.copytree(interrupted.checkpoints.path(4), folder / f".partial-step_0000000{step}")
    run(interrupted, 4, 6, save_each=2)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{step}" for step in (2, 4, 6)]


def test_a_folder_that_was_half_copied_is_no_checkpoint_and_is_written_anew(interrupted: Job) -> None:
    half = interrupted.checkpoints.path(6)
    shutil.copytree(interrupted.checkpoints.path(4) / "state", half / "state")
    assert interrupted.checkpoints.latest() == 4
    run(interrupted, 4, 6, save_each=2)
    assert interrupted.checkpoints.latest() == 6
    assert json.loads((half / "trainer.json").read_text())["step"] == 6


def test_a_save_that_fails_leaves_the_older_checkpoints_and_nothing_else(interrupted: Job) -> None:
    def fail(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        interrupted.checkpoints.begin(6, interrupted.state.parts, {}, fail)
    assert interrupted.checkpoints.steps() == [2, 4]
    assert sorted(path.name for path in interrupted.checkpoints.folder.iterdir()) == ["step_00000002", "step_00000004"]


# What is damaged


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    "file, damage",
    [
        *((file, damage) for file in ("state/__0_0.distcp", "state/.metadata") for damage in (cut, empty, remove)),
        *(("trainer.json", damage) for damage in (cut, empty)),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_names_it_and_the_older_one(
    build_job: BuildJob, interrupted: Job, file: str, damage: Callable[[Path], None]
) -> None:
    damaged = interrupted.checkpoints.path(4)
    damage(damaged / file)
    with pytest.raises(UserError) as error:
        build_job().resume()
    assert str(damaged) in str(error.value)
    assert "goes on from step 2" in str(error.value)


def test_after_a_damaged_checkpoint_is_removed_the_run_goes_on_from_the_older_one(
    build_job: BuildJob, interrupted: Job
) -> None:
    cut(interrupted.checkpoints.path(4) / "state" / "__0_0.distcp")
    with pytest.raises(UserError, match="remove this folder"):
        build_job().resume()
    shutil.rmtree(interrupted.checkpoints.path(4))
    assert build_job().resume() == 2


def test_the_only_checkpoint_being_damaged_the_run_is_said_to_start_anew(build_job: BuildJob) -> None:
    job = build_job()
    run(job, 0, 1)
    cut(job.save(1) / "state" / "__0_0.distcp")
    with pytest.raises(UserError, match="starts anew"):
        build_job().resume()
