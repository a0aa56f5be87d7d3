"""Begins a training's adapter with the weights of another one."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.engine.weights.loading import local_rows, plain_name
from finetune.models.adapters import ADAPTER
from finetune.models.adapters.given import check_fits
from finetune.models.adapters.reading import LowRank, ReadAdapter
from finetune.runtime.logging import say
from finetune.runtime.units import counted


def start_adapter(transformer: nn.Module, adapter: ReadAdapter) -> None:
    """Give the trained adapter the weights of one that was read, in place, on each rank those that it holds.

    lora_B takes up the quotient of the two scales, so that what the adapter adds is the same: exactly if the quotient is a power of
    two, else rounded once in float32. Where the trained one has a higher rank, its further rows of lora_A stay as they were
    drawn, and add nothing at first, since lora_B is zero there.

    Args:
        transformer: after `parallelize`, with memory for its parameters.
    Raises:
        UserError: it has a layer that the trained one has not, or a higher rank.
    """
    layers = {plain_name(name): module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    check_fits(adapter, {name: module.r[ADAPTER] for name, module in layers.items()})
    with torch.no_grad():
        for name, read in adapter.layers.items():
            module = layers[name]
            lora_A, lora_B = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            _start(lora_A, lora_B, read, module.scaling[ADAPTER])
    new = len(layers) - len(adapter.layers)
    ranks = sorted({read.rank for read in adapter.layers.values()})
    say(
        f"the adapter begins as {adapter.file}: {counted(len(adapter.layers), 'layer')} of rank {', '.join(map(str, ranks))}"
        + (f"; {new} more begin anew" if new else "")
    )


def _start(lora_A: Tensor, lora_B: Tensor, read: LowRank, scale: float) -> None:
    rows, start, stop = local_rows(lora_A)
    theirs = read.lora_A[start:stop]  # fewer, or none, where the rank is higher here
    rows[: len(theirs)].copy_(theirs)
    rows, start, stop = local_rows(lora_B)
    rows[:, : read.rank].copy_(read.lora_B[start:stop].float() * (read.scale / scale))
    rows[:, read.rank :].zero_()
