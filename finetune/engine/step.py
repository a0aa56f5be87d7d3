"""One optimizer step: the same function for training, benchmarks, tests and simulation."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from operator import add
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR

from finetune.engine.companion import Companion
from finetune.engine.frozen_base import FrozenBase
from finetune.engine.gradients import grad_norm, local, local_norms, part_of
from finetune.engine.optimizers.in_backward import InBackward
from finetune.engine.optimizers.offloaded import HostGradients, OffloadedOptimizer
from finetune.engine.parts import Part
from finetune.engine.savers.offload import ActivationOffload
from finetune.engine.watching import Watching
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.runtime import seeds
from finetune.runtime.distributed import Runtime, host_threads


@dataclass
class StepState:
    """What a step works on. `max_grad_norm` is None for no clipping.

    `parts` are what is saved, follows the updates, and is swapped for evaluation: the weights first, then the optimizer.
    `activations` sends what the forward pass saves to host memory, if it is there. `in_backward` updates while the backward
    pass runs, if it is there. `host_gradients` has the gradients, if they do not stay on the device.
    `base` predicts without the adapter, if the target has guidance in it.
    `companion` is the other transformer that samples are generated with, if there is one.
    `watching` collects further figures, if it is there.
    `defer_reduction` keeps gradients whole until the last accumulation step: less traffic, but memory for one whole
    gradient a rank, so it is for adapters.
    """

    family: Family
    transformer: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    parts: list[Part]
    schedule: LambdaLR
    runtime: Runtime
    max_grad_norm: float | None
    defer_reduction: bool
    seed: int
    activations: ActivationOffload | None = None
    in_backward: InBackward | None = None
    host_gradients: HostGradients | None = None
    base: FrozenBase | None = None
    companion: Companion | None = None
    watching: Watching | None = None


@dataclass(frozen=True)
class StepResult:
    """Host figures of a step: mean loss of the global batch by term, global gradient norm before clipping, learning rate.

    `updated` is False if loss or norm was not finite: then no parameter has changed, but for updates in the backward pass.
    `stop` is True if any rank asked. `watched` are metrics that are not reported each step; see `Watching`.
    """

    losses: dict[str, float]
    grad_norm: float
    lr: float
    updated: bool
    stop: bool
    watched: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The sum of all terms, whose gradient the update followed."""
        return sum(self.losses.values())


def run_step(state: StepState, step: int, micro_batches: Sequence[Batch], stop: bool = False) -> StepResult:
    """Accumulate the gradients of `micro_batches`, clip them by their global norm, and update.

    The host waits for the device once, for loss, norm and stop votes together.

    Args:
        step: number of the step from 0; seeds what is drawn on the device: dropout by the share of the data, the rounding of
            bf16 weights by the part of the weights, so that replicas stay equal.
        micro_batches: this rank's share of the global batch, on the CPU.
        stop: this rank's wish to end the run after this step.
    """
    device = state.runtime.device
    device.reseed(seeds.derive(state.seed, "device", step, state.runtime.data.rank))  # dropout
    lr = float(state.schedule.get_last_lr()[0])  # torchao's optimizers have it in a tensor on the CPU
    update_seed = seeds.derive(state.seed, "update", step, *part_of(state.parameters[0]))
    if state.in_backward:
        state.in_backward.before_first = partial(device.reseed, update_seed)
    totals = {name: torch.zeros((), device=device.torch_device) for name in micro_batches[0].terms}
    for index, batch in enumerate(micro_batches):
        if state.defer_reduction and len(micro_batches) > 1:
            cast(FSDPModule, state.transformer).set_requires_gradient_sync(index + 1 == len(micro_batches))
        batch = batch.to(device.torch_device)
        if state.base:
            batch = state.base.guided(state.family, batch)
        with state.activations.saving() if state.activations else nullcontext():
            predictions = state.family.predict(state.transformer, batch.inputs)
        of_samples = batch.losses(predictions)
        losses = {name: each.mean() / len(micro_batches) for name, each in of_samples.items()}
        reduce(add, losses.values()).backward()
        if state.watching:
            state.watching.add(batch, of_samples)
        for name, loss in losses.items():
            totals[name] += loss.detach()

    norms: dict[Tensor, Tensor] = {}
    if state.in_backward:
        norm = state.in_backward.norm()
        norms = state.in_backward.norms.taken
    elif state.host_gradients:
        norm = state.host_gradients.norm()
        norms = state.host_gradients.norms.taken
    else:
        if state.watching and state.watching.wants_norms(step):
            norms = local_norms(state.parameters)  # before they are clipped
        norm = grad_norm(state.parameters, state.max_grad_norm)
    watched = state.watching.due(step, norms) if state.watching else {}
    # All ranks of a context hold the same loss, so the mean over all ranks is the mean over the data ranks.
    means = [total / state.runtime.world_size for total in totals.values()]
    report = torch.stack([*means, torch.full((), float(stop), device=device.torch_device)])
    if state.runtime.world_size > 1:
        dist.all_reduce(report)
    figures = device.read(torch.cat([report, norm.to(report.device).view(1), *watched.values()]))
    *mean_losses, votes, host_norm = figures[: len(report) + 1]
    further = iter(figures[len(report) + 1 :])
    read = {name: list(islice(further, len(values))) for name, values in watched.items()}

    finite = all(map(math.isfinite, (*mean_losses, host_norm)))
    if finite:
        if not state.in_backward:
            device.reseed(update_seed)
            if state.host_gradients:
                state.host_gradients.clip(host_norm, state.max_grad_norm)
            on_cpu = isinstance(state.optimizer, OffloadedOptimizer) or local(state.parameters[0]).is_cpu
            with host_threads(state.runtime, used=on_cpu):
                state.optimizer.step()
        state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    if finite:  # once the gradients' memory is free
        for part in state.parts:
            part.after_step(step)
    means_by_term = dict(zip(totals, mean_losses, strict=True))
    metrics = state.watching.named(read) if state.watching else {}
    return StepResult(means_by_term, host_norm, lr, updated=finite, stop=votes > 0, watched=metrics)
