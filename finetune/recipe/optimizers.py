"""The settings of each optimizer, a kind of the recipe's [optimizer] each.

A new optimizer is a class here with its names in `OPTIMIZERS`, and in `finetune/engine/optimizers/` a file that builds it, with a
line in `BUILDERS`.
"""

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from finetune.recipe.table import ByName, Free, Table


class Optimizer(Table):
    """What [optimizer] has of every kind."""

    name: str
    """Which optimizer."""
    lr: Annotated[float, Field(gt=0)] = Free(1e-4)
    """Peak learning rate."""
    offload: Literal["none", "state", "state_and_gradients"] = Free("none")
    """Keep the optimizer's state in host memory, and make updates on the CPU, while weights stay on the GPU. "state_and_gradients":
    gradients, too, leave the GPU as soon as they are whole; they cannot be accumulated."""
    in_backward: bool = Free(False)
    """Full finetuning: update each block as soon as its gradients are there, and drop them. A step's gradients are then never in
    memory together, and cannot be clipped: train.max_grad_norm = "none"."""


class Adam(Optimizer):
    """What the kinds of Adam share."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95]
    )
    """Adam's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator floor."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay."""


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2019), with its two moments in float32."""

    name: Literal["adamw"] = "adamw"
    """AdamW, with its two moments in float32; or (torchao) in 8 bits, 4 bits or float8: "adamw_8bit", "adamw_4bit", "adamw_fp8"."""


class LowBitAdamW(Adam):
    """AdamW, with its two moments in 8 bits, 4 bits or float8."""

    name: Literal["adamw_8bit", "adamw_4bit", "adamw_fp8"]
    """AdamW, with its two moments (torchao) in 8 bits, 4 bits or float8."""


OPTIMIZERS: dict[str, type[Table]] = {
    "adamw": AdamW,
    "adamw_8bit": LowBitAdamW,
    "adamw_4bit": LowBitAdamW,
    "adamw_fp8": LowBitAdamW,
}
AnyOptimizer = Annotated[SerializeAsAny[Optimizer], ByName(OPTIMIZERS, "adamw")]
