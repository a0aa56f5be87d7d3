"""What a NaN or an infinity in a step comes from, and what the user can do about it."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.engine.gradients import local
from finetune.engine.savers.lowbit import LowBitLinear
from finetune.engine.step import StepResult
from finetune.engine.weights.loading import host_copies, plain_name
from finetune.models.batch import Batch
from finetune.runtime.errors import UserError
from finetune.runtime.units import counted
from finetune.tracking.metrics import METRICS_FILE, read_metrics
from finetune.training.job import Job

WINDOW = 20  # steps that a mean loss is taken over
SOUND = 1.5  # a checkpoint's mean loss over the lowest of the run, at most, if the training was as it should be


def not_finite(job: Job, step: int, result: StepResult, micro_batches: Sequence[Batch]) -> UserError:
    """The error for a step whose loss or gradient norm is not finite. Collective; the same on every rank.

    Args:
        step: counted from 0.
        micro_batches: this rank's, on the CPU.
    """
    runtime, figures = job.state.runtime, f"loss {result.loss}, gradient norm {result.grad_norm} in step {step + 1}"
    found = runtime.gather(_bad_clips(job, step, micro_batches))
    if clips := list(dict.fromkeys(clip for share in found for clip in share)):
        return UserError(
            f"{figures}: what is encoded of {counted(len(clips), 'clip')} holds NaN or infinities: {', '.join(map(str, clips))}",
            f"remove the clips from the dataset, or their items from {job.recipe.data.cache} to have them encoded anew; "
            "then run the same command",
        )
    in_backward = job.state.in_backward is not None
    spoilt = None if in_backward else first_bad_weight(job)
    if name := first_bad_weight(job, trained=False) or (spoilt if step == 0 else None):
        return UserError(
            f"{figures}: the pretrained weights hold NaN or infinities ({name})",
            "fetch or save the model anew, and compare its files' sizes with their source",
            job.recipe.model.path,
        )
    if spoilt:
        return bad_update(job, step, spoilt)
    what = "the loss" if not math.isfinite(result.loss) else "a gradient"
    where = f"{what} is not finite, though weights, clips and captions are"
    if in_backward:  # the weights before it are gone
        where = f"{what} is not finite, and was part of the update (optimizer.in_backward)"
    elif step:
        where += f"; the weights before it are kept in {job.save(step, aside=True)}"
    items = job.order.plan(step).items
    used: list[Path] = sorted({job.prepared.train[index].path for index in items})
    return UserError(
        f"{figures}: {where}",
        f"{go_back(job, step)}, with a lower optimizer.lr or train.max_grad_norm"
        f"{_or_float32(job)}; if it comes back, look at the step's clips: {', '.join(map(str, used))}",
    )


def bad_update(job: Job, steps: int, name: str) -> UserError:
    """The error for trained weights that are not finite after `steps` steps, found before they are used or saved. Collective."""
    return UserError(
        f"the update of step {steps} has put NaN or infinities into the trained weights ({name}); they are not saved",
        f"{go_back(job, steps)}, with a lower optimizer.lr",
        str(job.recipe.run_folder),
    )


def first_bad_weight(job: Job, trained: bool = True) -> str | None:
    """The name of a parameter that is not finite, on the first rank that has one; None if all are finite. Collective.

    Args:
        trained: look at those that are trained, or at the frozen ones; of weights in few bits, at their scales.
    """
    transformer = job.state.transformer
    low_bit = [module for module in transformer.modules() if isinstance(module, LowBitLinear)]
    codes = {id(module.weight) for module in low_bit}
    scales = {id(module.weight_scale) for module in low_bit}  # NaN or infinite where a weight was, whatever its code is
    on_host = host_copies(transformer)
    held = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad == trained and id(parameter) not in codes:
            part, name = local(on_host.get(parameter, parameter.detach())), plain_name(name)
            is_scale = id(parameter) in scales
            held[name.removesuffix("_scale") if is_scale else name] = part.view(torch.float32) if is_scale else part
    parts = {name: part for name, part in held.items() if part.numel()}
    norms = torch._foreach_norm(list(parts.values()), dtype=torch.float32) if parts else []
    device = job.state.runtime.device
    values = device.read(torch.stack([norm.to(device.torch_device) for norm in norms])) if parts else []
    mine = next((name for name, norm in zip(parts, values, strict=True) if not math.isfinite(norm)), None)
    return next((name for name in job.state.runtime.gather(mine) if name), None)


def go_back(job: Job, before: int) -> str:
    """How to go on from the newest checkpoint at which the training was as it should be. Collective."""
    return job.state.runtime.from_main(_go_back(job, before) if job.state.runtime.is_main else "")


def _go_back(job: Job, before: int) -> str:
    steps = [step for step in job.checkpoints.steps() if step <= before]
    if not steps:
        return "there is no checkpoint yet: run the same command"
    sound = sound_step(steps, _losses(job.recipe.run_folder / METRICS_FILE))
    if sound == steps[-1]:
        return f"run the same command, which goes on from step {sound}"
    return f"run the same command with --resume-step {sound}, the last checkpoint before the loss rose"


def sound_step(steps: Sequence[int], losses: dict[int, float]) -> int:
    """The newest of some checkpoints whose mean loss over the 20 steps before it is at most 1.5 times the lowest such mean.

    Args:
        steps: of the checkpoints, ascending.
        losses: by step, counted from 1. Without any, the newest checkpoint is taken.
    """
    means = {step: mean for step in losses if (mean := _mean_before(step, losses)) is not None}
    lowest = min(means.values(), default=None)
    if lowest is None:
        return steps[-1]
    return next((step for step in reversed(steps) if means.get(step, lowest) <= SOUND * lowest), steps[0])


def _mean_before(step: int, losses: dict[int, float]) -> float | None:
    """Infinite if one of the losses is not finite; None if there are fewer steps than the window, or not all are known."""
    window = [losses.get(each) for each in range(step - WINDOW + 1, step + 1)]
    known = [loss if math.isfinite(loss) else math.inf for loss in window if loss is not None]
    return sum(known) / WINDOW if len(known) == WINDOW else None


def _losses(path: Path) -> dict[int, float]:
    try:
        rows = read_metrics(path)
    except (OSError, UserError):  # the message goes without
        return {}
    return {row["step"]: float(row["loss"]) for row in rows if isinstance(row.get("loss"), float)}


def _bad_clips(job: Job, step: int, micro_batches: Sequence[Batch]) -> list[Path]:
    """The clips whose tensors in this rank's batches are not finite."""
    items, found = job.order.plan(step).items, []
    for index, batch in enumerate(micro_batches):
        for place, position in enumerate(job.split.positions(index)):
            if not batch.is_finite(place):
                found.append(job.prepared.train[items[position]].path)
    return found


def _or_float32(job: Job) -> str:
    return ', or train.precision = "float32"' if job.recipe.train.precision == "bf16" else ""
