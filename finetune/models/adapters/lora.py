"""Low-rank adapters (Hu et al. 2021) through peft, on the transformer's blocks only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from torch import nn

from finetune.models.family import Family
from finetune.recipe.schema import Lora
from finetune.runtime import seeds
from finetune.runtime.errors import UserError

ADAPTER = "default"


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


def ranks(transformer: nn.Module, family: Family, settings: Lora) -> dict[str, int]:
    """The rank of each layer that gets an adapter, by the layer's name in a transformer that has none yet."""
    pattern = re.compile(target_pattern(family, settings.targets))
    linear = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return {name: settings.rank for name in linear if pattern.fullmatch(name)}


def add(transformer: ModelMixin, family: Family, settings: Lora, seed: int) -> None:
    """Add a LoRA adapter in place. Its initial weights depend only on the seed.

    Raises:
        UserError: a target matches no linear layer of the blocks.
    """
    check_targets(transformer, family, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_pattern(family, settings.targets),
    )
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
