"""Checkpoints are whole or absent, and going on from one is the same training as not having stopped."""

import json
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
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


@pytest.fixture
def interrupted(build_job: BuildJob) -> Job:
    """A run that has saved its steps 2 and 4."""
    job = build_job("checkpoint.keep_last=all")
    run(job, 0, 4, save_each=2)
    return job


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


# What is damaged


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


FILES = ("state/__0_0.distcp", "state/.metadata", "lora/pytorch_lora_weights.safetensors")
DAMAGES = [
    *((file, damage) for file in FILES for damage in (cut, empty, remove, flip)),
    *(("trainer.json", damage) for damage in (cut, empty)),
]


@pytest.mark.parametrize("file, damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    build_job: BuildJob, interrupted: Job, capsys, file: str, damage: Callable[[Path], None]
) -> None:
    damage(interrupted.checkpoints.path(4) / file)
    resumed, expected = build_job("checkpoint.keep_last=all"), build_job()
    assert resumed.resume() == 2
    said = capsys.readouterr().err
    assert "warning: the checkpoint of step 4 is damaged, and passed over (step 4: " in said
    assert Path(file).name in said
    run(expected, 0, 2)
    assert_same_state(resumed, expected)


def test_a_damaged_checkpoint_is_set_aside_and_its_step_is_written_anew(build_job: BuildJob, interrupted: Job) -> None:
    flip(interrupted.checkpoints.path(4) / FILES[0])
    job = build_job("checkpoint.keep_last=all")
    done = job.resume()
    job.checkpoints.set_aside_after(done)
    assert job.checkpoints.steps() == [2]
    assert (job.checkpoints.folder / "set_aside" / "step_00000004" / FILES[0]).is_file()
    run(job, done, 4, save_each=2)
    assert job.checkpoints.newest() == 4
    assert_same_state(job, interrupted)


@pytest.mark.parametrize("damage", [cut, empty, remove])
@pytest.mark.parametrize("file", FILES[:2])
def test_a_checkpoint_without_digests_is_looked_at_by_its_table_of_contents(
    build_job: BuildJob, interrupted: Job, file: str, damage: Callable[[Path], None]
) -> None:
    """As they were written before digests were noted."""
    for step in (2, 4):
        facts_file = interrupted.checkpoints.path(step) / "trainer.json"
        facts = json.loads(facts_file.read_text())
        assert set(facts.pop("files")) == set(FILES)
        facts_file.write_text(json.dumps(facts))
    assert build_job().resume() == 4
    damage(interrupted.checkpoints.path(4) / file)
    assert build_job().resume() == 2


def test_without_verify_no_digest_is_computed(build_job: BuildJob, interrupted: Job) -> None:
    flip(interrupted.checkpoints.path(4) / "lora" / "pytorch_lora_weights.safetensors")
    assert build_job("checkpoint.verify=false").resume() == 4


def test_digests_are_those_of_sha256sum(interrupted: Job) -> None:
    folder = interrupted.checkpoints.path(4)
    noted = json.loads((folder / "trainer.json").read_text())["files"]
    lines = subprocess.run(
        ["sha256sum", *FILES], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {name: digest for name, (_, digest) in noted.items()} == {line[66:]: line[:64] for line in lines}


def test_all_checkpoints_being_damaged_is_an_error_and_not_a_new_start(build_job: BuildJob, interrupted: Job) -> None:
    for step in (2, 4):
        flip(interrupted.checkpoints.path(step) / FILES[0])
    with pytest.raises(UserError, match="all checkpoints are damaged") as error:
        build_job().resume()
    assert "step 4: " in str(error.value)
    assert "step 2: " in str(error.value)


# What runs code


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_code_in_the_table_of_contents_is_not_run(
    build_job: BuildJob, interrupted: Job, tmp_path: Path, capsys
) -> None:
    mark, table = tmp_path / "evil", interrupted.checkpoints.path(4) / "state" / ".metadata"
    contents = pickle.loads(table.read_bytes())
    contents.planner_data = Evil(mark)
    table.write_bytes(pickle.dumps(contents))
    assert build_job("checkpoint.verify=false").resume() == 2
    assert "Path.touch" in capsys.readouterr().err.replace("\n", "")
    assert not mark.exists()


def test_code_in_a_value_is_not_run(build_job: BuildJob, tmp_path: Path) -> None:
    job, mark = build_job(), tmp_path / "evil"
    run(job, 0, 1)
    job.state.optimizer.param_groups[0]["eps"] = Evil(mark)
    job.save(1)
    mark.unlink(missing_ok=True)  # a copy may have left the file
    with pytest.raises(UserError, match="cannot be read"):
        build_job().resume()
    assert not mark.exists()


# What cannot be removed or has another name


def test_a_folder_that_cannot_be_removed_is_a_warning(build_job: BuildJob, tmp_path: Path, capsys) -> None:
    """Here an old checkpoint that was moved to another disk, with a link in its place."""
    job = build_job("checkpoint.keep_last=1")
    run(job, 0, 1, save_each=1)
    elsewhere = tmp_path / "elsewhere"
    job.checkpoints.path(1).rename(elsewhere)
    job.checkpoints.path(1).symlink_to(elsewhere)
    run(job, 1, 3, save_each=1)
    assert job.checkpoints.steps() == [3]
    assert "cannot be removed" in capsys.readouterr().err
    assert (elsewhere / "trainer.json").is_file()
    assert build_job().resume() == 3


@pytest.mark.parametrize("name", ["step_abc", "step_4", "step_00000004 (copy)", "old", "step_00000009"])
def test_strange_names_are_passed_over_by_name(build_job: BuildJob, interrupted: Job, capsys, name: str) -> None:
    folder = interrupted.checkpoints.folder / name
    shutil.copytree(interrupted.checkpoints.path(4), folder)
    if name == "step_00000009":
        (folder / "trainer.json").unlink()
    assert build_job().resume() == 4
    assert f"are no whole checkpoints: {name}" in capsys.readouterr().err


# Going back


def test_going_back_to_an_earlier_checkpoint_is_the_same_training(build_job: BuildJob, interrupted: Job) -> None:
    job, expected = build_job(), build_job()
    assert job.resume(2) == 2
    run(job, 2, 3)
    run(expected, 0, 3)
    assert_same_state(job, expected)


@pytest.mark.parametrize("step", [0, 3])
def test_going_back_to_a_step_that_has_no_checkpoint_is_an_error_that_lists_them(
    build_job: BuildJob, interrupted: Job, step: int
) -> None:
    with pytest.raises(UserError, match=rf"no checkpoint of step {step}(?s:.*)steps are: 2, 4"):
        build_job().resume(step)
