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
    """Raises UserError as `read_adapter`; of those that are not where they were, with how to say where they are."""
    if not isinstance(settings, Lora):
        return []
    for index in range(len(settings.frozen)):
        _find_frozen(settings, index, family)
    return [(read_adapter(each.path, family), each.strength) for each in settings.frozen]


def _find_frozen(settings: Lora, index: int, family: Family) -> tuple[Path, dict[str, Any] | None]:
    try:
        return find_adapter(settings.frozen[index].path, family)
    except UserError as error:
        (problem,) = error.problems
        places = [json.dumps(each.path) for each in settings.frozen]
        places[index] = '"WHERE IT IS"'
        tables = [
            f"{{path = {place}, strength = {each.strength:g}}}"
            for place, each in zip(places, settings.frozen, strict=True)
        ]
        cure = f"if it lies elsewhere now, give --set 'lora.frozen=[{', '.join(tables)}]'; else {problem.cure}"
        raise UserError(f"an adapter of lora.frozen: {problem.what}", cure, problem.where) from error


def moved(settings: Lora, later: Lora, family: Family) -> Lora:
    """The settings with those frozen adapters that are not where they were at the places that a later recipe has for them."""
    pairs = list(zip(settings.frozen, later.frozen, strict=False))
    if len(settings.frozen) != len(later.frozen) or any(each.strength != other.strength for each, other in pairs):
        return settings
    frozen = [each if _is_there(each.path, family) else other for each, other in pairs]
    return settings.model_copy(update={"frozen": frozen})


def _is_there(path: str, family: Family) -> bool:
    try:
        find_adapter(path, family)
    except UserError:
        return False
    return True


def started_identity(settings: Table | None, family: Family, file_hash: Callable[[Path], str]) -> list[Any] | None:
    """JSON values that tell the adapter that the trained one begins as from others, by its content; None if there is none.

    Reads no tensor. Raises UserError if it is not there.
    """
    if not isinstance(settings, Lora) or settings.start_from is None:
        return None
    file, beside = find_adapter(settings.start_from, family)
    return [file_hash(file), beside]


def frozen_identity(settings: Table | None, family: Family, file_hash: Callable[[Path], str]) -> list[list[Any]]:
    """The same of each frozen adapter."""
    if not isinstance(settings, Lora):
        return []
    found = [_find_frozen(settings, index, family) for index in range(len(settings.frozen))]
    return [[file_hash(file), beside] for file, beside in found]


def check_given(transformer: nn.Module, family: Family, settings: Table | None, begins: bool = True) -> None:
    """Raise UserError for an adapter that cannot be read, or that the trained one cannot begin as.

    Args:
        transformer: without an adapter.
        begins: whether a training begins; one that goes on has in its checkpoints what became of the adapter.
    """
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
    if begins and (started := read_started(settings, family)) is not None:
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
