"""LoRAs of random numbers for every family, with an alpha that is not the rank, as if they had been trained."""

import re
from pathlib import Path

import torch
from every_family import Model
from torch import Tensor, nn

from finetune.engine.weights.exporters.trained_lora import DOWN, UP, TrainedLora, config_of
from finetune.models import family_class
from finetune.models.family import Family
from finetune.models.folder import ModelFolder


def opened(model: Model, path: Path) -> Family:
    """A family on a folder; of two experts, the first."""
    family = family_class(model[0])(ModelFolder(path))
    return family.of_expert(next(iter(family.experts))) if family.experts else family


def linear_layers(family: Family) -> dict[str, tuple[int, int]]:
    """Every linear layer of the blocks, with the shape of its weight."""
    blocks = rf"({'|'.join(family.block_lists)})\.\d+\."
    modules = family.empty_transformer().named_modules()
    found = {name: each for name, each in modules if isinstance(each, nn.Linear) and re.match(blocks, name)}
    return {name: (each.out_features, each.in_features) for name, each in found.items()}


def random_lora(family: Family, rank: int = 3, alpha: float = 2.0, targets: str = ".*") -> TrainedLora:
    """Of the layers whose names in a block match `targets` from their beginning on."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in linear_layers(family).items():
        if re.match(targets, re.sub(r"^\w+\.\d+\.", "", name)):
            tensors[name + DOWN] = torch.randn(rank, columns, generator=generator)
            tensors[name + UP] = torch.randn(rows, rank, generator=generator) / 10
    scales = {name.removesuffix(DOWN): alpha / rank for name in tensors if name.endswith(DOWN)}
    return TrainedLora(tensors, scales, config_of(tensors, scales))


def change(lora: TrainedLora, layer: str) -> Tensor:
    """What the LoRA adds to a layer's weight, in float64, by the formula of its paper: alpha / rank x B A."""
    scale = lora.config.lora_alpha / lora.config.r
    return scale * (lora.tensors[layer + UP].double() @ lora.tensors[layer + DOWN].double())


def differ(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())
