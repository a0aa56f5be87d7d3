"""Adafactor: torch's, which looks at whole matrices."""

from collections.abc import Mapping

import torch
from torch import nn

from finetune.engine.optimizers.lent import Lender
from finetune.recipe.optimizers import Adafactor


def build(parameters: Mapping[str, nn.Parameter], settings: Adafactor, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    inner = torch.optim.Adafactor(
        list(parameters.values()),
        lr=settings.lr,
        beta2_decay=settings.beta2_decay,
        d=settings.clip_threshold,
        weight_decay=settings.weight_decay,
        foreach=False,  # it is lent one matrix at a time
    )
    return Lender(inner, whole=True)
