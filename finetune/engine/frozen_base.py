"""The frozen base in a step: the transformer in training without its adapter, so that there is no second copy of it."""

import torch
from torch import nn

from finetune.models.adapters.switch import adapted_layers, without_adapter
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.runtime.errors import UserError


class FrozenBase:
    """Predicts without the adapter and without gradients, for targets with guidance."""

    def __init__(self, transformer: nn.Module) -> None:
        """
        Args:
            transformer: as it is trained, with its adapter.
        """
        self.transformer = transformer
        self.layers = adapted_layers(transformer)

    def guided(self, family: Family, batch: Batch) -> Batch:
        """The batch with guidance in its targets; see `Batch.guided`. On the device.

        With sharded weights, all ranks must call this equally often, as the transformer itself.

        Raises:
            UserError: the family makes batches without what the base would be given.
        """
        if batch.unguided is None:
            raise UserError(
                f"the batches of {family.title} have no inputs without captions",
                "have its `batch` keep `unguided` and `guidance` of the batch that Family.batch makes "
                "(dataclasses.replace), or remove the key",
                "objective.guidance_target",
            )
        with torch.no_grad(), without_adapter(self.layers):
            predictions = family.predict(self.transformer, batch.inputs | batch.unguided)
        return batch.guided(predictions)
