"""Saved activations in host memory: copied out while later blocks compute, and back before their gradients are due.

What the forward pass saved last is needed first, so taking one tensor back starts the copy of those saved before it.
Memory is never handed from stream to stream by the allocator: the computing stream waits for a copy before it drops
what was copied, so that a step's peak does not depend on how far the host is ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.runtime.device import Arrival, Device

SMALLEST = 2**20  # bytes: below, a copy costs more than it saves
AHEAD = 2  # tensors on their way back
LEAVING = 4  # tensors on their way out


@dataclass(eq=False)
class _Saved:
    """A tensor that leaves the device for as many users as have saved it; `back` is its copy on the way home."""

    place: int
    stride: tuple[int, ...]
    host: Tensor
    left: Arrival
    users: int = 1
    back: Tensor | None = None
    arrived: Arrival = None


class ActivationOffload:
    """Sends what autograd saves to host memory; use `saving()` around the forward pass of each micro-batch."""

    def __init__(self, device: Device, smallest: int = SMALLEST) -> None:
        self.device, self.smallest = device, smallest
        self.copies = device.copies()
        self.saved: list[_Saved | None] = []  # in the order in which they were saved; None once they are back
        self.leaving: deque[tuple[Tensor, int, _Saved]] = deque()  # kept until their copies are made

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd's hooks for what is computed inside."""
        for record in filter(None, self.saved):  # fetched ahead, and not asked for
            self.copies.wait(record.arrived)
        self.saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        while self.leaving:
            self._let_go()

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if not self._leaves(tensor):
            return tensor
        for other, version, record in self.leaving:  # an input of several layers is saved by each
            if version == tensor._version and _same_memory(other, tensor):
                record.users += 1
                return record
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.device.pins)
        record = _Saved(len(self.saved), tensor.stride(), host, self.copies.start(host, tensor.detach()))
        self.saved.append(record)
        self.leaving.append((tensor, tensor._version, record))
        if len(self.leaving) > LEAVING:
            self._let_go()
        return record

    def _let_go(self) -> None:
        _, _, record = self.leaving.popleft()
        self.copies.wait(record.left)

    def _leaves(self, tensor: Tensor) -> bool:
        """Weights stay: they, or what they are views of, are kept by the model anyway."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        right = tensor.device.type == self.device.kind and tensor.is_floating_point() and 0 not in tensor.stride()
        return right and not is_weight and tensor.nbytes >= self.smallest

    def _unpack(self, record: Tensor | _Saved) -> Tensor:
        if isinstance(record, Tensor):
            return record
        self._fetch(record)
        for earlier in reversed(self.saved[max(0, record.place - AHEAD) : record.place]):
            if earlier:
                self._fetch(earlier)
        self.copies.wait(record.arrived)
        tensor = record.back
        record.users -= 1
        if not record.users:
            record.back, self.saved[record.place] = None, None
        return tensor

    def _fetch(self, record: _Saved) -> None:
        if record.back is None:
            shape, stride = record.host.shape, record.stride  # compiled code counts on the strides, too
            record.back = torch.empty_strided(shape, stride, dtype=record.host.dtype, device=self.device.torch_device)
            record.arrived = self.copies.start(record.back, record.host)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    return same and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
