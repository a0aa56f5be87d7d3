"""The TOML recipe: schema, reading, writing. Imports no torch, so that a typo is found before anything heavy loads."""

from finetune.recipe.bucket import Bucket
from finetune.recipe.load import RECIPE_FILE, load_recipe, recipe_values, write_recipe
from finetune.recipe.schema import Recipe

__all__ = ["RECIPE_FILE", "Bucket", "Recipe", "load_recipe", "recipe_values", "write_recipe"]
