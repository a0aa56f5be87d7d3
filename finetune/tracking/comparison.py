"""A table of runs by their held-out losses: at the start and at the end, at the noise levels that were trained and at the others.

With Wan 2.2's experts it answers whether one or both are to be trained, and over which range: an expert that was trained is
worth its steps where its loss fell, and spoils the other range if it is used there and its loss rose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from finetune.recipe import RECIPE_FILE, Recipe, load_recipe
from finetune.recipe.schema import ExpertName
from finetune.runtime.errors import UserError
from finetune.tracking.metrics import METRICS_FILE, read_metrics

_COLUMNS = ("run", "noise levels", "steps", "inside", "", "outside", "")
_INSIDE, _OUTSIDE = "heldout_loss", "heldout_loss_outside"


@dataclass(frozen=True)
class _Run:
    """The held-out losses of a run: (step, loss) in the order of steps, inside and outside of the trained noise levels."""

    folder: Path
    levels: str
    inside: list[tuple[int, float]]
    outside: list[tuple[int, float]]


def comparison(folders: Sequence[Path]) -> list[str]:
    """The lines of the table.

    Args:
        folders: of runs; those of the experts in them are found.
    Raises:
        UserError: a folder has no run, or a run has no held-out losses.
    """
    runs = [_read(folder) for given in folders for folder in _run_folders(given)]
    rows = [_COLUMNS, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [
        *lines,
        "",
        "Held-out loss at the first and at the last measurement, and how it changed. `inside` is of the noise levels that",
        "a run trains, `outside` of all others: compare runs of the same held-out clips, noise levels and steps.",
    ]


def _run_folders(given: Path) -> list[Path]:
    found = [folder for folder in (given, *(given / name for name in get_args(ExpertName))) if _is_run(folder)]
    if not found:
        raise UserError(f"there is no {METRICS_FILE} in it", "give the `output` of a run", str(given))
    return found


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file()


def _read(folder: Path) -> _Run:
    rows = read_metrics(folder / METRICS_FILE)
    inside, outside = ([(row["step"], row[name]) for row in rows if name in row] for name in (_INSIDE, _OUTSIDE))
    if not inside:
        cure = "set validation.heldout_clips, or validation.heldout to a dataset, and train again"
        raise UserError("the run has measured no held-out loss", cure, str(folder))
    saved = folder / RECIPE_FILE
    return _Run(folder, _levels(load_recipe(saved)) if saved.is_file() else "?", sorted(inside), sorted(outside))


def _levels(recipe: Recipe) -> str:
    """The noise levels that a run trained, in words."""
    if recipe.objective.sigma_range:
        low, high = recipe.objective.sigma_range
        return f"{low:g} to {high:g}"
    return f"{recipe.model.experts[0]}-noise expert's" if recipe.model.experts else "all"


def _row(run: _Run) -> tuple[str, ...]:
    return (str(run.folder), run.levels, str(run.inside[-1][0]), *_change(run.inside), *_change(run.outside))


def _change(losses: list[tuple[int, float]]) -> tuple[str, str]:
    """(first and last loss, relative change); empty without any."""
    if not losses:
        return "", ""
    first, last = losses[0][1], losses[-1][1]
    return f"{first:.4f} -> {last:.4f}", f"{last / first - 1:+.1%}"
