"""The recipe's [ema]: a moving average of the trained weights."""

from typing import Annotated

from pydantic import Field

from finetune.recipe.choices import AveragePlace, Purpose
from finetune.recipe.table import Free, Table


class Ema(Table):
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of what is trained, in float32: average = decay x average + (1 - decay) x weights. Unset:
    none. 0.999 averages over about a thousand updates. The first update takes the weights as they are."""
    warmup: bool = True
    """Begin with a lower decay, min(decay, (1 + n) / (10 + n)) after n updates, as diffusers' EMAModel does."""
    every: Annotated[int, Field(ge=1)] = 1
    """Update the average each this many optimizer steps; `decay` is that of an update."""
    device: AveragePlace = Free("device")
    """Where the average is, which takes 4 bytes of each trained parameter that a rank holds."""
    use: Annotated[list[Purpose], Field(min_length=1)] = Free(["samples", "heldout", "export"])
    """What the average stands in for the weights in."""
