"""Held-out loss: fixed noise at fixed quantiles of sigma, the same figure for every number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.data.cache import Cache
from finetune.data.loader import Item, read_sample
from finetune.engine.generate import evaluating
from finetune.engine.step import StepState, sample_losses
from finetune.models.objective import Objective
from finetune.runtime import seeds


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over clips and quantiles, and what predicting zero would score."""

    loss: float
    zero_loss: float


def heldout_loss(
    state: StepState, objective: Objective, items: Sequence[Item], cache: Cache, quantiles: int
) -> HeldOut:
    """Measure the loss on clips that are not trained on.

    Every clip is seen at sigma(u) for u = 1/2n, 3/2n, ... with noise that depends on the clip's place alone. Ranks
    share the evaluations and make the same number of transformer calls, since a sharded one needs all of them.
    """
    runtime, device = state.runtime, state.runtime.device
    rank, world = runtime.rank, runtime.world_size
    evaluations = [(index, (q + 0.5) / quantiles) for index in range(len(items)) for q in range(quantiles)]
    rounds = -(-len(evaluations) // world)
    losses: list[tuple[Tensor, Tensor]] = []
    with evaluating(state.transformer):
        for turn in range(rounds):
            index, u = evaluations[min(turn * world + rank, len(evaluations) - 1)]  # past the end: to keep in step
            with runtime.together():
                sample = read_sample(items[index], cache, seeds.generator(state.seed, "heldout", index))
                batch = state.family.batch([sample], objective, torch.tensor([u]))
            batch = batch.to(device.torch_device)
            prediction = state.family.predict(state.transformer, batch.inputs)
            losses.append((sample_losses(prediction, batch), sample_losses(torch.zeros_like(prediction), batch)))
    figures = torch.tensor([[float(loss), float(zero)] for loss, zero in losses], dtype=torch.float64)
    gathered = runtime.gather(figures.tolist())
    in_order = [gathered[i % world][i // world] for i in range(len(evaluations))]
    loss, zero = (sum(column) / len(evaluations) for column in zip(*in_order, strict=True))
    return HeldOut(loss, zero)
