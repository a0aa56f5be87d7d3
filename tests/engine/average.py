"""A part of a run from outside of the engine: an average of the trained weights, which stands in for them in evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.engine.parts import Part
from finetune.engine.weights.loading import plain_name
from finetune.recipe.ema import Purpose

DECAY = 0.75


class Average(Part):
    """An exponential moving average; each rank averages the shards that it holds.

    `updates` counts the updates that it followed, `inside` tells whether it stands in for the weights.
    """

    name = "average"

    def __init__(self, transformer: nn.Module) -> None:
        named = transformer.named_parameters()
        self.parameters = {plain_name(name): parameter for name, parameter in named if parameter.requires_grad}
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.updates, self.inside = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.updates = state["values"], state["updates"]

    def after_step(self, step: int) -> None:
        assert step == self.updates
        self.updates += 1
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - DECAY)

    @contextmanager
    def evaluating(self, purpose: Purpose) -> Iterator[None]:
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._put(self.values)
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            self._put(trained)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
