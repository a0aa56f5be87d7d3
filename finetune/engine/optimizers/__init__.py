"""Optimizers, a file each: a builder that is given the trained parameters by name, and may split them in groups.

A new one is a file here and a line in `BUILDERS`; its settings are a table of its own in `finetune/recipe/optimizers.py`. What a
builder returns is used as torch's optimizers are: its groups have "lr", which the schedule sets; its state is saved and
restored by the parameters' names, on any number of ranks. With `optimizer.in_backward`, `step` is called for one parameter at a
time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from finetune.engine.optimizers import adafactor, adamw, adamw_bf16, extra, low_bit, muon
from finetune.recipe.optimizers import (
    Adafactor,
    AdamW,
    Bf16AdamW,
    Lion,
    LowBitAdamW,
    Muon,
    Optimizer,
    Prodigy,
    ScheduleFreeAdamW,
)

Builder = Callable[[Mapping[str, nn.Parameter], Any, str], torch.optim.Optimizer]

BUILDERS: dict[type[Optimizer], Builder] = {
    AdamW: adamw.build,
    LowBitAdamW: low_bit.build,
    Bf16AdamW: adamw_bf16.build,
    Lion: extra.build_lion,
    Adafactor: adafactor.build,
    Prodigy: extra.build_prodigy,
    ScheduleFreeAdamW: extra.build_schedule_free,
    Muon: muon.build,
}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: Optimizer, weights: str = "float32"
) -> torch.optim.Optimizer:
    """The optimizer of a recipe's [optimizer], before its state is offloaded.

    Args:
        parameters: what is trained, name -> parameter, collected after sharding.
        weights: dtype of the parameters, "float32" or "bf16"; bf16 ones are rounded stochastically.
    """
    return BUILDERS[type(settings)](parameters, settings, weights)


def figures(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What an optimizer has estimated, by the metric's name, without a wait for the device: Prodigy's rate, "d"."""
    group = optimizer.param_groups[0]
    return {"d": float(group["d"])} if "d0" in group else {}  # Adafactor's groups have another "d"
