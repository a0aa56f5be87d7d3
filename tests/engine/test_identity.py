"""A run is resumed wherever its clips and its model lie, and not with others: they are known by their content."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.data.synthetic import RECORDINGS, write_clips
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import Job
from finetune.training.run import train


class Place:
    """Clips and a model of a run's own, and its job. The folders may be moved."""

    def __init__(self, clips: Path, model: Path, build_job: Callable[..., Job]) -> None:
        self.clips, self.model, self._build = clips, model, build_job

    def job(self) -> Job:
        return self._build(f"data.path={self.clips}", f"model.path={self.model}")

    @property
    def weights(self) -> Path:
        (file,) = (self.model / "transformer").glob("*.safetensors")
        return file

    def move(self, to: Path) -> None:
        to.mkdir()
        self.clips, self.model = self.clips.rename(to / "clips"), self.model.rename(to / "model")

    def forget(self, step: int, *names: str) -> None:
        """Make a checkpoint what older versions wrote."""
        path = self.job().checkpoints.path(step) / "trainer.json"
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in facts.items() if name not in names}))


@pytest.fixture
def saved(build_job, clips: Path, tiny_ltx: Path, tmp_path: Path) -> Place:
    """A run with a checkpoint of step 1."""
    place = Place(Path(shutil.copytree(clips, tmp_path / "clips")), tmp_path / "model", build_job)
    shutil.copytree(tiny_ltx, place.model)
    place.job().save(1)
    return place


def change_last_byte(file: Path) -> None:
    """As other weights of the same architecture would: with the same header and the same size."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_run_is_resumed_where_clips_and_model_have_moved(saved: Place, tmp_path: Path) -> None:
    saved.move(tmp_path / "elsewhere")
    assert saved.job().resume() == 1


def test_base_weights_replaced_by_others_of_the_same_size_are_refused(saved: Place) -> None:
    change_last_byte(saved.weights)
    with pytest.raises(UserError, match=r"the weights in model.path are not those that the checkpoint of step 1"):
        saved.job().resume()


def test_another_config_of_the_transformer_is_refused(saved: Place) -> None:
    path = saved.model / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"weights in model.path"):
        saved.job().resume()


def test_another_scheduler_is_refused_and_the_version_that_saved_it_does_not_count(saved: Place) -> None:
    path = saved.model / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "_diffusers_version": "0.1"}))
    assert saved.job().resume() == 1
    path.write_text(json.dumps({**settings, "shift": 7.5}))
    with pytest.raises(UserError, match=r"weights in model.path"):
        saved.job().resume()


def test_weights_that_were_touched_and_not_changed_are_the_same(saved: Place) -> None:
    os.utime(saved.weights, (1, 1))
    assert saved.job().resume() == 1


def test_a_checkpoint_of_an_older_version_is_resumed_and_says_what_was_not_compared(
    saved: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.forget(1, "base_content", "clip_list")
    change_last_byte(saved.weights)
    job = saved.job()
    assert job.resume() == 1
    assert "that their content is the same could not be compared" in capsys.readouterr().err
    job.save(2)
    capsys.readouterr()
    assert saved.job().resume() == 2
    assert "could not be compared" not in capsys.readouterr().err


def test_weights_of_the_hubs_cache_are_compared_by_name_in_older_checkpoints(
    build_job, clips: Path, tiny_ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(clips, tmp_path / "snapshots" / "main", build_job)
    shutil.copytree(tiny_ltx, place.model)
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    file = place.weights
    file.rename(blob)
    file.symlink_to(blob)
    place.job().save(1)
    place.forget(1, "base_content", "clip_list")
    assert place.job().resume() == 1
    assert "could not be compared" not in capsys.readouterr().err


def test_older_checkpoints_that_lack_more_are_refused(saved: Place) -> None:
    saved.forget(1, "base")
    with pytest.raises(UserError, match=r"trainer.json of the checkpoint of step 1 lacks base"):
        saved.job().resume()


@pytest.mark.parametrize("lacks, told", [((), ": 2 are new and 12 are gone"), (("clip_list", "base_content"), "")])
def test_other_clips_are_refused_before_they_are_encoded(
    saved: Place, runtime: Runtime, tmp_path: Path, lacks: tuple[str, ...], told: str
) -> None:
    """Their encoding may take hours; all that a training writes is its memory of files. Older checkpoints list no clips."""
    saved.forget(1, *lacks)
    write_clips(tmp_path / "others", RECORDINGS[4:6])
    recipe = saved.job().recipe
    (recipe.output / "checkpoints" / "step_00000009").mkdir()  # not whole: it has no trainer.json
    data = recipe.data.model_copy(update={"path": tmp_path / "others", "cache": tmp_path / "cache"})
    with pytest.raises(UserError, match=rf"clips or captions are not those .* trained with{told}"):
        train(recipe.model_copy(update={"data": data}), runtime)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda clips: (clips / "wide.txt").write_text("something else\n"), "1 are new and 1 are gone"),
        (lambda clips: (clips / "wide.mp4").unlink() or (clips / "wide.txt").unlink(), "0 are new and 1 are gone"),
        (
            lambda clips: [(clips / f"wide{end}").rename(clips / f"aaa{end}") for end in (".mp4", ".txt")],
            "another order",
        ),
    ],
    ids=["changed", "removed", "order"],
)
def test_other_clips_are_refused_with_how_many_differ(saved: Place, change: Callable, told: str) -> None:
    change(saved.clips)
    with pytest.raises(UserError, match=rf"clips or captions are not those .* step 1 was trained with: .*{told}"):
        saved.job().resume()
