"""Plans of earlier starts, kept beside the cache: the same training on the same GPUs is simulated once."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import finetune
from finetune.data.cache import digest
from finetune.data.file_facts import content_hash
from finetune.models import code_of
from finetune.models.family import Family
from finetune.models.folder import INDEX
from finetune.planning.plan import Plan
from finetune.recipe import Recipe, recipe_values
from finetune.recipe.prompts import validation_prompts
from finetune.runtime.files import atomic

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "torchao")
_WITHOUT_EFFECT = {
    "output": None,
    "tracking": None,
    "checkpoint": None,
    "distributed": None,
    "model": ("path", "revision"),  # the configs in the folder say what model it is
    "data": (
        *("path", "sources", "area", "frames", "bucket_count"),  # the buckets that are found are in `buckets`
        *("video_column", "caption_column", "id_token", "window", "windows", "overlap", "background"),
        *("bad_clips", "cache", "workers"),
    ),
    "train": ("steps", "seed"),
    "optimizer": ("lr",),
    "memory": ("plan",),
}
"""Tables of a recipe, or keys of them, that change no tensor's size. A key missing here costs a simulation that was not
needed; a key too many here would give a training the plan of another, so in doubt a key counts.
"""


def plan_file(recipe: Recipe, family: Family, arguments: list[str], device: str) -> Path:
    """Where the plan of a training is kept: `<data.cache>/plans/<digest>.json`, of all that it follows from.

    That is the recipe, the configs of the model, the GPUs, the versions of the libraries, and the source of this package and
    of the family: two checkouts may have the same version number.

    Args:
        arguments: of the `plan` command, but for the recipe's path.
        device: name of the GPU.
    Raises:
        OSError: a config or source file cannot be read.
    """
    values = recipe_values(recipe)
    for table, keys in _WITHOUT_EFFECT.items():
        if keys is None:
            values.pop(table, None)
        for key in keys or ():
            values.get(table, {}).pop(key, None)
    prompts = validation_prompts(recipe.validation, recipe.data.sample_shape)  # also those of validation.prompts_file
    folder, package = family.folder.path, Path(finetune.__file__).parent
    configs = [folder / INDEX, *sorted(folder.glob("*/*config.json"))]
    sources = sorted({*package.rglob("*.py"), *code_of(family)})
    key = digest(
        [values, [prompt.model_dump(mode="json") for prompt in prompts]],
        {str(file.relative_to(folder)): content_hash(file) for file in configs},
        {name: importlib.metadata.version(name) for name in _LIBRARIES},
        [content_hash(file) for file in sources],
        [arguments, device],
    )
    return recipe.data.cache / "plans" / f"{key}.json"


def read_plan(file: Path) -> Plan | None:
    """The plan that was kept; None if there is none. A damaged file counts as none, and is written anew."""
    try:
        return parse_plan(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def parse_plan(text: str) -> Plan:
    """The plan that `plan --json` has printed. Raises ValueError for any other text."""
    try:
        return Plan.from_json(json.loads(text))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the figures of a plan ({error!r})") from None


def keep_plan(file: Path, plan: Plan) -> None:
    """Keep a plan for the next start; a few KiB. Raises UserError if it cannot be written."""
    figures: dict[str, Any] = plan.as_json()
    with atomic(file) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
