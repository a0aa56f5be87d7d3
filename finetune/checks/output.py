"""The output folder: whether it may hold this run, and whether there is room."""

import os
import shutil

from finetune.recipe import RECIPE_FILE, Recipe, load_recipe
from finetune.recipe.load import differences
from finetune.runtime.errors import UserError
from finetune.runtime.files import FULL


def check_output(recipe: Recipe) -> None:
    """Refuse a folder that holds another training, that cannot be written, or whose disk has no room.

    Raises as `check_same_run`.
    """
    check_same_run(recipe)
    folder = recipe.output
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
        raise UserError(FULL, "free some space, or set `output` to another disk", str(recipe.output))


def check_same_run(recipe: Recipe) -> None:
    """Refuse a folder that holds another training.

    Raises:
        UserError: names the keys that differ.
    """
    saved = recipe.output / RECIPE_FILE
    trained = any((recipe.output / "checkpoints").glob("step_*/trainer.json"))  # else there is nothing to go on from
    if saved.exists() and trained:
        changed = differences(recipe, load_recipe(saved))
        if changed:
            raise UserError(
                "this folder holds a run of another recipe: " + "; ".join(changed[:6]),
                "set `output` to a new folder, or put the keys back to resume",
                str(recipe.output),
            )
