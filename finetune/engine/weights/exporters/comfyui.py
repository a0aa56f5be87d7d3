"""A LoRA under the names of the model's authors, as ComfyUI loads it from `models/loras`, verified by taking it apart again.

Its loader knows each weight of its model as `diffusion_model.` and the original's name, and reads no alpha but one that lies
beside the matrices as a tensor, which diffusers refuses: so the strength is in the matrices alone.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.engine.weights.exporters.exporter import Details, Exporter, expert_facts, file_of, lora_writer, tidy
from finetune.engine.weights.exporters.trained_lora import DOWN, UP, TrainedLora
from finetune.models.family import Family
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

FILE = "comfyui_lora.safetensors"
PREFIX = "diffusion_model."


class Place(NamedTuple):
    """A layer of the original: its name, diffusers' layers whose rows it has, and whether its halves are swapped."""

    name: str
    parts: tuple[str, ...]
    is_swapped: bool


def write_comfyui(lora: TrainedLora, family: Family, folder: Path, details: Details) -> None:
    """Write `folder/comfyui_lora.safetensors`; that of an expert says in its name which one it is for.

    Raises:
        UserError: a layer has no name there, or the file differs from what was trained.
    """
    lora.only_low_rank("comfyui")
    tensors, transformer = lora.folded(details.precision), family.empty_transformer()
    places = {place.name: place for place in (place_of(layer, family) for layer in lora.layers)}
    named = {
        PREFIX + place.name + end: tensor
        for place in places.values()
        for end, tensor in fused(place, tensors, transformer).items()
    }
    path = folder / file_of(FILE, family)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        save_file(named, partial, {**details.facts, **lora.facts(), **expert_facts(family)})
    tidy([path])
    _verify(path, tensors, places.values(), transformer)


def problem(family: Family) -> tuple[str, str] | None:
    """Why a family's LoRA has no such form, with a cure."""
    if family.original_blocks:
        return None
    what = f"ComfyUI has no model of its own for {family.title}, or its names are not known here"
    return what, '"diffusers", which the nodes of others for this model load'


def place_of(layer: str, family: Family) -> Place:
    """Where a layer of the blocks is in the original. Raises UserError if that is not known."""
    for blocks in family.original_blocks:
        found = re.fullmatch(rf"{re.escape(blocks.ours)}\.(\d+)\.(.+)", layer)
        place = found and blocks.place(found[2])
        if found and place:
            theirs, parts = place
            names = tuple(f"{blocks.ours}.{found[1]}.{part}" for part in parts)
            return Place(f"{blocks.theirs}.{found[1]}.{theirs}", names, theirs in blocks.halves_swapped)
    raise UserError(
        f"the layer {layer} has no name in ComfyUI that is known here",
        'leave it out of lora.targets, or export as "diffusers"',
        "comfyui",
    )


def fused(place: Place, tensors: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """The low-rank matrices of an original layer: exact, by blocks on the diagonal, whose ranks add up.

    Args:
        tensors: folded, by peft's names. Layers that have none leave their rows as they are.
        transformer: for the number of rows of each layer.
    """
    adapted = [part for part in place.parts if part + DOWN in tensors]
    down = torch.cat([tensors[part + DOWN] for part in adapted])
    rows = [_rows(transformer, part) for part in place.parts]
    up = down.new_zeros(sum(rows), len(down))
    top = left = 0
    for part, height in zip(place.parts, rows, strict=True):
        if part in adapted:
            block = tensors[part + UP]
            up[top : top + height, left : left + block.shape[1]] = block
            left += block.shape[1]
        top += height
    return {DOWN: down.contiguous(), UP: _swapped(up) if place.is_swapped else up}


def _swapped(up: Tensor) -> Tensor:
    first, second = up.chunk(2)
    return torch.cat([second, first])


def _rows(transformer: nn.Module, layer: str) -> int:
    linear = transformer.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    return linear.out_features


def _verify(path: Path, tensors: Mapping[str, Tensor], places: Iterable[Place], transformer: nn.Module) -> None:
    """Read the file and take its matrices apart again: every block as it was trained, and zeros beside them."""
    found, wrong, seen = load_file(path), [], set()
    for place in places:
        down, up = (found.pop(PREFIX + place.name + end) for end in (DOWN, UP))
        up = _swapped(up) if place.is_swapped else up
        top = left = 0
        for part in place.parts:
            height = _rows(transformer, part)
            rank = len(tensors[part + DOWN]) if part + DOWN in tensors else 0
            rows, width = up[top : top + height], slice(left, left + rank)
            beside = rows.clone()
            beside[:, width] = 0
            if rank:
                seen.add(part)
                same = torch.equal(rows[:, width], tensors[part + UP]) and torch.equal(
                    down[width], tensors[part + DOWN]
                )
                wrong += [] if same else [part]
            wrong += [part] if beside.any() else []
            top, left = top + height, left + rank
    wrong += sorted(found) + sorted({name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)} - seen)
    if wrong:
        raise UserError(
            f"the exported adapter differs from the trained one: {', '.join(wrong[:3])}", "check the disk", str(path)
        )


def _title(family: Family) -> str:
    return "LoRA for ComfyUI (put it into models/loras)"


EXPORTER = Exporter(
    "lora",
    lambda _: "comfyui",
    lora_writer(write_comfyui),
    title=_title,
    is_small=False,
    format="comfyui",
    problem=problem,
    convert=write_comfyui,
)
