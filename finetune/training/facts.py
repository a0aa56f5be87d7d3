"""What exported weights say of themselves in their metadata: which base model, which training, which licence."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import finetune
from finetune.models.family import Family
from finetune.models.folder import CARD
from finetune.recipe import Recipe
from finetune.recipe.load import fixed_values, flat_values
from finetune.recipe.schema import Model

TOOL = f"finetune {finetune.__version__}"
_KEPT = ("step", "recipe_sha256", "trigger_word", "trained_alpha", "trained_rank")
_TUNED = ("optimizer", "schedule", "train")  # tables whose free keys the weights depend on, too


def facts_of(recipe: Recipe, family: Family, step: int, adapters: str | None) -> dict[str, str]:
    """The metadata of weights that a recipe has trained for so many steps. No paths of this machine are in it.

    Args:
        adapters: see `recipe_digest`.
    """
    training = {"step": str(step), "recipe_sha256": recipe_digest(recipe, adapters), **_trigger(recipe)}
    return {"tool": TOOL, **base_facts(recipe.model, family), **training}


def facts_of_converted(model: Model, family: Family, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a LoRA that was read from a file: of what that said, what this project says; and the base model."""
    kept = {name: metadata[name] for name in _KEPT if name in metadata}
    return {**kept, "tool": TOOL, **base_facts(model, family)}


def base_facts(model: Model, family: Family) -> dict[str, str]:
    """The base model: its id and commit on the Hub, or its folder's name; and its licence, if its card says it."""
    folder = family.folder.path.resolve()
    base = base_model_of(model, family)
    facts = {"base_model": base or folder.name}
    if base is not None and folder.parent.name == "snapshots":
        facts["base_revision"] = folder.name
    elif base == model.path:
        facts["base_revision"] = model.revision
    return {**facts, "family": family.name, **licence(folder)}


def base_model_of(model: Model, family: Family) -> str | None:
    """The base model's id on the Hub: that of the recipe, or of the folder in the Hub's cache; None of any other folder."""
    folder = family.folder.path.resolve()
    for part in (folder, *folder.parents):
        if part.name.startswith("models--") and part.name.count("--") == 2:
            return part.name.removeprefix("models--").replace("--", "/")
    return None if Path(model.path).expanduser().is_dir() else model.path


def licence(folder: Path) -> dict[str, str]:
    """The licence that a model's card names at its head; nothing if there is no card, or none in it."""
    head = head_of_card(folder)
    named = [str(head[key]) for key in ("license_name", "license") if head.get(key)]
    return {"base_license": named[0]} if named else {}


def head_of_card(folder: Path) -> dict[str, Any]:
    """The values at the head of a model's card; none if there is no card, or any text in its place."""
    from huggingface_hub import metadata_load

    try:
        head: Any = metadata_load(folder / CARD)
    except Exception:  # none of it is worth an export
        return {}
    return head if isinstance(head, dict) else {}


def recipe_digest(recipe: Recipe, adapters: str | None) -> str:
    """SHA-256 of the settings that the weights depend on, the same wherever clips, model, adapters and output lie.

    Args:
        adapters: what tells the adapters that the training was given from others; None if there are none.
    """
    tuned = {key: value for key, value in flat_values(recipe).items() if key.partition(".")[0] in _TUNED}
    is_average = recipe.ema.decay is not None and "export" in recipe.ema.use
    kept = {**fixed_values(recipe), **tuned, "adapters": adapters, "is_average": is_average}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def trigger_words(recipe: Recipe) -> list[str]:
    """The words that stand in front of all captions, or of those of some datasets."""
    words = [recipe.data.reading(source)["id_token"] for source in recipe.data.datasets]
    return list(dict.fromkeys(filter(None, words)))


def _trigger(recipe: Recipe) -> dict[str, str]:
    found = ", ".join(trigger_words(recipe))
    return {"trigger_word": found} if found else {}
