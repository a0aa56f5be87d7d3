"""All weights of the trained component as the folder that diffusers saves of it, verified by reading it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import diffusers
import torch
from torch import Tensor, nn

from finetune.engine.weights.exporters.exporter import Exporter, gathered, tidy
from finetune.models.family import Family
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError


def export_transformer(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime) -> None:
    """Write all weights as a diffusers model folder, exactly as trained, and verify its tensors. All ranks take part."""
    whole = gathered(transformer, trained_only=False)
    with runtime.together():
        if runtime.is_main:
            saved = write(family, whole, folder).from_pretrained(folder).state_dict()
            if wrong := [name for name, value in whole.items() if not torch.equal(saved[name], value)]:
                raise UserError(f"the exported weights differ: {', '.join(wrong[:3])}", "check the disk", str(folder))


def write(family: Family, whole: dict[str, Tensor], folder: Path) -> type[diffusers.ModelMixin]:
    """Write tensors by their names as a diffusers model folder; returns the model's class."""
    skeleton = cast(diffusers.ModelMixin, family.empty_transformer())
    skeleton.load_state_dict(whole, assign=True)
    skeleton.save_pretrained(folder)
    tidy([folder / "config.json", *folder.glob("diffusion_pytorch_model*.*")])
    return type(skeleton)


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


EXPORTER = Exporter("full", _component, export_transformer, usage, _component, False)
