"""Adapters that a training is given: the one that it continues, and frozen ones that it is trained on top of.

Frozen adapters are added to the base weights as these are read, in float32 and before they are rounded or quantised. So they
take no memory and no time in a step, and go with every way of holding weights. They are no part of what is trained and exported.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models.adapters.lora import ranks
from finetune.models.adapters.places import find_adapter
from finetune.models.adapters.reading import ReadAdapter, read_adapter
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.recipe.schema import Lora
from finetune.recipe.table import Table
from finetune.runtime.errors import UserError

Frozen = Sequence[tuple[ReadAdapter, float]]
"""Adapters, each with its strength."""


def read_started(settings: Table | None, family: Family) -> ReadAdapter | None:
    """The adapter that the trained one begins as; None for one that begins anew. Raises UserError as `read_adapter`."""
    if not isinstance(settings, Lora) or settings.start_from is None:
        return None
    return read_adapter(settings.start_from, family)


def with_frozen(weights: Weights, settings: Table | None, family: Family) -> Weights:
    """The base weights with the frozen adapters in them. Raises UserError as `read_adapter`."""
    frozen = _read_frozen(settings, family)
    return MergedWeights(weights, frozen) if frozen else weights


def add_frozen(transformer: nn.Module, settings: Table | None, family: Family) -> None:
    """Give a transformer that has its weights, of the family's files, those with the frozen adapters in them, in place."""
    merged = with_frozen(family.transformer_weights(), settings, family)
    if not isinstance(merged, MergedWeights):
        return
    parameters = dict(transformer.named_parameters())
    with torch.no_grad():
        for name in merged.adapted():
            parameters[name].copy_(merged.rows(name, 0, len(parameters[name])))


def _read_frozen(settings: Table | None, family: Family) -> Frozen:
    if not isinstance(settings, Lora):
        return []
    return [(read_adapter(each.path, family), each.strength) for each in settings.frozen]


def given_identity(settings: Table | None, family: Family, file_hash: Callable[[Path], str]) -> list[Any]:
    """JSON values that tell the given adapters from others, by their content; empty if there are none. Reads no tensor."""
    if not isinstance(settings, Lora):
        return []
    paths = [] if settings.start_from is None else [("start_from", settings.start_from)]
    paths += [("frozen", each.path) for each in settings.frozen]
    found: list[Any] = []
    for role, path in paths:
        file, beside = find_adapter(path, family)
        found.append([role, file_hash(file), beside])
    return found


def check_given(transformer: nn.Module, family: Family, settings: Table | None) -> None:
    """Raise UserError for an adapter that cannot be read, or that the trained one cannot begin as. The transformer has none yet."""
    if not isinstance(settings, Lora):
        return
    if settings.dora and settings.start_from is not None:
        what = "an adapter of another kind cannot be continued as DoRA, whose lengths it has not"
        raise UserError(what, "set lora.dora = false, or name it in lora.frozen and begin anew", "lora.start_from")
    if idle := [each.path for each in settings.frozen if each.strength == 0]:
        raise UserError(f"{idle[0]} has no effect at strength 0", "remove it, or give it a strength", "lora.frozen")
    for adapter, _ in _read_frozen(settings, family):
        if not any(layer.scale and layer.lora_A.any() and layer.lora_B.any() for layer in adapter.layers.values()):
            what = f"{adapter.file} adds nothing: all its matrices are zero"
            raise UserError(what, "remove it, or give an adapter that has been trained", "lora.frozen")
    if (started := read_started(settings, family)) is not None:
        check_fits(started, ranks(transformer, family, settings))


def check_fits(started: ReadAdapter, ranks: Mapping[str, int]) -> None:
    """Raise UserError unless the trained adapter, of these ranks by layer, has room for all of another one."""
    if missing := [name for name in started.layers if name not in ranks]:
        ends = sorted({name.split(".", 2)[-1] for name in started.layers})
        what = f"{started.file} adapts {len(missing)} layers that are not among the targets, {missing[0]} among them"
        raise UserError(what, f"set lora.targets = {json.dumps(ends)}", "lora.start_from")
    for name, layer in started.layers.items():
        if layer.rank > ranks[name]:
            most = max(each.rank for each in started.layers.values())
            what = f"{started.file} has rank {layer.rank} in {name}, which does not fit into {ranks[name]}"
            raise UserError(what, f"set lora.rank = {most}", "lora.start_from")


class MergedWeights(Weights):
    """Weights to which adapters are added as they are read."""

    def __init__(self, base: Weights, adapters: Frozen) -> None:
        super().__init__([])
        self._where = base._where
        self._adapters = adapters

    def adapted(self) -> set[str]:
        """The names of the weights that an adapter adds to."""
        return {f"{layer}.weight" for adapter, _ in self._adapters for layer in adapter.layers}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Weights.rows`; those of an adapted layer are float32."""
        rows = super().rows(name, start, stop)
        layer, _, what = name.rpartition(".")
        for adapter, strength in self._adapters:
            if what == "weight" and layer in adapter.layers:
                rows = rows.float() + strength * adapter.layers[layer].delta(start, stop)
        return rows
