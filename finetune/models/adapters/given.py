"""Adapters that a training is given: the one that it continues, and frozen ones that it is trained on top of.

Frozen adapters are added to the base weights as these are read, in float32 and before they are rounded or quantised. So they
take no memory and no time in a step, and go with every way of holding weights. They are no part of what is trained and exported.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.models.adapters.places import find_adapter
from finetune.models.adapters.reading import ReadAdapter, read_adapter
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.recipe.schema import Lora
from finetune.recipe.table import Table


def read_started(settings: Table | None, family: Family) -> ReadAdapter | None:
    """The adapter that the trained one begins as; None for one that begins anew. Raises UserError as `read_adapter`."""
    if not isinstance(settings, Lora) or settings.start_from is None:
        return None
    return read_adapter(settings.start_from, family)


def with_frozen(weights: Weights, settings: Table | None, family: Family) -> Weights:
    """The base weights with the frozen adapters in them. Raises UserError as `read_adapter`."""
    if not isinstance(settings, Lora) or not settings.frozen:
        return weights
    return MergedWeights(weights, [(read_adapter(each.path, family), each.strength) for each in settings.frozen])


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


class MergedWeights(Weights):
    """Weights to which adapters are added as they are read."""

    def __init__(self, base: Weights, adapters: Sequence[tuple[ReadAdapter, float]]) -> None:
        super().__init__([])
        self._base, self._adapters = base, adapters

    def names(self) -> set[str]:
        return self._base.names()

    def shape(self, name: str) -> torch.Size:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Weights.rows`; those of an adapted layer are float32."""
        rows, layer = self._base.rows(name, start, stop), name.removesuffix(".weight")
        for adapter, strength in self._adapters:
            if layer != name and layer in adapter.layers:
                rows = rows.float() + strength * adapter.layers[layer].delta(start, stop)
        return rows
