"""The held-out loss, with fixed noise at fixed quantiles of sigma: the same for any number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from finetune.data.cache import Cache
from finetune.data.loader import Item, read_sample
from finetune.engine.parts import evaluating
from finetune.engine.step import StepState
from finetune.models.batch import Tensors
from finetune.models.noise_range import Restricted
from finetune.models.objective import Objective
from finetune.runtime import seeds
from finetune.runtime.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """Mean losses over clips and quantiles by term, and those of a prediction of zero for comparison.

    Attributes:
        outside: the same at the noise levels that are not trained; None where all are.
        by_quarter: mean loss over all terms in each quarter of the noise levels, from 0, the least noise; see `quarters_of`.
            Quarters without an evaluation are left out; empty if the family does not tell noise levels.
    """

    losses: dict[str, float]
    zero_losses: dict[str, float]
    outside: "HeldOut | None" = None
    by_quarter: dict[int, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The sum over all terms."""
        return sum(self.losses.values())

    @property
    def zero_loss(self) -> float:
        """The sum over all terms for a prediction of zero."""
        return sum(self.zero_losses.values())


def heldout_loss(
    state: StepState,
    objective: Objective,
    items: Sequence[Item],
    cache: Cache,
    quantiles: int,
    blank_key: str | None = None,
) -> HeldOut:
    """Measure the loss on clips that are not trained on, and where noise levels are restricted, outside of their range, too.

    Every clip is evaluated at sigma(u) for u = 1/2n, 3/2n, ..., with n = `quantiles`, and with noise that depends only on the
    clip's index. Data ranks share the evaluations. All ranks call the transformer equally often, because each call of a
    sharded transformer needs all of them. Collective; returns the same on every rank.

    Args:
        blank_key: of the text without a caption, for targets with guidance, which are here as in training.
    Raises:
        UserError: what is encoded of a clip cannot be read, or is not finite.
    """
    measured, outside = _measure(state, objective, items, cache, quantiles, blank_key), None
    if isinstance(objective, Restricted):
        tokens = {state.family.tokens(item.bucket) for item in items}
        if other := objective.outside(*tokens):
            outside = _measure(state, other, items, cache, quantiles, blank_key)
    return replace(measured, outside=outside)


def _measure(
    state: StepState,
    objective: Objective,
    items: Sequence[Item],
    cache: Cache,
    quantiles: int,
    blank_key: str | None,
) -> HeldOut:
    runtime, device = state.runtime, state.runtime.device
    data = runtime.data
    evaluations = [(index, (q + 0.5) / quantiles) for index in range(len(items)) for q in range(quantiles)]
    rounds = -(-len(evaluations) // data.size)
    measured: list[tuple[Tensors, Tensors, int | None]] = []
    with evaluating(state.parts, "heldout"):
        for turn in range(rounds):
            place = min(turn * data.size + data.rank, len(evaluations) - 1)  # past the end, repeat the last one
            index, u = evaluations[place]
            with runtime.together():
                generator = seeds.generator(state.seed, "heldout", index)
                sample = read_sample(items[index], cache, generator, blank_key)
                batch = state.family.batch([sample], objective, torch.tensor([u]))
                quarter = None if batch.quarters is None else int(batch.quarters)
                if not batch.is_finite(0):
                    raise UserError(
                        "what is encoded of this held-out clip holds NaN or infinities",
                        "hold out another clip, or remove its items from data.cache to have them encoded anew",
                        str(items[index].path),
                    )
            batch = batch.to(device.torch_device)
            if state.base:
                batch = state.base.guided(state.family, batch)
            predictions = state.family.predict(state.transformer, batch.inputs)
            zeros = {name: torch.zeros_like(prediction) for name, prediction in predictions.items()}
            measured.append((batch.losses(predictions), batch.losses(zeros), quarter))
    gathered = runtime.gather_data(
        [(_figures(losses), _figures(zeros), quarter) for losses, zeros, quarter in measured]
    )
    in_order = [gathered[i % data.size][i // data.size] for i in range(len(evaluations))]
    totals: dict[int, list[float]] = {}
    for losses, _, quarter in in_order:
        if quarter is not None:
            totals.setdefault(quarter, []).append(sum(losses.values()))
    return HeldOut(
        _means([losses for losses, _, _ in in_order]),
        _means([zeros for _, zeros, _ in in_order]),
        by_quarter={quarter: sum(each) / len(each) for quarter, each in sorted(totals.items())},
    )


def _figures(losses: Tensors) -> dict[str, float]:
    """The losses of a batch of one sample, as numbers on the host."""
    return {name: float(loss) for name, loss in losses.items()}


def _means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}
