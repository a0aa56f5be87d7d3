"""A moving average of the trained weights, which may stand in for them in samples, held-out losses and exports."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.engine.gradients import local
from finetune.engine.optimizers.offloaded import on_host
from finetune.engine.parts import Part
from finetune.recipe.ema import Ema, Purpose
from finetune.runtime.device import Arrival
from finetune.runtime.distributed import Runtime, host_threads

_ALIGNMENT = 64  # bytes between the beginnings of tensors in host memory
_STAGES = 2  # weights that are in host memory at once: one on its way, one being averaged


class WeightAverage(Part):
    """An exponential moving average of the trained parameters, in float32. Each rank averages the shards that it holds.

    Until its first update there is no average: the weights stand for themselves. The first takes them as they are; those after
    it are as of torch.optim.swa_utils.get_ema_multi_avg_fn, and with `warmup`, the decay is that of diffusers' EMAModel.

    Attributes:
        values: this rank's shard of each, float32, by the parameter's name. Zeros before the first update; while the average
            stands in for float32 weights, these are here.
        updates: how many there have been.
    """

    name = "ema"

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Ema, runtime: Runtime) -> None:
        """Collective.

        Args:
            parameters: what is trained, name -> parameter, collected after sharding.
            settings: with a decay.
        """
        assert settings.decay is not None
        self.settings, self.decay, self.updates = settings, settings.decay, 0
        self.is_evaluated = "export" in settings.use
        self._runtime, self._parameters = runtime, dict(parameters)
        weights = [local(parameter) for parameter in parameters.values()]
        self._leaves_device = settings.device == "host" and any(weight.device.type != "cpu" for weight in weights)
        if self._leaves_device:
            sizes = [-(-weight.numel() * 4 // _ALIGNMENT) * _ALIGNMENT for weight in weights]
            memory = runtime.device.pinned(sum(sizes)).zero_()
            pieces = memory.split(sizes)
            values = [_like(weight, piece, torch.float32) for weight, piece in zip(weights, pieces, strict=True)]
            self._stages = [runtime.device.pinned(max(weight.nbytes for weight in weights)) for _ in range(_STAGES)]
            self._copies = runtime.device.copies()
        else:
            values = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        self.values = dict(zip(parameters, values, strict=True))
        meshes = {each.device_mesh for each in parameters.values() if isinstance(each, DTensor)}
        self._mesh = next(iter(meshes), None)
        if self._mesh is not None and values[0].device.type == "cpu":
            self._mesh = on_host(self._mesh)

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": {name: self._distributed(name, value) for name, value in self.values.items()},
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(local(state["values"][name]))
        self.updates = state["updates"]

    def _distributed(self, name: str, value: Tensor) -> Tensor:
        """This rank's shard as a tensor that is distributed as the parameter, and shares the shard's memory."""
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor):
            return value
        assert self._mesh is not None
        return DTensor.from_local(
            value,
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the average, if it is this step's turn."""
        if (step + 1) % self.settings.every:
            return
        share = 1 - self.next_decay
        weights = [local(parameter).detach() for parameter in self._parameters.values()]
        values = list(self.values.values())
        on_cpu = values[0].device.type == "cpu"
        with host_threads(self._runtime, used=on_cpu):
            if self._leaves_device:
                for value, weight in zip(values, self._arriving(weights), strict=True):
                    self._update(value, weight, share)
            elif all(weight.dtype == torch.float32 for weight in weights) and self.updates:
                torch._foreach_lerp_(values, weights, share)
            else:
                for value, weight in zip(values, weights, strict=True):
                    self._update(value, weight, share)
        self.updates += 1

    @property
    def next_decay(self) -> float:
        """What of the average the next update keeps."""
        if not self.updates:
            return 0.0
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.settings.warmup else self.decay

    def _update(self, value: Tensor, weight: Tensor, share: float) -> None:
        if self.updates:
            value.lerp_(weight.float(), share)
        else:
            value.copy_(weight)

    def _arriving(self, weights: list[Tensor]) -> Iterator[Tensor]:
        """Each weight in host memory. The copy of the following one has been started."""
        started: Iterator[tuple[Tensor, Arrival]] = (
            self._start(weight, self._stages[place % _STAGES]) for place, weight in enumerate(weights)
        )
        for (copy, arrival), _following in pairwise(_and_none(started)):
            self._copies.finish(arrival)
            yield copy

    def _start(self, weight: Tensor, stage: Tensor) -> tuple[Tensor, Arrival]:
        copy = _like(weight, stage, weight.dtype)
        return copy, self._copies.start(copy, weight)

    @torch.no_grad()
    def put(self) -> None:
        """Put the average in the place of the weights for good, if there is one."""
        if self.updates:
            for name, parameter in self._parameters.items():
                local(parameter).copy_(self.values[name])

    @contextmanager
    def evaluating(self, purpose: Purpose) -> Iterator[None]:
        """With the average in the place of the weights, bf16 ones rounded to the nearest, if it is for this purpose.

        Float32 weights change places with it, so that one parameter at a time is in memory once more. bf16 ones are kept beside it.
        """
        if purpose not in self.settings.use or not self.updates:
            yield
            return
        kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # of those that have been replaced
        try:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    weight, value = local(parameter).detach(), self.values[name]
                    kept.append((parameter, value, _replace(weight, value)))
            yield
        finally:
            with torch.no_grad():
                for parameter, value, trained in kept:
                    weight = local(parameter).detach()  # FSDP's first forward pass may have moved the shard
                    if trained is value:
                        _replace(weight, value)
                    else:
                        weight.copy_(trained)


def _replace(weight: Tensor, value: Tensor) -> Tensor:
    """Put a value into a weight. Returns where the weight is now: where the value was, if they are of one dtype."""
    trained = weight.clone()
    weight.copy_(value)
    if weight.dtype == value.dtype:
        return value.copy_(trained)
    return trained.to(value.device)


def _like(weight: Tensor, memory: Tensor, dtype: torch.dtype) -> Tensor:
    """The beginning of memory (uint8) as a tensor of a weight's shape."""
    return memory[: weight.numel() * dtype.itemsize].view(dtype).view(weight.shape)


def _and_none(started: Iterator[tuple[Tensor, Arrival]]) -> Iterator[Any]:
    yield from started
    yield None
