"""The schema: documented key by key, published for editors, and light to import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.commands.schema import key_tables, recipe_schema
from finetune.models import FAMILIES, family_class
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.choices import FAMILY_TITLES
from finetune.recipe.schema import Lora
from finetune.recipe.values import family_name
from finetune.runtime.errors import UserError

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
    assert json.loads(published) == json.loads(capsys.readouterr().out) == recipe_schema()


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


def test_every_word_that_a_key_may_be_is_described() -> None:
    """Where an editor looks: beside `enum`, or in the description of a lone word, as optimizers' names are."""
    bare: list[str] = []

    def walk(entry: Any, where: str) -> None:
        if isinstance(entry, list):
            for number, each in enumerate(entry):
                walk(each, f"{where}/{number}")
        if not isinstance(entry, dict):
            return
        if "enum" in entry and not where.endswith("/propertyNames"):
            told = entry.get("enumDescriptions", [])
            if len(told) != len(entry["enum"]) or not all(told) or entry["x-taplo"]["docs"]["enumValues"] != told:
                bare.append(where)
        if "const" in entry and not entry.get("description"):
            bare.append(where)
        for key, each in entry.items():
            walk(each, f"{where}/{key}")

    walk(recipe_schema(), "")
    assert bare == []


def test_the_tables_say_of_words_what_the_schema_says() -> None:
    (row,) = [line for line in key_tables() if line.startswith("| `low_bit`")]
    entry = recipe_schema()["$defs"]["Memory"]["properties"]["low_bit"]
    for word, means in zip(entry["enum"], entry["enumDescriptions"], strict=True):
        assert f"`{word}`: {means}" in row


def test_families_are_called_as_their_classes_are() -> None:
    assert list(FAMILY_TITLES) == list(FAMILIES)
    for name, title in FAMILY_TITLES.items():
        assert title.startswith(family_class(name).title)


def test_a_recipe_cannot_be_changed_after_it_is_read() -> None:
    recipe = load_recipe(RECIPES[0])
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'av'}"
    code = f"import sys, finetune.cli, finetune.recipe as r; r.load_recipe({str(RECIPES[0])!r}); print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"


def test_editors_are_offered_families_and_prompts_as_text() -> None:
    schema = recipe_schema()
    named, others, own = schema["$defs"]["Model"]["properties"]["family"]["anyOf"]
    assert named["enum"] == list(FAMILIES)
    assert {family_name(name) for name in others["enum"]} <= set(FAMILIES)
    assert re.match(own["pattern"], "my_models.mine:Mine")
    kinds = [each["type"] for each in schema["$defs"]["Validation"]["properties"]["prompts"]["anyOf"]]
    assert kinds == ["array", "string"]
    assert {*schema["properties"]} == {*Recipe.model_json_schema()["properties"]}


@pytest.mark.parametrize(
    "name, family",
    [("ltx_video", "ltx"), ("Hunyuan-Video", "hunyuan"), ("wan2.1", "wan"), ("mochi", "mochi"), ("x.y:Z", "x.y:Z")],
)
def test_other_names_of_families_are_known(name: str, family: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / "ltx_lora.toml", [f'model.family="{name}"'])
    assert recipe.model.family == family


@pytest.mark.parametrize("name, near", [("hunyuann", "hunyuan"), ("ltx_i2", "ltx"), ("wan_i2vv", "wan_i2v")])
def test_the_nearest_family_is_of_the_same_kind(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        family_class(name)


def test_alpha_is_the_rank_where_it_is_not_said() -> None:
    assert Lora.model_validate({"rank": 4}).alpha == 4
    assert Lora.model_validate({}).alpha == Lora.model_validate({}).rank == 64
    assert Lora.model_validate({"rank": 4, "alpha": 2}).alpha == 2
