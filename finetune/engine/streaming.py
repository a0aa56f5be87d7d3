"""Frozen blocks that live in host memory and visit the device one after the other, for one card or one a replica.

FSDP2's offload does not overlap its copies on one device. Here a block's frozen weights are one page-locked piece of host
memory, and two pieces of device memory take turns: while a block computes, the next one is copied on a stream of its
own; in the backward pass, the one before it. A block's parameters are views of one of the two for good, so whatever
autograd, a checkpoint or a compiled graph has kept of them is right again when the block is back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils._pytree import tree_flatten, tree_unflatten

from finetune.runtime.device import Device

_ALIGNMENT = 256  # bytes, as CUDA's allocations have it


@dataclass(eq=False)
class _Slot:
    """Device memory that streamed blocks share, and which of them is in it or on its way."""

    memory: Tensor  # uint8
    holds: int | None = None
    arrived: torch.Event | None = None


@dataclass(eq=False)
class Streamer:
    """Brings blocks to the device in the order in which they are called, one ahead."""

    device: Device
    hosts: list[Tensor] = field(default_factory=list)  # uint8, one a streamed block
    slots: list[_Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = None if self.device.is_cpu else torch.Stream(self.device.torch_device)

    def bring(self, index: int, onward: int) -> None:
        """Have a block on the device for what is queued next, and start the copy of its neighbour.

        Args:
            onward: 1 in a forward pass, -1 in a backward pass.
        """
        slot = self._slot(index)
        self._copy(index)
        if self.stream is not None:
            torch.accelerator.current_stream(self.device.torch_device).wait_event(slot.arrived)
        following = index + onward
        if following == len(self.hosts) and not torch.is_grad_enabled():
            following = 0  # the next forward pass; a backward pass would begin where this one ended
        if 0 <= following < len(self.hosts) and self._slot(following) is not slot:
            self._copy(following)

    def _slot(self, index: int) -> _Slot:
        return self.slots[index % len(self.slots)]

    def _copy(self, index: int) -> None:
        slot, host = self._slot(index), self.hosts[index]
        if slot.holds == index:
            return
        slot.holds = index
        target = slot.memory[: len(host)]
        if self.stream is None:
            target.copy_(host)
            return
        # What the slot held has been used by all that is queued so far: the copy waits for that, and for no more.
        self.stream.wait_stream(torch.accelerator.current_stream(self.device.torch_device))
        with self.stream:
            target.copy_(host, non_blocking=True)
            slot.arrived = self.stream.record_event()


class Streamed(ActivationWrapper):
    """A block whose frozen weights are brought to the device before it is computed, forward and backward.

    The wrapper is outside of checkpointing and compilation, and leaves no trace in names of `state_dict`.
    """

    def __init__(self, block: nn.Module, streamer: Streamer, index: int) -> None:
        super().__init__(block)
        self.streamer, self.index = streamer, index
        self.homes_of: dict[nn.Parameter, Tensor] = {}

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.streamer.bring(self.index, 1)
        outputs, form = tree_flatten(self._checkpoint_wrapped_module(*arguments, **keywords))
        return tree_unflatten(_BackwardBegins.apply(self.streamer, self.index, *outputs), form)

    def homes(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, the host memory that it is copied from); write weights there."""
        yield from self.homes_of.items()


class _BackwardBegins(torch.autograd.Function):
    """The block's outputs as they are; their gradients are where its backward pass begins."""

    @staticmethod
    def forward(context: Any, streamer: Streamer, index: int, *outputs: Tensor) -> tuple[Tensor, ...]:
        context.streamer, context.index = streamer, index
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        context.streamer.bring(context.index, -1)
        return None, None, *gradients


def stream_blocks(lists: list[nn.ModuleList], resident: int, device: Device) -> None:
    """Make the frozen parameters of blocks, on meta, visitors of the device; in place.

    Args:
        resident: number of blocks that stay on the device, spread evenly, so that copies have more time.
    """
    places = [(blocks, place) for blocks in lists for place in range(len(blocks))]
    count = len(places) - resident
    if count <= 0:
        return
    chosen = [places[index * len(places) // count] for index in range(count)]
    sizes = [_layout(blocks[place])[1] for blocks, place in chosen]
    streamer = Streamer(device)
    for _ in range(min(2, count)):
        streamer.slots.append(_Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device.torch_device)))
    for index, ((blocks, place), size) in enumerate(zip(chosen, sizes, strict=True)):
        host = device.pinned(size)
        streamer.hosts.append(host)
        streamed = Streamed(blocks[place], streamer, index)
        for (module, name), begin, end in _layout(blocks[place])[0]:
            frozen = module._parameters[name]
            # `.data`: writing to the slot must not count as changing what autograd has kept of its views.
            view = streamer._slot(index).memory[begin:end].view(frozen.dtype).view(frozen.shape).data
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
            streamed.homes_of[module._parameters[name]] = host[begin:end].view(frozen.dtype).view(frozen.shape)
        blocks[place] = streamed


def _layout(block: nn.Module) -> tuple[list[tuple[tuple[nn.Module, str], int, int]], int]:
    """(((owner, name), first byte, byte after the last) of each frozen parameter, bytes in all)."""
    found, end = [], 0
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                begin = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
                end = begin + parameter.nbytes
                found.append(((module, name), begin, end))
    return found, end
