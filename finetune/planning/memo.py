"""What operations make of fake tensors, remembered: a step repeats the same few hundred operations for every block.

FakeTensorMode has a memory of its own, which is made for any program and looks at much more; this one serves operations whose
results follow from the shapes of their inputs and from numbers, and leaves all others to it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_PLAIN = (type(None), str, torch.dtype, torch.device, torch.memory_format, torch.layout)
_UNKNOWN = object()


class _Made(NamedTuple):
    """One result: an input itself, a view of one, or a tensor of its own."""

    source: int | None  # place among the inputs
    is_view: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Memo:
    """Results of operations on fake tensors, by what they follow from."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._made: dict[tuple, tuple[type | None, list[_Made | None]] | None] = {}

    def key(self, function: Any, arguments: tuple, keywords: dict) -> tuple | None:
        """What the result follows from; None if it may follow from anything else."""
        if (
            torch.Tag.inplace_view in function.tags
            or torch.Tag.data_dependent_output in function.tags
            or _writes_out(function)
        ):
            return None
        try:
            parts: list = [function, torch.get_default_dtype()]
            for argument in arguments:
                parts.append(_part(argument))
            for name, argument in keywords.items():
                parts += name, _part(argument)
            return tuple(parts)
        except _Other:
            return None

    def recall(self, key: tuple, tensors: list[Tensor]) -> Any:
        """The result for these inputs; `Memo.UNKNOWN` if it has not been seen."""
        known = self._made.get(key)
        if known is None:
            return Memo.UNKNOWN
        kind, made = known
        results = [each and self._make(each, tensors) for each in made]
        return results[0] if kind is None else kind(results)

    UNKNOWN = _UNKNOWN

    def remember(self, key: tuple, tensors: list[Tensor], result: Any) -> None:
        """Keep how a result was made, if it can be made again from that."""
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        storages = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(tensors)}
        if len(storages) < len(tensors):
            return  # which of those that share one is meant is not in the key
        own: set[int] = set()
        made = [each if each is None else _how(each, tensors, storages, own) for each in results]
        if any(how is _UNKNOWN for how in made):
            return
        kind = type(result) if isinstance(result, (list, tuple)) else None
        self._made[key] = kind, made

    def _make(self, how: _Made, tensors: list[Tensor]) -> Tensor:
        if how.source is not None and not how.is_view:
            return tensors[how.source]
        with in_kernel_invocation_manager(self._fake):
            if how.is_view:
                meta = torch.as_strided(tensors[how.source], how.shape, how.stride, how.offset)
            else:
                meta = torch.empty_strided(how.shape, how.stride, dtype=how.dtype, device="meta")
        return FakeTensor(self._fake, meta, how.device)


@cache
def _writes_out(function: Any) -> bool:
    return any(argument.is_out for argument in function._schema.arguments)


class _Other(Exception):
    """An argument that results may follow from in ways not known here."""


def _part(argument: Any) -> Any:
    if type(argument) is FakeTensor:
        return argument.shape, argument.stride(), argument.storage_offset(), argument.dtype, argument.fake_device
    if isinstance(argument, (bool, int, float)):
        return type(argument), argument
    if isinstance(argument, _PLAIN):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple(_part(each) for each in argument)
    raise _Other


def _how(result: Any, tensors: list[Tensor], storages: dict[int, int], own: set[int]) -> Any:
    if type(result) is not FakeTensor or result.is_conj() or result.is_neg():
        return _UNKNOWN
    for place, tensor in enumerate(tensors):
        if tensor is result:
            return _Made(place, False, (), (), 0, result.dtype, result.fake_device)
    storage = result.untyped_storage()
    facts = tuple(result.shape), result.stride(), result.storage_offset(), result.dtype, result.fake_device
    if storage._cdata in storages:
        source = storages[storage._cdata]
        return _Made(source, True, *facts) if tensors[source].dtype == result.dtype else _UNKNOWN
    span = 1 + sum((size - 1) * stride for size, stride in zip(*facts[:2], strict=True)) if result.numel() else 0
    if storage._cdata in own or facts[2] or storage.nbytes() != span * result.element_size():
        return _UNKNOWN
    own.add(storage._cdata)
    return _Made(None, False, *facts)
