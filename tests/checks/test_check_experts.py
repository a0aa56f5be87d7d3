"""What a recipe may say of Wan 2.2's experts, and what is refused before anything is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.checks.model import open_family
from finetune.recipe import load_recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.runtime.errors import UserError

RANGES = "objective.sigma_range={high = [0.8, 1.0], low = [0.0, 0.9]}"


@pytest.mark.parametrize(
    "settings, where, what",
    [
        (["objective.sigma_range=[0.8, 1.0]"], "objective.sigma_range", "one range of noise levels for two experts"),
        (["train.steps={high = 3}"], "train.steps", "does not name the expert 'low'"),
        (['model.experts=["low", "low"]'], "model.experts", "names an expert twice"),
        (
            ["train.steps={high = 2, low = 9}", "schedule.warmup_steps=3", "schedule.name=cosine"],
            "schedule.warmup_steps",
            "only 2 steps of one expert",
        ),
    ],
)
def test_what_means_nothing_for_its_experts_is_refused(
    family_recipe: Callable[..., Path], settings: list[str], where: str, what: str
) -> None:
    with pytest.raises(UserError) as error:
        open_family(load_recipe(family_recipe("wan", "2.2-A14B"), settings))
    assert [problem.where for problem in error.value.problems] == [where]
    assert what in error.value.problems[0].what
    assert error.value.problems[0].cure


def test_a_recipe_of_both_trains_one_by_name(family_recipe: Callable[..., Path]) -> None:
    """So two machines start from one file."""
    settings = ["model.experts=low", RANGES, "train.steps={high = 3, low = 4}"]
    recipe = load_recipe(family_recipe("wan", "2.2-A14B"), settings)
    (low,) = recipes_of_experts(recipe, list(open_family(recipe).experts))
    assert (low.train.steps, low.objective.sigma_range) == (4, [0.0, 0.9])


@pytest.mark.parametrize("setting", ["train.steps={high = 3, low = 4}", RANGES])
def test_a_table_of_experts_is_for_checkpoints_that_have_them(family_recipe: Callable[..., Path], setting: str) -> None:
    with pytest.raises(UserError, match="has no experts that this could differ for"):
        open_family(load_recipe(family_recipe("wan"), [setting]))


def test_a_table_is_divided_among_the_experts(family_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(family_recipe("wan", "2.2-A14B"), [RANGES, "train.steps={high = 3, low = 4}"])
    high, low = recipes_of_experts(recipe, list(open_family(recipe).experts))
    assert (high.train.steps, low.train.steps) == (3, 4)
    assert (high.objective.sigma_range, low.objective.sigma_range) == ([0.8, 1.0], [0.0, 0.9])
    assert (high.run_folder, low.run_folder) == (recipe.output / "high", recipe.output / "low")
    assert high.objective.expert_ranges == low.train.expert_steps == {}
