"""Saved activations in host memory: copied out while later blocks compute, and back before their gradients are due.

On a GPU the copies run on a stream of their own, from and to pinned memory. What the forward pass saved last is needed
first, so taking one tensor back starts the copy of those saved before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.runtime.device import Device

SMALLEST = 2**20  # bytes: below, a copy costs more than it saves
AHEAD = 2  # tensors on their way back


@dataclass(eq=False)
class _Saved:
    """A tensor that left the device; `back` is its copy on the way home."""

    host: Tensor
    left: torch.Event | None
    back: Tensor | None = None
    arrived: torch.Event | None = None


class ActivationOffload:
    """Sends what autograd saves to host memory; use `saving()` around the forward pass of each micro-batch."""

    def __init__(self, device: Device, smallest: int = SMALLEST) -> None:
        self.device, self.smallest = device, smallest
        self.stream = None if device.is_cpu else torch.Stream(device.torch_device)
        self.saved: list[_Saved] = []

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd's hooks for what is computed inside."""
        self.saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if not self._leaves(tensor):
            return tensor
        if self.stream is None:
            record = _Saved(tensor.detach().clone(), None)
        else:
            current = torch.accelerator.current_stream(self.device.torch_device)
            self.stream.wait_stream(current)
            with self.stream:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                left = self.stream.record_event()
            tensor.record_stream(self.stream)
            record = _Saved(host, left)
        self.saved.append(record)
        return record

    def _leaves(self, tensor: Tensor) -> bool:
        """Weights stay: they, or what they are views of, are kept by the model anyway."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        right_device = tensor.device.type == self.device.kind
        return right_device and not is_weight and tensor.is_floating_point() and tensor.nbytes >= self.smallest

    def _unpack(self, record: Tensor | _Saved) -> Tensor:
        if isinstance(record, Tensor):
            return record
        self._fetch(record)
        place = self.saved.index(record) if record in self.saved else 0
        for earlier in self.saved[max(0, place - AHEAD) : place]:
            self._fetch(earlier)
        if self.stream is not None:
            torch.accelerator.current_stream(self.device.torch_device).wait_event(record.arrived)
            record.back.record_stream(torch.accelerator.current_stream(self.device.torch_device))
        tensor, record.back = record.back, None
        if record in self.saved:
            self.saved.remove(record)
        return tensor

    def _fetch(self, record: _Saved) -> None:
        if record.back is not None:
            return
        if self.stream is None:
            record.back = record.host.clone()
            return
        with self.stream:
            self.stream.wait_event(record.left)
            record.back = record.host.to(self.device.torch_device, non_blocking=True)
            record.arrived = self.stream.record_event()
