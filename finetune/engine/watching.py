"""What is watched of a step besides its loss: the loss by noise level, and the gradient norm of each block.

Sums stay on the device until a step reports them, with the one read of that step.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.engine.gradients import replicas
from finetune.models.batch import Batch, Tensors
from finetune.recipe.schema import Tracking
from finetune.runtime.device import Device

QUARTERS = 4


class Watching:
    """Collects figures over the steps and gives them at those steps at which they are due. All ranks call it alike.

    The loss of a quarter of the noise levels is the mean over the samples of all ranks in it, weighted as in the loss, since it was
    last reported or the run was resumed. Contexts count each of their ranks, which changes no mean.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], blocks: tuple[str, ...], device: Device, settings: Tracking
    ) -> None:
        """
        Args:
            parameters: the trained ones by name.
            blocks: names of the lists of blocks; what is trained outside of them is called "other".
        """
        self.settings, self._device = settings, device.torch_device
        self._sums: Tensors = {}  # term -> sums of losses, float32 (4,)
        self._counts: Tensor | None = None  # samples, float32 (4,)
        self._blocks: dict[str, list[Tensor]] = {}
        for name, parameter in parameters.items():
            self._blocks.setdefault(_block_of(name, blocks), []).append(parameter)

    def wants_norms(self, step: int) -> bool:
        """Whether the step, counted from 0, reports the norms of blocks."""
        return _is_due(self.settings.block_norms_every, step)

    def add(self, batch: Batch, losses: Tensors) -> None:
        """Count the losses of a batch on the device: by term, float32 (B,)."""
        if batch.quarters is None:
            return
        numbers = torch.arange(QUARTERS, device=self._device)
        members = (batch.quarters == numbers[:, None]).float()  # (4, B)
        if self._counts is None:
            self._counts = torch.zeros(QUARTERS, device=self._device)
        self._counts += members.sum(1)
        for name, each in losses.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(QUARTERS, device=self._device)
            self._sums[name] += (members * each.detach()).sum(1)

    def due(self, step: int, norms: dict[Tensor, Tensor]) -> dict[str, Tensor]:
        """What a step reports, over all ranks: tensors of float32 on the device, to be read and given to `named`.

        Args:
            step: its number from 0.
            norms: of this rank's part of each gradient, by parameter; needed where `wants_norms`.
        """
        found: dict[str, Tensor] = {}
        if _is_due(self.settings.quantiles_every, step) and self._counts is not None:
            sums = torch.stack([self._counts, *self._sums.values()])
            if dist.get_world_size() > 1:
                dist.all_reduce(sums)
            found["counts"] = sums[0]
            found |= {f"term {name}": each for name, each in zip(self._sums, sums[1:], strict=True)}
            self._sums, self._counts = {}, None
        if self.wants_norms(step):
            found["blocks"] = self._block_norms(norms)
        return found

    def named(self, figures: dict[str, list[float]]) -> dict[str, float]:
        """Metrics from what `due` gave, read by the host. A quarter without samples has none."""
        metrics: dict[str, float] = {}
        terms = {name.removeprefix("term "): sums for name, sums in figures.items() if name.startswith("term ")}
        for quarter, count in enumerate(figures.get("counts", [])):
            if count:
                metrics[f"loss_sigma/q{quarter + 1}"] = sum(sums[quarter] for sums in terms.values()) / count
                if len(terms) > 1:
                    by_term = {
                        f"loss_sigma/q{quarter + 1}/{name}": sums[quarter] / count for name, sums in terms.items()
                    }
                    metrics |= by_term
        if "blocks" in figures:
            metrics |= {f"grad_norm/{name}": norm for name, norm in zip(self._blocks, figures["blocks"], strict=True)}
        return metrics

    def _block_norms(self, norms: dict[Tensor, Tensor]) -> Tensor:
        """Global L2 norm of the gradients of each block: float32 (n,)."""
        nothing = torch.zeros((), device=next(iter(norms.values())).device)
        squares = torch.stack(
            [
                torch.stack([norms.get(parameter, nothing) / replicas(parameter) ** 0.5 for parameter in block])
                .square()
                .sum()
                for block in self._blocks.values()
            ]
        )
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        return squares.sqrt().to(self._device)


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and (step + 1) % every == 0


def _block_of(name: str, lists: tuple[str, ...]) -> str:
    """The block that a parameter is in, such as "transformer_blocks.3"."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in lists else "other"
