"""A LoRA under the names of the model's authors, as ComfyUI loads it from `models/loras`, verified by taking it apart again.

Its loader knows each weight of its model as `diffusion_model.` and the original's name, and reads no alpha but one that lies
beside the matrices as a tensor, which diffusers refuses: so the strength is in the matrices alone.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.engine.weights.exporters.exporter import Details, Exporter, expert_facts, lora_writer, tidy
from finetune.engine.weights.exporters.trained_lora import DOWN, UP, TrainedLora
from finetune.models.adapters.places import file_of
from finetune.models.family import Family
from finetune.models.original_names import Rows, original_of
from finetune.recipe.schema import Lora
from finetune.recipe.table import Table
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

FILE = "comfyui_lora.safetensors"
PREFIX = "diffusion_model."


class OriginalPlace(NamedTuple):
    """A layer of the original: its name, and whose rows it has, from the first to the last."""

    name: str
    rows: tuple[Rows, ...]


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
        save_file(named, partial, {"format": "pt", **lora.facts(), **details.facts, **expert_facts(family)})
    tidy([path])
    _verify(path, tensors, list(places.values()), transformer)


def problem(family: Family) -> tuple[str, str] | None:
    """Why a family's LoRA has no such form, with a cure."""
    if family.original_layers:
        return None
    what = f"ComfyUI has no model of its own for {family.title}, or its names are not known here"
    return what, 'take "diffusers", which the nodes of others for this model load'


def refused(settings: Table | None) -> tuple[str, str] | None:
    """Why a LoRA of these settings has no such form, with a cure."""
    if not isinstance(settings, Lora) or not settings.dora:
        return None
    return "a DoRA is not written for ComfyUI, whose loader computes it otherwise", 'take "merged" or "diffusers"'


def place_of(layer: str, family: Family) -> OriginalPlace:
    """Where a layer of the blocks is in the original. Raises UserError if that is not known."""
    if found := original_of(layer, family.original_layers):
        name, rows = found
        for part, spelled in family.lora_spellings.items():
            name = name.replace(part, spelled)
        return OriginalPlace(name, rows)
    if family.original_layers and not any("{}" in theirs for theirs in family.original_layers):
        return OriginalPlace(layer, (Rows(layer),))  # the blocks' layers are called the same there
    raise UserError(
        f"the layer {layer} has no name in ComfyUI that is known here",
        'leave it out of lora.targets, or export as "diffusers"',
        "comfyui",
    )


def fused(place: OriginalPlace, tensors: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """The low-rank matrices of an original layer: exact, since each layer of ours has columns of its own in the second, and the
    ranks add up.

    Args:
        tensors: folded, by peft's names. Layers that have none leave their rows as they are.
        transformer: for the number of rows of each layer.
    """
    columns = _columns(place, tensors)
    down = torch.cat([tensors[layer + DOWN] for layer in columns])
    heights = [_height(transformer, rows) for rows in place.rows]
    # A file of another trainer may hold its matrices in several dtypes; what they have in common holds each of them exactly.
    dtype = functools.reduce(torch.promote_types, (tensors[layer + UP].dtype for layer in columns))
    up = down.new_zeros(sum(heights), len(down), dtype=dtype)
    for rows, target in zip(place.rows, up.split(heights), strict=True):
        if rows.layer in columns:
            target[:, columns[rows.layer]] = tensors[rows.layer + UP].chunk(rows.parts)[rows.part]
    return {DOWN: down.contiguous(), UP: up}


def _columns(place: OriginalPlace, tensors: Mapping[str, Tensor]) -> dict[str, slice]:
    """The adapted layers of a place, each with its part of the rank."""
    columns: dict[str, slice] = {}
    start = 0
    for layer in dict.fromkeys(rows.layer for rows in place.rows):
        if layer + DOWN in tensors:
            columns[layer] = slice(start, start + len(tensors[layer + DOWN]))
            start = columns[layer].stop
    return columns


def _height(transformer: nn.Module, rows: Rows) -> int:
    linear = transformer.get_submodule(rows.layer)
    assert isinstance(linear, nn.Linear)
    return linear.out_features // rows.parts


def _verify(path: Path, tensors: Mapping[str, Tensor], places: Sequence[OriginalPlace], transformer: nn.Module) -> None:
    """Read the file and take its matrices apart again: every block as it was trained, and zeros beside them."""
    found, parts = load_file(path), dict[str, list[tuple[int, Tensor]]]()
    wrong = []
    for place in places:
        down, up = (found.pop(PREFIX + place.name + end) for end in (DOWN, UP))
        columns = _columns(place, tensors)
        for rows, block in zip(place.rows, up.split([_height(transformer, each) for each in place.rows]), strict=True):
            own = columns.get(rows.layer, slice(0, 0))
            parts.setdefault(rows.layer, []).append((rows.part, block[:, own]))
            beside = block.clone()
            beside[:, own] = 0
            if beside.any() or (rows.layer in columns and not _same(down[own], tensors[rows.layer + DOWN])):
                wrong.append(rows.layer)
    for name in (name for name in tensors if name.endswith(UP)):
        blocks = [block for _, block in sorted(parts.get(name.removesuffix(UP), []), key=lambda part: part[0])]
        if not blocks or not _same(torch.cat(blocks), tensors[name]):
            wrong.append(name)
    if wrong := wrong + sorted(found):
        raise UserError(
            f"the exported adapter differs from the trained one: {', '.join(wrong[:3])}", "check the disk", str(path)
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.double(), other.double())


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
    refused=refused,
    convert=write_comfyui,
)
