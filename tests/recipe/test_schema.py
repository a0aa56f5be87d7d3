"""The schema: documented key by key, published for editors, and light to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


def test_every_recipe_of_the_folder_is_tested() -> None:
    listed = [name for _, _, names in os.walk(ROOT / "recipes") for name in names if name.endswith(".toml")]
    assert len(RECIPES) == len(listed) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path: Path) -> None:
    assert load_recipe(path).data.buckets


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_points_editors_to_the_schema(path: Path) -> None:
    directive, schema = path.read_text().splitlines()[0].split()
    assert directive == "#:schema"
    assert (path.parent / schema).resolve() == ROOT / "recipes" / "recipe.schema.json"


def test_published_schema_is_current(capsys: pytest.CaptureFixture) -> None:
    assert main(["schema"]) == 0
    published = (ROOT / "recipes" / "recipe.schema.json").read_text()
    assert json.loads(published) == json.loads(capsys.readouterr().out) == Recipe.model_json_schema()


def test_every_key_is_documented() -> None:
    schema = Recipe.model_json_schema()
    tables = {"Recipe": schema, **schema["$defs"]}
    kinds = schema["properties"]["optimizer"]["anyOf"]
    assert len(kinds) >= 2
    tables |= {f"optimizer {kind['title']}": kind for kind in kinds}
    bare = [
        f"{table}.{key}"
        for table, definition in tables.items()
        for key, field in definition["properties"].items()
        if not field.get("description", "").strip().endswith((".", '"none" does not clip.'))
    ]
    assert bare == []


def test_a_recipe_cannot_be_changed_after_it_is_read() -> None:
    recipe = load_recipe(RECIPES[0])
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'av'}"
    code = f"import sys, finetune.cli, finetune.recipe as r; r.load_recipe({str(RECIPES[0])!r}); print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"
