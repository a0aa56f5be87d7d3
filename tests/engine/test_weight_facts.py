"""What exported weights say of themselves: a digest of the recipe, and the base model."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from given_adapters import write_adapter
from huggingface_hub import scan_cache_dir
from pydantic import BaseModel

from finetune.checks.model import find_family
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.schema import Model, free_keys
from finetune.training.facts import base_facts, base_model_of, recipe_digest
from finetune.training.job import Job

OTHER = "another value"  # of whatever type: nothing reads it but the digest


def changed(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Each key of each table with a recipe in which it alone differs."""
    for table in type(recipe).model_fields:
        settings = getattr(recipe, table)
        if isinstance(settings, BaseModel):
            for key in type(settings).model_fields:
                yield f"{table}.{key}", recipe.model_copy(update={table: settings.model_copy(update={key: OTHER})})


def digest(recipe: Recipe, adapters: str | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, of the type
        return recipe_digest(recipe, adapters)


def test_every_key_that_may_not_change_is_in_the_digest_and_places_are_not(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    alike = {key for key, other in changed(recipe) if digest(other) == digest(recipe)}
    assert alike <= free_keys()
    assert {"model.path", "data.path", "data.cache", "lora.start_from", "memory.offload"} <= alike
    assert alike.isdisjoint({"partial.modules", "ema.decay", "optimizer.lr", "train.steps"})


def test_whether_an_average_is_exported_is_in_the_digest(recipe_file: Path) -> None:
    used, unused = (load_recipe(recipe_file, ["ema.decay=0.9", f"ema.use={use}"]) for use in ("export", "samples"))
    assert digest(used) != digest(unused)


@pytest.mark.parametrize("key", ["lora.start_from={}", 'lora.frozen=[{{path = "{}"}}]'])
def test_an_adapters_content_is_in_the_digest_and_its_place_is_not(
    build_job: Callable[..., Job], tmp_path: Path, key: str
) -> None:
    def found() -> str:
        return build_job(key.format(file)).details(1).facts["recipe_sha256"]

    file = write_adapter(tmp_path / "one.safetensors", build_job().state.family)
    first = found()
    file = file.rename(tmp_path / "moved.safetensors")
    assert found() == first
    write_adapter(file, build_job().state.family, seed=3)
    assert found() != first


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_folder_in_the_hubs_cache_is_named_as_the_hub_names_it(
    tiny_ltx: Path, tmp_path: Path, is_linked: bool
) -> None:
    commit = "ab" * 20
    folder = tmp_path / "hub" / "models--Lightricks--LTX-Video" / "snapshots" / commit
    shutil.copytree(tiny_ltx, folder)
    (known,) = scan_cache_dir(tmp_path / "hub").repos
    path = folder
    if is_linked:
        path = tmp_path / "ltx"
        path.symlink_to(folder)
    model = Model(family="ltx", path=str(path))
    family = find_family(model)
    assert base_model_of(model, family) == known.repo_id
    facts = base_facts(model, family)
    assert (facts["base_model"], facts["base_revision"]) == (known.repo_id, commit)


def test_a_folder_elsewhere_is_named_by_its_own_name_alone(tiny_ltx: Path) -> None:
    model = Model(family="ltx", path=str(tiny_ltx))
    facts = base_facts(model, find_family(model))
    assert facts["base_model"] == tiny_ltx.name
    assert "base_revision" not in facts
