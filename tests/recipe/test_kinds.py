"""A table of several kinds, [optimizer]: the kind that its `name` says reads it, and messages are about that kind."""

from pathlib import Path
from typing import Literal

import pytest
from processes import ROOT

from finetune.recipe import Recipe, load_recipe, recipe_values, write_recipe
from finetune.recipe.load import differences
from finetune.recipe.optimizers import OPTIMIZERS, AdamW, LowBitAdamW, Optimizer
from finetune.recipe.schema import free_keys
from finetune.recipe.table import Free
from finetune.runtime.errors import Problem, UserError

QUICKSTART = ROOT / "recipes" / "quickstart.toml"


class Swing(Optimizer):
    name: Literal["swing", "swing_2"]
    sway: float = 1e-6
    """The first guess."""
    patience: int = Free(3)
    """Steps to wait."""


@pytest.fixture(autouse=True)
def swing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third kind, with keys of its own, and without AdamW's."""
    for name in ("swing", "swing_2"):
        monkeypatch.setitem(OPTIMIZERS, name, Swing)


def problem(*overrides: str) -> Problem:
    with pytest.raises(UserError) as caught:
        load_recipe(QUICKSTART, overrides)
    (found,) = caught.value.problems
    return found


@pytest.mark.parametrize(
    "name, kind",
    [(None, AdamW), ("adamw", AdamW), ("adamw_8bit", LowBitAdamW), ("adamw_fp8", LowBitAdamW), ("swing_2", Swing)],
)
def test_the_name_says_which_kind_reads_the_table(name: str | None, kind: type[Optimizer]) -> None:
    recipe = load_recipe(QUICKSTART, [f"optimizer.name={name}"] if name else [])
    assert type(recipe.optimizer) is kind
    assert recipe.optimizer.lr == 5e-3
    assert recipe.optimizer.name == (name or "adamw")


def test_an_unknown_name_lists_all() -> None:
    found = problem("optimizer.name=adam")
    names = "'adamw', 'adamw_8bit', 'adamw_4bit', 'adamw_fp8', 'adamw_bf16', 'lion', 'adafactor', 'prodigy', "
    names += "'schedule_free_adamw', 'muon', 'swing' or 'swing_2'"
    assert found.what == f"optimizer.name = 'adam': should be {names}"
    assert found.where == "--set optimizer.name=adam"


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(QUICKSTART.read_text().replace("lr = 5e-3", "name = 3"))
    with pytest.raises(UserError, match=r"optimizer.name = 3: should be 'adamw'"):
        load_recipe(path)


def test_a_key_of_another_kind_names_that_kind() -> None:
    found = problem("optimizer.sway=1")
    assert found.what == "unknown key 'optimizer.sway'"
    assert found.cure == "it is a key of optimizer.name = 'swing' or 'swing_2': set that, or remove the key"
    found = problem("optimizer.name=swing", "optimizer.eps=1e-6")
    assert found.what == "unknown key 'optimizer.eps'"
    names = "'adamw' or 'adamw_8bit' or 'adamw_4bit' or 'adamw_fp8' or 'adamw_bf16' or 'prodigy' "
    names += "or 'schedule_free_adamw' or 'muon'"
    assert found.cure == f"it is a key of optimizer.name = {names}: set that, or remove the key"


@pytest.mark.parametrize(
    "name, key, cure",
    [
        ("swing", "patiense", "did you mean 'optimizer.patience'?"),
        ("adamw", "epz", "did you mean 'optimizer.eps'?"),
        ("swing", "steps", "did you mean 'train.steps'?"),
        ("swing", "banana", "keys here are: name, lr, offload, in_backward, sway, patience"),
        ("adamw_8bit", "banana", "keys here are: name, lr, offload, in_backward, betas, eps, weight_decay"),
    ],
)
def test_a_key_of_no_kind_is_looked_for_in_the_kind_that_reads(name: str, key: str, cure: str) -> None:
    assert problem(f"optimizer.name={name}", f"optimizer.{key}=1").cure == cure


def test_a_wrong_value_is_told_with_its_line_and_the_keys_description(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(QUICKSTART.read_text().replace("lr = 5e-3", 'name = "swing"\nsway = "small"'))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    (found,) = caught.value.problems
    line = path.read_text().splitlines().index('sway = "small"') + 1
    assert found == Problem(
        "optimizer.sway = 'small': should be a valid number", f"{path}, line {line}", "The first guess."
    )


def test_what_is_no_table_is_refused() -> None:
    assert problem("optimizer=3").what == "optimizer = 3: should be a table"


@pytest.mark.parametrize("order", [1, -1])
def test_set_reads_a_value_as_the_kind_wants_it_in_any_order(order: int) -> None:
    recipe = load_recipe(QUICKSTART, ["optimizer.name=swing", "optimizer.sway=1"][::order])
    assert isinstance(recipe.optimizer, Swing)
    assert recipe.optimizer.sway == 1.0
    assert load_recipe(QUICKSTART, ["optimizer.betas=0.8,0.9"]).optimizer == AdamW(lr=5e-3, betas=[0.8, 0.9])


def test_a_written_recipe_has_the_keys_of_its_kind(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART, ["optimizer.name=swing", "optimizer.sway=0.5"])
    values = {"name": "swing", "lr": 5e-3, "offload": "none", "in_backward": False, "sway": 0.5, "patience": 3}
    assert recipe_values(recipe)["optimizer"] == values
    write_recipe(recipe, tmp_path / "written.toml")
    assert load_recipe(tmp_path / "written.toml") == recipe


def test_free_keys_are_those_of_every_kind() -> None:
    assert "optimizer.patience" in free_keys()
    ours, theirs = (load_recipe(QUICKSTART, ["optimizer.name=swing", f"optimizer.patience={n}"]) for n in (3, 4))
    assert differences(ours, theirs) == []


def test_another_kind_is_another_training() -> None:
    told = differences(load_recipe(QUICKSTART, ["optimizer.name=swing"]), load_recipe(QUICKSTART))
    assert "optimizer.name = 'adamw' there, 'swing' here" in told
    assert "optimizer.sway = 'unset' there, 1e-06 here" in told


def test_the_schema_for_editors_has_every_kind() -> None:
    kinds = Recipe.model_json_schema()["properties"]["optimizer"]["anyOf"]
    assert [set(kind["properties"]) - {"name", "lr", "offload", "in_backward"} for kind in kinds] == [
        *[{"betas", "eps", "weight_decay"}] * 3,
        {"betas", "weight_decay"},
        {"beta2_decay", "clip_threshold", "weight_decay"},
        {"betas", "eps", "weight_decay", "d0", "d_coef"},
        {"betas", "eps", "weight_decay"},
        {"betas", "eps", "weight_decay", "momentum", "ns_steps"},
        {"sway", "patience"},
    ]
