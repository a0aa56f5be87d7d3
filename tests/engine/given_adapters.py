"""Adapters that trainings are given: random ones, by diffusers' names; and the base model with them, as diffusers loads it."""

from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.models.family import Family

ENDS = ("to_q", "to_k", "to_v", "to_out.0")


def write_adapter(path: Path, family: Family, rank: int = 4, seed: int = 1, ends: tuple[str, ...] = ENDS) -> Path:
    """Write an adapter of the layers of the blocks whose names end like this."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in family.empty_transformer().named_modules():
        if isinstance(module, nn.Linear) and name.startswith(family.block_lists) and name.endswith(ends):
            out, width = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.3
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    save_file(tensors, path)
    return path


def loaded(family: Family, *adapters: tuple[Path, float]) -> nn.Module:
    """The base model with adapters, each of a strength."""
    cls = getattr(diffusers, family.transformer_class)
    transformer = cls.from_pretrained(family.folder.path / family.trained_component)
    for index, (file, _) in enumerate(adapters):
        transformer.load_lora_adapter(load_file(file), adapter_name=f"a{index}")
    if adapters:
        names, weights = zip(*((f"a{index}", weight) for index, (_, weight) in enumerate(adapters)), strict=True)
        transformer.set_adapters(list(names), list(weights))
    return family.adapt_transformer(transformer).eval()
