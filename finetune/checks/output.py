"""The output folder: whether it may hold this run, and whether there is room."""

import os
import shutil
from pathlib import Path

from finetune.recipe import RECIPE_FILE, Recipe, load_recipe
from finetune.recipe.load import differences
from finetune.runtime.errors import UserError
from finetune.runtime.files import FULL


def check_output(recipe: Recipe) -> None:
    """Refuse a folder that holds another training, that cannot be written, or whose disk has no room.

    Raises as `check_same_run`.
    """
    check_same_run(recipe)
    folder = recipe.run_folder
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError("this is a file, and the run needs a folder", "set `output` to a folder", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            "cannot be written",
            "check its permissions, and whether its disk is mounted read-only; or set `output` to another folder",
            str(folder),
        )
    if shutil.disk_usage(folder).free < 2**20:
        raise UserError(FULL, "free some space, or set `output` to another disk", str(recipe.run_folder))


def check_same_run(recipe: Recipe) -> None:
    """Refuse a folder that holds another training.

    Raises:
        UserError: names the keys that differ.
    """
    saved = recipe.run_folder / RECIPE_FILE
    if saved.exists() and has_checkpoints(recipe):  # else there is nothing to go on from
        changed = differences(recipe, read_saved(saved))
        if changed:
            raise UserError(
                "this folder holds a run of another recipe: " + "; ".join(changed[:6]),
                "set `output` to a new folder, or put the keys back to resume",
                str(recipe.run_folder),
            )


def has_checkpoints(recipe: Recipe) -> bool:
    """Whether the output folder has checkpoints of a run."""
    return any((recipe.run_folder / "checkpoints").glob("step_*/trainer.json"))


def read_saved(saved: Path) -> Recipe:
    """The recipe that a run keeps of itself. Raises UserError if it is damaged."""
    try:
        return load_recipe(saved)
    except UserError as error:
        what = f"the run's own copy of its recipe is damaged ({error.problems[0].what})"
        cure = "put the newest .toml of starts/ in its place; or remove it, if the recipe has not changed since"
        raise UserError(what, cure, str(saved)) from error
