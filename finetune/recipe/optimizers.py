"""The settings of each optimizer, a kind of the recipe's [optimizer] each.

A new optimizer is a class here with its names in `OPTIMIZERS`, and in `finetune/engine/optimizers/` a file that builds it, with a
line in `BUILDERS`.
"""

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from finetune.recipe.choices import LowBitMoments, OptimizerOffload
from finetune.recipe.table import ByName, Free, Table

Rate = Annotated[float, Field(gt=0)]
Decays = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
NotNegative = Annotated[float, Field(ge=0)]


class Optimizer(Table):
    """What [optimizer] has of every kind."""

    name: str
    """Which optimizer."""
    lr: Rate = Free(1e-4)
    """Peak learning rate."""
    offload: OptimizerOffload = Free("none")
    """What of the optimizer is in host memory."""
    in_backward: bool = Free(False)
    """Full finetuning: update each block as soon as its gradients are there, and drop them. A step's gradients are then never in
    memory together, and cannot be clipped: train.max_grad_norm = "none"."""


class Moments(Optimizer):
    """What optimizers with Adam's two moments share."""

    betas: Decays = Field(default=[0.9, 0.95])
    """Adam's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator floor."""
    weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""


class Adam(Moments):
    """What the kinds of AdamW share: one algorithm, whose moments are held in different dtypes."""


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2019), with its two moments in float32."""

    name: Literal["adamw"] = "adamw"
    """AdamW, with its two moments in float32; in bf16, "adamw_bf16"; or (torchao) in 8 bits, 4 bits or float8: "adamw_8bit",
    "adamw_4bit", "adamw_fp8". Others are "lion", "adafactor", "prodigy", "schedule_free_adamw" and "muon"."""


class LowBitAdamW(Adam):
    """AdamW, with its two moments in 8 bits, 4 bits or float8."""

    name: LowBitMoments
    """AdamW, with its two moments (torchao) in 8 bits, 4 bits or float8."""


class Bf16AdamW(Adam):
    """AdamW, with its two moments in bf16."""

    name: Literal["adamw_bf16"]
    """AdamW, with its two moments in bf16, half of float32's bytes. They are rounded stochastically, so that changes that are too
    small for bf16 add up all the same. The update is computed in float32, for one parameter at a time."""


class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of an average of gradients, with one moment. Of pytorch-optimizer."""

    name: Literal["lion"]
    """The sign of an averaged gradient: one moment in place of Adam's two. Needs the extra "optimizers"."""
    lr: Rate = Free(3e-5)
    """Peak learning rate. Each weight moves by it at each step, so take a third to a tenth of what suits AdamW."""
    betas: Decays = Field(default=[0.9, 0.99])
    """How much of the moment is in the update, and how much of it is kept."""
    weight_decay: NotNegative = 1e-3
    """Decoupled weight decay: three to ten times that of AdamW, as it is multiplied by the lower rate."""


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018), with its second moment as one row and one column a matrix. Of torch."""

    name: Literal["adafactor"]
    """The second moment as a row and a column of each matrix, next to nothing in bytes, and no first moment."""
    lr: Rate = Free(1e-2)
    """Largest change of a matrix in a step, as a share of the root mean square of its weights (of 1e-3, if that is more): 1e-2
    suits adapters, and 1e-3 full finetuning."""
    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    """The second moment forgets 1 - step ** beta2_decay of what it had."""
    clip_threshold: Annotated[float, Field(ge=1)] = 1.0
    """A matrix's update is scaled down to this root mean square, before the rate."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""


class Prodigy(Moments):
    """Prodigy (Mishchenko & Defazio 2023): Adam that estimates its learning rate. Of pytorch-optimizer."""

    name: Literal["prodigy"]
    """Adam that estimates the rate from how far the weights have come; the estimate is the metric "d". For adapters, or full
    finetuning on one GPU: it holds four values for each weight. Needs the extra "optimizers"."""
    lr: Rate = Free(1.0)
    """A factor on the rate that is estimated; leave it at 1."""
    betas: Decays = Field(default=[0.9, 0.999])
    """Adam's moment decays."""
    weight_decay: NotNegative = 1e-2
    """Decoupled weight decay, multiplied by the estimated rate."""
    d0: Annotated[float, Field(gt=0)] = 1e-6
    """The first estimate: lower than the rate that will be found, which it grows to within the first tens of steps."""
    d_coef: Annotated[float, Field(gt=0)] = 1.0
    """A factor on the estimate: 0.5 to 2 for slower or faster training."""


class ScheduleFreeAdamW(Moments):
    """Schedule-free AdamW (Defazio et al. 2024), which averages weights in place of a falling rate. Of pytorch-optimizer."""

    name: Literal["schedule_free_adamw"]
    """AdamW with an average of the weights in place of a falling rate: samples, held-out loss and exports are the average's. Take
    schedule.name = "constant_with_warmup". Needs the extra "optimizers"."""
    lr: Rate = Free(3e-4)
    """Peak learning rate: one to ten times that of AdamW with a schedule."""
    betas: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.999]
    )
    """Gradients are taken between the average (1) and the fastest weights (0); decay of the second moment."""


class Muon(Moments):
    """Muon (Jordan et al. 2024): orthogonalised momentum for the blocks' matrices, AdamW for all other weights. Of torch."""

    name: Literal["muon"]
    """The blocks' matrices are moved by their momentum with all singular values near 1, at about the size of an AdamW step; all
    else is trained by AdamW with `betas` and `eps`. One moment for matrices. Several GPUs gather each matrix for its update."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the matrices' moment, which is used with Nesterov's look ahead."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations, in bf16."""


OPTIMIZERS: dict[str, type[Table]] = {
    "adamw": AdamW,
    "adamw_8bit": LowBitAdamW,
    "adamw_4bit": LowBitAdamW,
    "adamw_fp8": LowBitAdamW,
    "adamw_bf16": Bf16AdamW,
    "lion": Lion,
    "adafactor": Adafactor,
    "prodigy": Prodigy,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "muon": Muon,
}
AnyOptimizer = Annotated[SerializeAsAny[Optimizer], ByName(OPTIMIZERS, "adamw")]
