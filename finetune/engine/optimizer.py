"""The optimizer of a recipe's [optimizer], and its learning-rate schedule."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from finetune.recipe.schema import Optimizer, Schedule


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trained parameters, collected after sharding."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=True,  # torch's own choice on GPUs; on a CPU it loops, and an operation on a DTensor costs 20 us
    )


def build_schedule(optimizer: torch.optim.Optimizer, settings: Schedule, steps: int) -> LambdaLR:
    """diffusers' `get_scheduler`, counted in optimizer steps."""
    return get_scheduler(
        settings.name,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )


def set_schedule_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule, and its optimizer's learning rate, where it is after `step` optimizer steps."""
    schedule.last_epoch = schedule._step_count = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
