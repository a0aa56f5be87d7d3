"""Held-out loss: fixed noise at fixed quantiles of sigma, the same figure for every number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.data.cache import Cache
from finetune.data.loader import Item, read_sample
from finetune.engine.generate import evaluating
from finetune.engine.step import StepState
from finetune.models.batch import Tensors
from finetune.models.objective import Objective
from finetune.runtime import seeds


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over clips and quantiles by term, and what predicting zero would score."""

    losses: dict[str, float]
    zero_losses: dict[str, float]

    @property
    def loss(self) -> float:
        """The sum of all terms."""
        return sum(self.losses.values())

    @property
    def zero_loss(self) -> float:
        """The sum of all terms of predicting zero."""
        return sum(self.zero_losses.values())


def heldout_loss(
    state: StepState, objective: Objective, items: Sequence[Item], cache: Cache, quantiles: int
) -> HeldOut:
    """Measure the loss on clips that are not trained on.

    Every clip is seen at sigma(u) for u = 1/2n, 3/2n, ... with noise that depends on the clip's place alone. Data ranks
    share the evaluations and make the same number of transformer calls, since a sharded one needs all of them.
    """
    runtime, device = state.runtime, state.runtime.device
    data = runtime.data
    evaluations = [(index, (q + 0.5) / quantiles) for index in range(len(items)) for q in range(quantiles)]
    rounds = -(-len(evaluations) // data.size)
    measured: list[tuple[Tensors, Tensors]] = []
    with evaluating(state.transformer):
        for turn in range(rounds):
            place = min(turn * data.size + data.rank, len(evaluations) - 1)  # past the end: to keep in step
            index, u = evaluations[place]
            with runtime.together():
                sample = read_sample(items[index], cache, seeds.generator(state.seed, "heldout", index))
                batch = state.family.batch([sample], objective, torch.tensor([u]))
            batch = batch.to(device.torch_device)
            predictions = state.family.predict(state.transformer, batch.inputs)
            zeros = {name: torch.zeros_like(prediction) for name, prediction in predictions.items()}
            measured.append((batch.losses(predictions), batch.losses(zeros)))
    gathered = runtime.gather_data([(_figures(losses), _figures(zeros)) for losses, zeros in measured])
    in_order = [gathered[i % data.size][i // data.size] for i in range(len(evaluations))]
    losses, zeros = zip(*in_order, strict=True)
    return HeldOut(_means(losses), _means(zeros))


def _figures(losses: Tensors) -> dict[str, float]:
    """Each term of one sample on the host."""
    return {name: float(loss) for name, loss in losses.items()}


def _means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}
