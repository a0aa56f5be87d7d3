"""Muon for the blocks' matrices and AdamW for all else, both of torch, as one optimizer."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from finetune.engine.optimizers.lent import Lender
from finetune.engine.optimizers.low_bit import adam_arguments
from finetune.engine.optimizers.saved_state import load_as_saved
from finetune.recipe.optimizers import Muon

_OF_A_BLOCK = re.compile(
    r"\w+\.\d+\..*\bweight"
)  # tables such as a block's `scale_shift_table` are no maps of a vector


def build(parameters: Mapping[str, nn.Parameter], settings: Muon, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    matrices = {name for name, p in parameters.items() if p.dim() == 2 and _OF_A_BLOCK.fullmatch(name)}
    by_name: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        by_name["muon"] = torch.optim.Muon(
            [parameters[name] for name in parameters if name in matrices],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            ns_steps=settings.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
    if others := [parameters[name] for name in parameters if name not in matrices]:
        by_name["adamw"] = torch.optim.AdamW(others, **adam_arguments(settings), fused=True)
    return Lender(ByGroup(by_name), whole=True)


class ByGroup(torch.optim.Optimizer):
    """Several optimizers as one: each updates the groups that have its name under "algorithm".

    Groups and state belong to this optimizer, and are lent.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        groups = [
            {**group, "algorithm": name} for name, optimizer in optimizers.items() for group in optimizer.param_groups
        ]
        super().__init__(groups, {})
        self._optimizers = optimizers

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None  # this project's steps have none
        for name, optimizer in self._optimizers.items():
            optimizer.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            optimizer.state = self.state
            optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State stays in its dtype: torch casts it to that of the weights."""
        load_as_saved(self, state_dict)
