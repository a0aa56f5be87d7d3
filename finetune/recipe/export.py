"""The table [export] of a recipe: in which forms the end of a run writes what was trained."""

from typing import Annotated

from pydantic import Field

from finetune.recipe.choices import ExportFormat, ExportPrecision
from finetune.recipe.table import Free, Table


class Export(Table):
    formats: Annotated[list[ExportFormat], Field(min_length=1)] = Free(["diffusers"])
    """In which forms a run's end writes what was trained, each in a folder of its own."""
    precision: ExportPrecision | None = Free(None)
    """In which precision; unset: as trained, and "merged" as the base model is."""
