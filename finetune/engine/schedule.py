"""The learning rate over time, and its place after a resume."""

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from finetune.recipe.schema import Schedule


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
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # torchao's, which its compiled step reads
        else:
            group["lr"] = rate
    schedule._last_lr = rates
