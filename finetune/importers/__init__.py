"""Reads the settings of other trainers and writes a recipe from them: one file a trainer. Imports no torch, and starts nothing."""

from finetune.importers.draft import Draft, Note
from finetune.importers.registry import TRAINERS, import_files
from finetune.importers.write import recipe_text

__all__ = ["TRAINERS", "Draft", "Note", "import_files", "recipe_text"]
