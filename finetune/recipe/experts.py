"""A recipe for several experts as one recipe each: trained one after the other, or on two machines, they share nothing."""

from collections.abc import Sequence

from finetune.recipe.schema import ExpertName, Recipe


def recipes_of_experts(recipe: Recipe, experts: Sequence[ExpertName]) -> list[Recipe]:
    """The recipe of each expert that is trained, in their order; the recipe itself where there are none.

    Args:
        experts: those of the checkpoint, in the order in which they denoise.
    """
    if not experts:
        return [recipe]
    return [of_expert(recipe, name) for name in experts if name in (recipe.model.experts or experts)]


def of_expert(recipe: Recipe, name: ExpertName) -> Recipe:
    """The recipe of one expert: its steps and its range, and by `Recipe.run_folder` a folder of its own."""
    train, objective = recipe.train, recipe.objective
    steps = train.expert_steps.get(name, train.steps)
    sigma_range = objective.expert_ranges.get(name, objective.sigma_range)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"experts": [name]}),
            "train": train.model_copy(update={"steps": steps, "expert_steps": {}}),
            "objective": objective.model_copy(update={"sigma_range": sigma_range, "expert_ranges": {}}),
        }
    )
