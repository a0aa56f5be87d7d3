"""Optimizer state in host memory, with the weights on the device: updates are made on the CPU (Ren et al. 2021, ZeRO-Offload).

torchao's `CPUOffloadOptimizer` does the same for one GPU, but copies gradients before they are clipped, takes no DTensors, and
saves its state by the order of parameters rather than by their names (torchao 0.18). So this project has its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from finetune.engine.gradients import Norms, local
from finetune.engine.optimizers.saved_state import load_as_saved
from finetune.runtime.device import Arrival, Device

_STAGES = 3  # parameters that are on their way at once: one to the host, one being updated, one back
_LEAVING = 4  # gradients that may be on their way to the host at once
_ALIGNMENT = 64  # bytes between the beginnings of tensors in host memory


class HostGradients:
    """Copies each gradient to host memory as soon as it is reduced, and drops it. FSDP2 calls a sharded parameter's hooks after
    its reduction. A second backward pass before `take` overwrites what the first has left.

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
        self.norms = Norms(parameters)
        self._scale: Tensor | None = None  # 0-D float32, if the gradients are to be clipped

    def _collect(self, parameter: Tensor) -> None:
        assert parameter.grad is not None  # it is what the hook is called for
        self.norms.add(parameter)
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
        """Global L2 norm of the gradients since it was last asked for, over all ranks: 0-D float32, on the device.

        Once the host has read it, all of them are in host memory.
        """
        while self._leaving:
            self._free_oldest()
        return self.norms.take()

    def clip(self, norm: float, limit: float | None) -> None:
        """Scale gradients by `limit` / `norm` when they are taken, if the norm exceeds it: as torch's clip_grads_with_norm_."""
        scale = torch.ones(()) if limit is None else limit / (torch.tensor(norm) + 1e-6)
        self._scale = scale if scale < 1 else None

    def take(self, parameter: Tensor) -> Tensor | None:
        """This rank's part of a parameter's gradient in host memory, clipped; None if it has not been collected.

        The host must have read `norm` before.
        """
        if parameter not in self._collected:
            return None
        self._collected.remove(parameter)
        held = self.held[parameter]
        return held if self._scale is None else held.mul_(self._scale)

    def drop(self) -> None:
        """Forget the gradients that were not taken."""
        self._collected.clear()


@dataclass(eq=False)
class _Stage:
    """Host memory that a weight, and after it its gradient, are copied to; their copies there, and the weight's copy back."""

    memory: Tensor  # uint8
    arrivals: list[Arrival] = field(default_factory=list)
    returned: Arrival = None


class OffloadedOptimizer(torch.optim.Optimizer):
    """Makes another optimizer's updates on the CPU, one parameter at a time: while one is updated, the next is copied to the host,
    and the one before back to the device.

    Groups and state belong to this optimizer, whose parameters are on the device. The other one is lent a copy of each in turn.
    """

    def __init__(self, inner: torch.optim.Optimizer, device: Device, gradients: HostGradients | None = None) -> None:
        """Collective.

        Args:
            inner: has been built for the same parameters; updates each of them by its own gradient and state alone, and writes
                nothing to its groups.
            device: of the parameters.
            gradients: where gradients are, if they do not stay on the device.
        """
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._gradients = inner, gradients
        self._out, self._back = device.copies(), device.copies()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        largest = max(map(_aligned, parameters))
        self._stages = [_Stage(device.pinned(largest if gradients else 2 * largest)) for _ in range(_STAGES)]
        meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
        self._mesh = on_host(*meshes) if meshes else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, on the device or collected."""
        assert closure is None  # this project's steps have none
        staged = chain(self._staged(), [None])
        for current, _following in pairwise(staged):  # the copy of the following one is started before
            assert current is not None
            self._update(*current)
        for stage in self._stages:
            self._back.wait(stage.returned)

    def _staged(self) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor, Tensor, _Stage]]:
        """(group, parameter, host copies of weight and gradient, stage) of each parameter; the copies have been started."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                collected = self._gradients.take(parameter) if self._gradients else None
                if collected is None and parameter.grad is None:
                    continue
                stage = self._stages[place % _STAGES]
                yield group, parameter, *self._start(stage, parameter, collected), stage
                place += 1

    def _start(self, stage: _Stage, parameter: nn.Parameter, collected: Tensor | None) -> tuple[Tensor, Tensor]:
        self._out.finish(stage.returned)  # the stage's memory has been read
        weight = local(parameter).detach()
        host = _like(weight, stage.memory)
        stage.arrivals = [self._out.start(host, weight)]
        if collected is not None:
            return host, collected
        assert parameter.grad is not None  # else there would be nothing to update
        gradient = local(parameter.grad)
        room = stage.memory[_aligned(weight) :]
        if len(room) < gradient.nbytes:  # as a gradient that was set from outside, while others are collected
            room = torch.empty(gradient.nbytes, dtype=torch.uint8)
        stage.arrivals.append(self._out.start(_like(gradient, room), gradient))
        return host, _like(gradient, room)

    def _update(
        self, group: dict[str, Any], parameter: nn.Parameter, weight: Tensor, gradient: Tensor, stage: _Stage
    ) -> None:
        for arrival in stage.arrivals:
            self._out.finish(arrival)
        lent = self._distributed(weight, parameter)
        lent.grad = self._distributed(gradient, parameter)
        self._inner.param_groups = [{**group, "params": [lent]}]
        self._inner.state.clear()
        if parameter in self.state:
            self._inner.state[lent] = self.state[parameter]
        self._inner.step()
        self.state[parameter] = self._inner.state[lent]
        stage.returned = self._back.start(local(parameter).detach(), weight)

    def _distributed(self, part: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's part as a tensor that is distributed as the parameter, on CPUs."""
        if not isinstance(parameter, DTensor):
            return part
        assert self._mesh is not None
        return DTensor.from_local(
            part,
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, wherever they are."""
        super().zero_grad(set_to_none)
        if self._gradients:
            self._gradients.drop()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state stays in host memory: torch moves it to where the parameters are."""
        load_as_saved(self, state_dict)


def on_host(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks on their CPUs. Collective."""
    if mesh.device_type == "cpu":
        return mesh
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """The beginning of memory (uint8) as a tensor of the same shape and dtype."""
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _aligned(tensor: Tensor) -> int:
    """The bytes of this rank's part of a tensor, up to where the next may begin."""
    return -(-local(tensor).nbytes // _ALIGNMENT) * _ALIGNMENT
