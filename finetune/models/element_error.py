"""What the loss makes of the difference between one element of a prediction and of its target."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import huber_loss, smooth_l1_loss

from finetune.recipe.schema import ObjectiveSettings


@dataclass(frozen=True)
class ElementError:
    """The square of the difference, or a function that is straight beyond `delta`.

    Attributes:
        name: as in the recipe's objective.loss.
        delta: in units of the target.
    """

    name: Literal["mse", "huber", "smooth_l1"] = "mse"
    delta: float = 1.0

    @classmethod
    def of(cls, settings: ObjectiveSettings) -> "ElementError":
        """The one that the recipe's [objective] names."""
        return cls(settings.loss, settings.loss_delta)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The error of each element, float32 in the shape of both, which are float32."""
        if self.name == "huber":
            return huber_loss(prediction, target, reduction="none", delta=self.delta)
        if self.name == "smooth_l1":
            return smooth_l1_loss(prediction, target, reduction="none", beta=self.delta)
        return (prediction - target).square()


SQUARED = ElementError()
