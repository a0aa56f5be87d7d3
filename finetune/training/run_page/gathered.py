"""What a run's folder tells of the run, whether it is under way, was cut off or is finished; nothing else is read."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from finetune.checks.output import read_saved
from finetune.recipe import RECIPE_FILE, Recipe, load_recipe
from finetune.recipe.load import flat_values
from finetune.recipe.schema import ExpertName
from finetune.runtime.errors import UserError
from finetune.runtime.files import is_held, read_note
from finetune.tracking.metrics import METRICS_FILE, read_metrics
from finetune.training.memory import MEMORY_FILE
from finetune.training.output import RESULTS, STARTS, ended_at
from finetune.training.start_note import SCRIPT_FILE

_KINDS: dict[str, type] = {  # what a note holds, as far as the page relies on it
    "devices": list,
    "datasets": list,
    "versions": dict,
    "model": dict,
    "batch": dict,
    "measured": dict,
    "planned": dict,
    "relative_error": dict,
    "buckets": dict,
    "refused": list,
    "unused": list,
}
_START = re.compile(r"after_step_(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class RunStart:
    """One start of a run.

    Attributes:
        step: the step after which it started.
        note: what the start noted of itself, see `start_note`; empty of an older version's.
        changes: what it changed in the recipe of the start before, as text.
    """

    step: int
    note: dict[str, Any]
    changes: list[str]


@dataclass(frozen=True)
class RunPart:
    """The training of one transformer: all of a run, or one of its experts.

    Attributes:
        expert: its name; None of a run without experts.
        rows: of metrics.jsonl.
        memory: of memory.json; empty on a CPU, and until the last step.
        script: the lines that use the result; empty if there are none yet.
    """

    folder: Path
    expert: str | None
    recipe: Recipe
    rows: list[dict[str, Any]]
    starts: list[RunStart] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    script: str = ""
    is_running: bool = False

    @property
    def step(self) -> int:
        """The last step that it has reported, 0 if there is none."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def steps(self) -> int:
        return ended_at(self.recipe)

    @property
    def is_finished(self) -> bool:
        return read_note(self.folder / RESULTS).get("step") == self.steps

    @property
    def note(self) -> dict[str, Any]:
        """What the newest start noted of itself."""
        return next((start.note for start in reversed(self.starts) if start.note), {})


def gather(run: Path, is_running: bool | None = None) -> list[RunPart]:
    """What is known of a run: one part, or one for each expert that has begun, in the order in which they denoise.

    Args:
        run: the run's output folder, or that of one of its experts.
        is_running: whether the caller is the run itself, or knows; None asks the folder's lock.
    Raises:
        UserError: there is no run in the folder, or its recipe or metrics are damaged.
    """
    experts = [name for name in get_args(ExpertName) if (run / name / RECIPE_FILE).is_file()]
    if experts:
        return [_part(run / name, is_running) for name in experts]
    if not (run / RECIPE_FILE).is_file():
        what = "there is no such folder" if not run.is_dir() else f"there is no {RECIPE_FILE} of a run in it"
        raise UserError(what, "give the run's output folder: the recipe's `output`", str(run))
    return [_part(run, is_running)]


def _part(folder: Path, is_running: bool | None) -> RunPart:
    recipe = read_saved(folder / RECIPE_FILE)
    named = recipe.model.experts or []
    is_expert = len(named) == 1 and folder.absolute().name == named[0]
    output = folder.absolute().parent if is_expert else folder  # wherever it lies now
    metrics = folder / METRICS_FILE
    script = folder / SCRIPT_FILE
    return RunPart(
        folder,
        named[0] if is_expert else None,
        recipe.model_copy(update={"output": output}),
        read_metrics(metrics) if metrics.is_file() else [],
        _starts(folder / STARTS),
        _json(folder / MEMORY_FILE),
        script.read_text(encoding="utf-8", errors="replace") if script.is_file() else "",
        is_held(folder) if is_running is None else is_running,
    )


def _starts(folder: Path) -> list[RunStart]:
    """The starts in their order. One whose recipe cannot be read any more has no changes to tell."""
    numbered = [(match, path) for path in folder.glob("*.toml") if (match := _START.fullmatch(path.stem))]
    # Going back makes a start of fewer steps the later one, so time decides, if it is noted.
    found = []
    for match, path in numbered:
        note = _json(path.with_suffix(".json"))
        order = (str(note.get("time", "")), int(match[1]), int(match[2] or 1))
        found.append((order, int(match[1]), path, note))
    starts, before = [], None
    for _, step, path, note in sorted(found, key=lambda each: each[0]):
        try:
            recipe = load_recipe(path)
        except UserError:
            recipe = None
        told: list[str] = _changes(recipe, before) if recipe and before else []
        starts.append(RunStart(step, note, told))
        before = recipe or before
    return starts


def _changes(recipe: Recipe, before: Recipe) -> list[str]:
    new, old = flat_values(recipe), flat_values(before)
    keys = [key for key in (*old, *(key for key in new if key not in old)) if new.get(key) != old.get(key)]
    return [f"{key}: {old.get(key, 'not set')} → {new.get(key, 'not set')}" for key in keys]


def _json(path: Path) -> dict[str, Any]:
    """An object in a file, without what is not as it was written; empty if there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return _sound(found) if isinstance(found, dict) else {}


def _sound(note: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in note.items():
        if isinstance(value, _KINDS.get(key, object)):
            kept[key] = [_sound(each) for each in value if isinstance(each, dict)] if isinstance(value, list) else value
    return kept
