"""Offloads saved activations to host memory: copies them out while later blocks compute, and back before they are used.

The backward pass uses saved tensors in reverse order, so fetching one also starts the copies of those saved before it.
The computing stream waits for a copy before the copied memory is freed. It is thus never left to the allocator to share
memory between streams, and a step's peak does not depend on how far the host runs ahead of the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.runtime.device import Arrival, Device

SMALLEST = 2**20  # bytes; a copy of fewer costs more than it saves
AHEAD = 2  # tensors that are fetched before they are needed
LEAVING = 4  # copies to the host that may be unfinished at once


@dataclass(eq=False)
class _Saved:
    """An offloaded tensor.

    Attributes:
        place: its index in `ActivationOffload.saved`.
        stride: its strides on the device.
        host: its copy in host memory.
        copied_out: when `host` is complete.
        users: how many saved tensors of autograd refer to it and are still needed.
        fetched: its copy on the device in the backward pass.
        copied_back: when `fetched` is complete.
    """

    place: int
    stride: tuple[int, ...]
    host: Tensor
    copied_out: Arrival
    users: int = 1
    fetched: Tensor | None = None
    copied_back: Arrival = None


class ActivationOffload:
    """Moves the tensors that autograd saves to host memory. Use `saving()` around the forward pass of each micro-batch."""

    def __init__(self, device: Device, smallest: int = SMALLEST) -> None:
        self.device, self.smallest = device, smallest
        self.copies = device.copies()
        self.saved: list[_Saved | None] = []  # in the order of saving; None after the last use
        self.leaving: deque[tuple[Tensor, int, _Saved]] = deque()  # with the tensors, kept until they are copied

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Offload what autograd saves inside the block."""
        for record in filter(None, self.saved):  # fetched, but not used by the last backward pass
            self.copies.wait(record.copied_back)
        self.saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        while self.leaving:
            self._free_oldest()

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if not self._is_offloaded(tensor):
            return tensor
        for other, version, record in self.leaving:  # several layers may save the same input
            if version == tensor._version and _same_memory(other, tensor):
                record.users += 1
                return record
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.device.pins)
        record = _Saved(len(self.saved), tensor.stride(), host, self.copies.start(host, tensor.detach()))
        self.saved.append(record)
        self.leaving.append((tensor, tensor._version, record))
        if len(self.leaving) > LEAVING:
            self._free_oldest()
        return record

    def _free_oldest(self) -> None:
        """Drop the device memory of the tensor that was saved first, once it is copied."""
        _kept, _, record = self.leaving.popleft()  # the tensor is freed on return, after the wait
        self.copies.wait(record.copied_out)

    def _is_offloaded(self, tensor: Tensor) -> bool:
        """Whether a saved tensor is offloaded. Weights and their views are not: the model keeps their memory anyway."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        right = tensor.device.type == self.device.kind and tensor.is_floating_point() and 0 not in tensor.stride()
        return right and not is_weight and tensor.nbytes >= self.smallest

    def _unpack(self, record: Tensor | _Saved) -> Tensor:
        if isinstance(record, Tensor):
            return record
        tensor = self._fetch(record)
        for earlier in reversed(self.saved[max(0, record.place - AHEAD) : record.place]):
            if earlier:
                self._fetch(earlier)
        self.copies.wait(record.copied_back)
        record.users -= 1
        if not record.users:
            record.fetched, self.saved[record.place] = None, None
        return tensor

    def _fetch(self, record: _Saved) -> Tensor:
        """Start the copy back to the device, unless it was started before."""
        if record.fetched is None:
            shape, dtype = record.host.shape, record.host.dtype
            # With the strides that it had, because compiled code relies on them.
            record.fetched = torch.empty_strided(shape, record.stride, dtype=dtype, device=self.device.torch_device)
            record.copied_back = self.copies.start(record.fetched, record.host)
        return record.fetched


def _same_memory(a: Tensor, b: Tensor) -> bool:
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    return same and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
