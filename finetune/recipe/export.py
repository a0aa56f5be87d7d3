"""The table [export] of a recipe: in which forms the end of a run writes what was trained."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.table import Free, Table


class Export(Table):
    formats: Annotated[list[Literal["diffusers", "comfyui", "peft", "merged"]], Field(min_length=1)] = Free(
        ["diffusers"]
    )
    """In which forms a run's end writes what was trained, each in a folder of its own: as diffusers loads it; a LoRA under the
    names that ComfyUI knows; as a folder of peft; or merged, the whole transformer with the LoRA in its weights."""
    precision: Literal["float32", "bf16", "float16", "float8"] | None = Free(None)
    """In which precision; unset: as trained, and "merged" as the base model is. "float8" (e4m3) is for "merged"."""
