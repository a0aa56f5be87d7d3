"""Low-rank adapters (Hu et al. 2021) through peft, on the transformer's blocks only."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from torch import nn

from finetune.models.adapters.dora import DoraLinear
from finetune.models.family import Family
from finetune.recipe.schema import Lora
from finetune.runtime import seeds
from finetune.runtime.errors import UserError

ADAPTER = "default"
_USEFUL_ANYWHERE = 1024  # a rank that is not asked about, though a model of a few MB has no layer of it
_Value = TypeVar("_Value", int, float)


def target_pattern(family: Family, targets: list[str]) -> str:
    """A regular expression for peft that matches target layers inside the blocks only.

    Plain suffixes would also match layers outside the blocks, in text refiners and poolers.
    """
    lists = "|".join(map(re.escape, family.block_lists))
    names = "|".join(map(re.escape, targets or family.lora_targets))
    return rf"({lists})\.\d+\.(.+\.)?({names})"


def check_targets(transformer: nn.Module, family: Family, targets: list[str]) -> None:
    """Raise UserError for a target that names no linear layer of the blocks. The transformer may be on the meta device."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(re.fullmatch(target_pattern(family, [target]), name) for name in linear):
            inside = {name for name in linear if re.match(rf"({'|'.join(family.block_lists)})\.0\.", name)}
            known = sorted({re.sub(r"^.*?\.0\.", "", name, count=1) for name in inside})
            raise UserError(
                f"{target!r} names no linear layer of the blocks", f"layers are: {', '.join(known)}", "lora.targets"
            )


def check(transformer: nn.Module, family: Family, settings: Lora) -> None:
    """Raise UserError for settings that the model cannot have."""
    check_targets(transformer, family, settings.targets)
    layers = targeted_layers(transformer, family, settings.targets)
    sides = [cast(nn.Linear, transformer.get_submodule(layer)).weight.shape for layer in layers]
    full = max(_USEFUL_ANYWHERE, *map(min, sides))
    for key, rank in (("lora.rank", settings.rank), *((f"lora.ranks.{name}", r) for name, r in settings.ranks.items())):
        if rank > full:
            what = f"no layer that gets an adapter has so high a rank: what is above {full} only takes memory"
            raise UserError(what, f"set it to {full} at most; 16 to 128 are usual", key)
    for key, table in (("lora.ranks", settings.ranks), ("lora.alphas", settings.alphas)):
        for pattern in table:
            if not any(_ends_with(layer, pattern) for layer in layers):
                first = family.block_lists[0] + ".0."
                known = ", ".join(layer.removeprefix(first) for layer in layers if layer.startswith(first))
                raise UserError(f"{pattern!r} names no layer that gets an adapter", f"those are: {known}", key)


def targeted_layers(transformer: nn.Module, family: Family, targets: list[str]) -> list[str]:
    """The names of the layers that an adapter with these targets is on, before it is added."""
    pattern = re.compile(target_pattern(family, targets))
    found = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return [name for name in found if pattern.fullmatch(name)]


def _ends_with(layer: str, pattern: str) -> bool:
    return layer == pattern or layer.endswith(f".{pattern}")


def _by_layer(table: Mapping[str, _Value], layers: list[str]) -> dict[str, _Value]:
    """The values of the layers that a table of name endings names, by their whole names, as peft's patterns."""
    longest_first = sorted(table, key=len, reverse=True)
    found = {layer: next((each for each in longest_first if _ends_with(layer, each)), None) for layer in layers}
    return {layer: table[pattern] for layer, pattern in found.items() if pattern is not None}


def rate(settings: Lora, name: str) -> float:
    """How many times optimizer.lr a parameter's learning rate is."""
    return settings.plus_ratio if ".lora_B." in name else 1.0


def ranks(transformer: nn.Module, family: Family, settings: Lora) -> dict[str, int]:
    """The rank of each layer that gets an adapter, by the layer's name in a transformer that has none yet."""
    layers = targeted_layers(transformer, family, settings.targets)
    return dict.fromkeys(layers, settings.rank) | _by_layer(settings.ranks, layers)


def add(transformer: ModelMixin, family: Family, settings: Lora, seed: int) -> None:
    """Add a LoRA adapter in place. Its initial weights depend only on the seed; the lengths of DoRA are not there yet.

    Raises:
        UserError: a target matches no linear layer of the blocks.
    """
    check(transformer, family, settings)
    layers = targeted_layers(transformer, family, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_pattern(family, settings.targets),
        rank_pattern=_by_layer(settings.ranks, layers),
        alpha_pattern=_by_layer(settings.alphas, layers),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    if settings.dora:
        config._register_custom_module({nn.Linear: DoraLinear})
    with torch.random.fork_rng(devices=[]), _with_real_weights(transformer):
        torch.manual_seed(seeds.derive(seed, "lora"))
        transformer.add_adapter(config, ADAPTER)


@contextmanager
def _with_real_weights(transformer: nn.Module) -> Iterator[None]:
    """Inside the block, give linear layers on meta a weight on the CPU: one element, expanded to the weight's shape.

    peft moves an adapter to its layer's device. On meta the adapter's initial values would be lost.
    """
    empty = [m for m in transformer.modules() if isinstance(m, nn.Linear) and m.weight.is_meta]
    weights = [linear.weight for linear in empty]
    for linear in empty:
        stand_in = torch.zeros((), dtype=linear.weight.dtype).expand(linear.weight.shape)
        linear.weight = nn.Parameter(stand_in, linear.weight.requires_grad)
    try:
        yield
    finally:
        for linear, weight in zip(empty, weights, strict=True):
            linear.weight = weight
