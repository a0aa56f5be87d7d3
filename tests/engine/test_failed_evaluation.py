"""An evaluation that fails on all ranks does not cost the steps since the last checkpoint; a lost rank cannot save."""

from pathlib import Path

import pytest

from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, UserError
from finetune.training.job import Job
from finetune.training.run import train


@pytest.mark.parametrize("error, saved", [(UserError("the clip is gone"), True), (LostPeer("rank 1 is gone"), False)])
def test_what_is_saved_when_an_evaluation_fails(
    recipe_file: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, error: UserError, saved: bool
) -> None:
    measured = []

    def fails_after_a_step(job: Job) -> None:
        measured.append(job)
        if len(measured) > 1:
            raise error

    monkeypatch.setattr(Job, "heldout_loss", fails_after_a_step)
    recipe = load_recipe(recipe_file, ["validation.every=1", "validation.heldout_clips=1"])
    with pytest.raises(UserError, match="is gone"):
        train(recipe, runtime)
    assert [path.name for path in recipe.run_folder.glob("checkpoints/step_*")] == ["step_00000001"] * saved
