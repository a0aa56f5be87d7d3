"""A cache of operations on fake tensors: a step repeats the same few hundred operations for every block.

FakeTensorMode has a cache of its own, made for any program, whose keys cost more to build. This one takes operations whose
results follow from the shapes of their inputs and from plain arguments, and leaves all others to FakeTensorMode.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_PLAIN = (type(None), str, torch.dtype, torch.device, torch.memory_format, torch.layout)
_MISS = object()


class _ResultSpec(NamedTuple):
    """How one result is made again: an input itself, a view of an input, or a new tensor.

    Attributes:
        source: place of the input among the inputs; None for a new tensor.
    """

    source: int | None
    is_view: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class DispatchCache:
    """Results of operations on fake tensors, by function and arguments."""

    MISS = _MISS

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._entries: dict[tuple, tuple[type | None, list[_ResultSpec | None]]] = {}

    def key(self, function: Any, arguments: tuple, keywords: dict) -> tuple | None:
        """All that the result depends on; None if it may depend on something else, and cannot be cached."""
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
        except _NotHashable:
            return None

    def get(self, key: tuple, tensors: list[Tensor]) -> Any:
        """The result for these inputs; `DispatchCache.MISS` if there is no entry."""
        entry = self._entries.get(key)
        if entry is None:
            return _MISS
        kind, specs = entry
        results = [spec and self._make(spec, tensors) for spec in specs]
        return results[0] if kind is None else kind(results)

    def put(self, key: tuple, tensors: list[Tensor], result: Any) -> None:
        """Store how a result was made, if that can be repeated from the inputs' shapes."""
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        storages = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(tensors)}
        if len(storages) < len(tensors):
            return  # the key cannot tell apart inputs that share storage
        new: set[int] = set()
        specs = [each if each is None else _spec(each, tensors, storages, new) for each in results]
        if any(spec is _MISS for spec in specs):
            return
        kind = type(result) if isinstance(result, (list, tuple)) else None
        self._entries[key] = kind, specs

    def _make(self, spec: _ResultSpec, tensors: list[Tensor]) -> Tensor:
        if spec.source is not None and not spec.is_view:
            return tensors[spec.source]
        with in_kernel_invocation_manager(self._fake):
            if spec.source is not None:
                meta = torch.as_strided(tensors[spec.source], spec.shape, spec.stride, spec.offset)
            else:
                meta = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
        return FakeTensor(self._fake, meta, spec.device)


@cache
def _writes_out(function: Any) -> bool:
    return any(argument.is_out for argument in function._schema.arguments)


class _NotHashable(Exception):
    """An argument of a type that is not known to be plain."""


def _part(argument: Any) -> Any:
    """What a key holds of an argument."""
    if type(argument) is FakeTensor:
        return argument.shape, argument.stride(), argument.storage_offset(), argument.dtype, argument.fake_device
    if isinstance(argument, (bool, int, float)):
        return type(argument), argument
    if isinstance(argument, _PLAIN):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple(_part(each) for each in argument)
    raise _NotHashable


def _spec(result: Any, tensors: list[Tensor], storages: dict[int, int], new: set[int]) -> Any:
    """How a result is made again; `_MISS` if that is not known.

    Args:
        storages: place of each input, by its storage.
        new: storages of results so far; this one's is added.
    """
    if type(result) is not FakeTensor or result.is_conj() or result.is_neg():
        return _MISS
    for place, tensor in enumerate(tensors):
        if tensor is result:
            return _ResultSpec(place, False, (), (), 0, result.dtype, result.fake_device)
    storage, shape, stride = result.untyped_storage(), tuple(result.shape), result.stride()
    offset, dtype, device = int(result.storage_offset()), result.dtype, result.fake_device
    if storage._cdata in storages:
        source = storages[storage._cdata]
        if tensors[source].dtype != dtype:
            return _MISS
        return _ResultSpec(source, True, shape, stride, offset, dtype, device)
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if result.numel() else 0
    if storage._cdata in new or offset or storage.nbytes() != span * result.element_size():
        return _MISS
    new.add(storage._cdata)
    return _ResultSpec(None, False, shape, stride, offset, dtype, device)
