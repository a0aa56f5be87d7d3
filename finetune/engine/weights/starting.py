"""Begins a training's adapter with the weights of another one."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.engine.weights.loading import local_rows, plain_name
from finetune.models.adapters import ADAPTER
from finetune.models.adapters.reading import LowRank, ReadAdapter
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say


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
    if missing := sorted(adapter.layers.keys() - layers.keys()):
        raise missing_layers(missing, adapter)
    with torch.no_grad():
        for name, read in adapter.layers.items():
            module = layers[name]
            lora_A, lora_B = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            if read.rank > lora_A.shape[0]:
                raise higher_rank(read.rank, lora_A.shape[0], adapter)
            _start(lora_A, lora_B, read, module.scaling[ADAPTER])
    new = len(layers) - len(adapter.layers)
    ranks = sorted({read.rank for read in adapter.layers.values()})
    say(
        f"the adapter begins as {adapter.file}: {len(adapter.layers)} layers of rank {', '.join(map(str, ranks))}"
        + (f"; {new} more begin anew" if new else "")
    )


def _start(lora_A: Tensor, lora_B: Tensor, read: LowRank, scale: float) -> None:
    rows, start, stop = local_rows(lora_A)
    theirs = read.lora_A[start:stop]  # fewer, or none, where the rank is higher here
    rows[: len(theirs)].copy_(theirs)
    rows, start, stop = local_rows(lora_B)
    rows[:, : read.rank].copy_(read.lora_B[start:stop].float() * (read.scale / scale))
    rows[:, read.rank :].zero_()


def missing_layers(missing: list[str], adapter: ReadAdapter) -> UserError:
    """For layers of an adapter that are not among lora.targets."""
    ends = sorted({name.split(".", 2)[-1] for name in missing})
    what = f"{adapter.file} adapts {len(missing)} layers that are not among the targets, {missing[0]} among them"
    return UserError(what, f"name them, too: lora.targets has to have {', '.join(ends)}", "lora.start_from")


def higher_rank(theirs: int, ours: int, adapter: ReadAdapter) -> UserError:
    """For an adapter that does not fit into the rank of the trained one."""
    what = f"{adapter.file} has rank {theirs}, which does not fit into {ours}"
    return UserError(what, f"set lora.rank = {theirs}", "lora.rank")
