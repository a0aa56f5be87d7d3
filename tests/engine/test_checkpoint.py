"""Checkpoints are whole or absent, and going on from one is the same training as not having stopped."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from checkpointing import assert_same_state, run

from finetune.engine.weights.checkpoint import Pending
from finetune.runtime.errors import UserError
from finetune.training.job import Job

BuildJob = Callable[..., Job]
METHODS = {"lora": ["lora.dropout=0.2"], "full": ["train.method=full"]}


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
    return job.checkpoints.begin(step, job.state.parts, job.identity, lambda folder: None)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What DCP writes waits until the event is set."""
    gate, save = threading.Event(), dcp.save

    def wait_and_save(*arguments: object, **keywords: object) -> object:
        assert gate.wait(60)
        return save(*arguments, **keywords)

    monkeypatch.setattr(dcp, "save", wait_and_save)
    return gate


def test_a_checkpoint_that_is_begun_is_none_until_it_is_written(
    build_job: BuildJob, slow_disk: threading.Event
) -> None:
    job = build_job("checkpoint.keep_last=1")
    slow_disk.set()
    run(job, 0, 2, save_each=2)
    slow_disk.clear()
    run(job, 2, 3)
    pending = begin(job, 3)
    assert job.checkpoints.steps() == [2]
    assert not pending.is_written
    slow_disk.set()
    assert job.checkpoints.finish(pending) == job.checkpoints.path(3)
    assert pending.is_written
    assert pending.seconds > 0
    assert job.checkpoints.steps() == [job.checkpoints.newest()] == [3]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8"])
def test_steps_that_are_made_while_a_checkpoint_is_written_are_not_in_it(
    build_job: BuildJob, slow_disk: threading.Event, optimizer: str
) -> None:
    name = f"optimizer.name={optimizer}"
    job, expected = build_job(name), build_job(name)
    run(job, 0, 2)
    pending = begin(job, 2)
    run(job, 2, 4)
    slow_disk.set()
    job.checkpoints.finish(pending)
    run(expected, 0, 2)
    resumed = build_job(name)
    assert resumed.resume() == 2
    assert_same_state(resumed, expected)


def test_the_host_memory_of_one_checkpoint_serves_the_next(build_job: BuildJob) -> None:
    job = build_job()
    run(job, 0, 2, save_each=1)
    memory = job.checkpoints._host._memory
    run(job, 2, 3, save_each=1)
    assert job.checkpoints._host._memory is memory


def test_a_checkpoint_is_written_at_once_where_the_recipe_says_so(build_job: BuildJob) -> None:
    job = build_job("checkpoint.background=false")
    run(job, 0, 1)
    assert begin(job, 1).is_written
    assert job.checkpoints.steps() == [1]


def test_what_was_left_of_a_save_is_cleared_away_by_the_next(build_job: BuildJob) -> None:
    job = build_job()
    run(job, 0, 1)
    (job.checkpoints.folder / ".partial-step_00000001" / "state").mkdir(parents=True)
    run(job, 1, 2, save_each=2)
    assert list(job.checkpoints.folder.iterdir()) == [job.checkpoints.path(2)]


def test_a_checkpoint_that_cannot_get_its_name_leaves_the_older_ones_and_nothing_else(
    build_job: BuildJob, slow_disk: threading.Event
) -> None:
    job = build_job()
    slow_disk.set()
    run(job, 0, 2, save_each=2)
    slow_disk.clear()
    pending = begin(job, 3)
    in_the_way = job.checkpoints.path(3) / "file"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    slow_disk.set()
    with pytest.raises(UserError, match=r"step 3 was not written \(.*not empty.*\); step 2 is safe"):
        job.checkpoints.finish(pending)
    assert pending.has_failed
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


def test_a_folder_that_was_being_written_is_no_checkpoint(interrupted: Job) -> None:
    folder = interrupted.checkpoints.folder
    shutil.copytree(interrupted.checkpoints.path(4), folder / ".partial-step_00000006")
    assert interrupted.checkpoints.newest() == 4


def test_a_folder_that_was_being_written_is_cleared_away_by_the_next_save(interrupted: Job) -> None:
    folder = interrupted.checkpoints.folder
    for step in (5, 6):
        shutil.copytree(interrupted.checkpoints.path(4), folder / f".partial-step_0000000{step}")
    run(interrupted, 4, 6, save_each=2)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{step}" for step in (2, 4, 6)]


def test_a_folder_that_was_half_copied_is_no_checkpoint_and_is_written_anew(interrupted: Job) -> None:
    half = interrupted.checkpoints.path(6)
    shutil.copytree(interrupted.checkpoints.path(4) / "state", half / "state")
    assert interrupted.checkpoints.newest() == 4
    run(interrupted, 4, 6, save_each=2)
    assert interrupted.checkpoints.newest() == 6
    assert json.loads((half / "trainer.json").read_text())["step"] == 6
    assert (interrupted.checkpoints.folder / "set_aside" / half.name / "state").is_dir()


def test_a_save_that_fails_leaves_the_older_checkpoints_and_nothing_else(interrupted: Job) -> None:
    def fail(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match=r"step 6 was not written .*Input/output.*; step 4 is safe"):
        interrupted.checkpoints.begin(6, interrupted.state.parts, {}, fail)
    assert interrupted.checkpoints.steps() == [2, 4]
    assert sorted(path.name for path in interrupted.checkpoints.folder.iterdir()) == ["step_00000002", "step_00000004"]
