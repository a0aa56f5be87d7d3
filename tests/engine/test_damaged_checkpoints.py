"""A checkpoint that is damaged is named and passed over, and one that holds code runs none; the user may go back by choice."""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpointing import assert_same_state, run

from finetune.runtime.errors import UserError
from finetune.training.job import Job

BuildJob = Callable[..., Job]


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


def test_where_all_are_damaged_one_whose_state_is_whole_is_taken(build_job: BuildJob, interrupted: Job, capsys) -> None:
    flip(interrupted.checkpoints.path(4) / FILES[0])
    flip(interrupted.checkpoints.path(2) / FILES[2])
    assert build_job("checkpoint.keep_last=all").resume() == 2
    assert "what is damaged is only the adapter that was exported with it" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "name", ["step_abc", "step_4", "step_00000004 (copy)", "old", "step_00000009", "step_000000004"]
)
def test_strange_names_are_passed_over_by_name(build_job: BuildJob, interrupted: Job, capsys, name: str) -> None:
    folder = interrupted.checkpoints.folder / name
    shutil.copytree(interrupted.checkpoints.path(4), folder)
    if name == "step_00000009":
        (folder / "trainer.json").unlink()
    assert build_job().resume() == 4
    assert f"are no whole checkpoints: {name}" in capsys.readouterr().err


def test_facts_that_are_lacking_are_named(build_job: BuildJob, interrupted: Job) -> None:
    (interrupted.checkpoints.path(4) / "trainer.json").write_text('{"step": 4}')
    with pytest.raises(UserError, match=r"trainer.json of the checkpoint of step 4 lacks base, clips"):
        build_job("checkpoint.verify=false").resume()


# Going back


def test_a_checkpoint_that_was_set_aside_is_said_to_be_there(build_job: BuildJob, interrupted: Job) -> None:
    interrupted.checkpoints.set_aside_after(2)
    with pytest.raises(UserError, match=r"that of step 4 was set aside: move .*step_00000004 back"):
        build_job().resume(4)


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
