"""All weights of the trained component as the folder that diffusers saves of it, verified by reading it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import diffusers
from torch import Tensor, nn

from finetune.engine.weights.exporters.exporter import Details, Exporter, expert_facts, gathered, tidy
from finetune.engine.weights.exporters.shards import write_shards
from finetune.engine.weights.exporters.trained_lora import EXPORTED
from finetune.models.building import stays_float32
from finetune.models.family import Family
from finetune.runtime.distributed import Runtime


def export_transformer(
    transformer: nn.Module, family: Family, folder: Path, runtime: Runtime, details: Details
) -> None:
    """Write all weights as a diffusers model folder, and verify its tensors. All ranks take part.

    They are exactly as trained, or rounded to the precision that is asked for, but for those that diffusers keeps in float32.
    """
    whole = gathered(transformer, trained_only=False)
    with runtime.together():
        if runtime.is_main:
            write(family, whole, folder, details)


def _rounded(whole: dict[str, Tensor], transformer: nn.Module, precision: str | None) -> dict[str, Tensor]:
    if precision is None:
        return whole
    stays = stays_float32(transformer)
    return {
        name: tensor if stays(name) or not tensor.is_floating_point() else tensor.to(EXPORTED[precision])
        for name, tensor in whole.items()
    }


def write(family: Family, whole: dict[str, Tensor], folder: Path, details: Details) -> None:
    """Write tensors by their names as a diffusers model folder, and verify it."""
    skeleton = cast(diffusers.ModelMixin, family.empty_transformer())
    whole = _rounded(whole, skeleton, details.precision)
    skeleton.load_state_dict(whole, assign=True)  # raises an error unless all are there
    folder.mkdir(parents=True, exist_ok=True)
    skeleton.save_config(folder)
    tidy([folder / "config.json"])
    sizes = {name: tensor.nbytes for name, tensor in whole.items()}
    write_shards(folder, sizes, lambda name: whole[name].contiguous(), {**details.facts, **expert_facts(family)})


def usage(base: str, dtype: str, parts: Sequence[tuple[Family, Path]]) -> list[str]:
    """See `Exporter.usage`."""
    first, _ = parts[0]
    loaded = {family.trained_component: folder for family, folder in parts}
    lines = [
        f'{component} = diffusers.{first.transformer_class}.from_pretrained("{folder}", torch_dtype={dtype})'
        for component, folder in loaded.items()
    ]
    given = ", ".join(f"{component}={component}" for component in loaded)
    return [*lines, f"pipe = diffusers.{first.pipeline_class}.from_pretrained({base}, {given})"]


def _component(family: Family) -> str:
    return family.trained_component


EXPORTER = Exporter("full", _component, export_transformer, usage, _component, is_small=False)
