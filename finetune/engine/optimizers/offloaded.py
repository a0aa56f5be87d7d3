"""Optimizer state in host memory, with the weights on the device: updates are made on the CPU (Ren et al. 2021, ZeRO-Offload).

torchao's `CPUOffloadOptimizer` does the same for one GPU, but copies gradients before they are clipped, takes no DTensors, and
saves its state by the order of parameters rather than by their names (torchao 0.18). So this project has its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from finetune.engine.gradients import Norms, local
from finetune.engine.optimizers.saved_state import load_as_saved
from finetune.runtime.device import Arrival, Device

_STAGES = 3  # parameters that are on their way at once: one to the host, one being updated, one back
_LEAVING = 4  # gradients that may be on their way to the host at once
_ALIGNMENT = 64  # bytes between the beginnings of tensors in host memory


class HostGradients:
    """Copies each gradient to host memory as soon as it is whole, and drops it. FSDP2 calls a sharded parameter's hooks after
    its reduction.

    Attributes:
        held: the host memory of each parameter's gradient, of its shape and dtype on this rank.
    """

    def __init__(self, parameters: list[nn.Parameter], device: Device) -> None:
        self._copies = device.copies()
        memory = device.pinned(sum(map(_aligned, parameters)))
        self.held: dict[Tensor, Tensor] = {}
        for parameter in parameters:
            self.held[parameter] = _like(local(parameter), memory)
            memory = memory[_aligned(parameter) :]
            parameter.register_post_accumulate_grad_hook(self._collect)
        self._collected: set[Tensor] = set()  # parameters
        self._leaving: deque[tuple[Tensor, Arrival]] = deque()
        self._norms, self._scale = Norms(parameters), torch.ones(())

    def _collect(self, parameter: Tensor) -> None:
        assert parameter.grad is not None  # it is what the hook is called for
        self._norms.add(parameter)
        gradient = local(parameter.grad)
        arrival = self._copies.start(self.held[parameter], gradient)
        self._collected.add(parameter)
        self._leaving.append((gradient, arrival))
        parameter.grad = None
        if len(self._leaving) > _LEAVING:
            self._free_oldest()

    def _free_oldest(self) -> None:
        """Drop the device memory of the gradient that came first, once it is copied."""
        _kept, arrival = self._leaving.popleft()  # freed on return, after the wait
        self._copies.wait(arrival)

    def norm(self) -> Tensor:
        """Global L2 norm of the gradients since it was last asked for, over all ranks.

        Once the host has read it, all of them are in host memory.
        """
        while self._leaving:
            self._free_oldest()
        return self._norms.take()

    def clip(self, norm: float, limit: float | None) -> None:
        """Scale gradients by `limit` / `norm` when they are taken, if the norm exceeds it: as torch's clip_grads_with_norm_."""
        self._scale = torch.ones(()) if limit is None else (limit / (torch.tensor(norm) + 1e-6)).clamp(max=1.0)

    def take(self, parameter: Tensor) -> Tensor | None:
        """This rank's part of a parameter's gradient in host memory, clipped; None if it has not been collected.

        The host must have read `norm` before.
        """
        if parameter not in self._collected:
            return None
        self._collected.remove(parameter)
        return self.held[parameter].mul_(self._scale)

    def drop(self) -> None:
        """Forget the gradients that were not taken."""
        self._collected.clear()


@dataclass(eq=False)
class _Stage:
    """Host memory that a weight and its gradient are copied to; and their copies there and back."""

    memory: Tensor  # uint8
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    arrivals: list[Arrival] = field(default_factory=list)
    returned: Arrival = None


class OffloadedOptimizer(torch.optim.Optimizer):
    """Makes another optimizer's updates on the CPU, one parameter at a time: while one is updated, the next is copied to the host,
    and the one before back to the device.

    Groups and state belong to this optimizer, whose parameters are on the device. The other one is lent a copy of each in turn.
    """

    def __init__(self, inner: torch.optim.Optimizer, device: Device, gradients: HostGradients | None = None) -> None:
        """
        Args:
            gradients: where gradients are, if they do not stay on the device.
        """
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._gradients = inner, gradients
        self._out, self._back = device.copies(), device.copies()
        largest = max(_aligned(parameter) for group in self.param_groups for parameter in group["params"])
        self._stages = [_Stage(device.pinned(2 * largest)) for _ in range(_STAGES)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, on the device or collected."""
        assert closure is None  # this project's steps have none
        coming = self._staged()
        current = next(coming, None)
        while current is not None:
            following = next(coming, None)  # starts its copy before the current one is updated
            self._update(*current)
            current = following
        for stage in self._stages:
            self._back.wait(stage.returned)

    def _staged(self) -> Iterator[tuple[dict[str, Any], nn.Parameter, _Stage]]:
        """(group, parameter, stage) of each parameter, whose copies to the host have been started."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                collected = self._gradients.take(parameter) if self._gradients else None
                if collected is None and parameter.grad is None:
                    continue
                stage = self._stages[place % _STAGES]
                self._start(stage, parameter, collected)
                yield group, parameter, stage
                place += 1

    def _start(self, stage: _Stage, parameter: nn.Parameter, collected: Tensor | None) -> None:
        self._out.finish(stage.returned)  # the stage's memory has been read
        weight = local(parameter).detach()
        stage.weight = _like(weight, stage.memory)
        stage.arrivals = [self._out.start(stage.weight, weight)]
        if collected is not None:
            stage.gradient = collected
        elif parameter.grad is not None:
            stage.gradient = _like(weight, stage.memory[_aligned(weight) :])
            stage.arrivals.append(self._out.start(stage.gradient, local(parameter.grad)))

    def _update(self, group: dict[str, Any], parameter: nn.Parameter, stage: _Stage) -> None:
        for arrival in stage.arrivals:
            self._out.finish(arrival)
        lent = _with_local(parameter.detach(), stage.weight)
        lent.grad = _with_local(parameter.detach(), stage.gradient)
        self._inner.param_groups = [{**group, "params": [lent]}]
        self._inner.state.clear()
        if parameter in self.state:
            self._inner.state[lent] = self.state[parameter]
        self._inner.step()
        self.state[parameter] = self._inner.state[lent]
        stage.returned = self._back.start(local(parameter).detach(), stage.weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, wherever they are."""
        super().zero_grad(set_to_none)
        if self._gradients:
            self._gradients.drop()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state stays in host memory: torch moves it to where the parameters are."""
        load_as_saved(self, super().load_state_dict, state_dict)


def _with_local(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor that is distributed as another one, and has this part on this rank, also one on another device."""
    if not is_traceable_wrapper_subclass(tensor):
        return part
    names, context = tensor.__tensor_flatten__()  # one tensor, and from torch 2.13 on the mesh
    inner = {name: getattr(tensor, name) for name in names}
    inner = {name: part if isinstance(value, Tensor) else value for name, value in inner.items()}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """The beginning of memory (uint8) as a tensor of the same shape and dtype."""
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _aligned(tensor: Tensor) -> int:
    """The bytes of this rank's part of a tensor, up to where the next may begin."""
    return -(-local(tensor).nbytes // _ALIGNMENT) * _ALIGNMENT
