"""The learning-rate schedule, and how it is set after a resume."""

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from finetune.recipe.schema import Schedule


def build_schedule(optimizer: torch.optim.Optimizer, settings: Schedule, steps: int) -> LambdaLR:
    """Build diffusers' schedule (`get_scheduler`) over `steps` optimizer steps."""
    return get_scheduler(
        settings.name,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )


def set_schedule_step(schedule: LambdaLR, step: int) -> None:
    """Set a schedule and its optimizer's learning rates to their state after `step` optimizer steps."""
    schedule.last_epoch = schedule._step_count = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # the compiled steps of torchao's optimizers read this tensor
        else:
            group["lr"] = rate
    schedule._last_lr = rates
