"""Model FLOPs utilisation: how much of the GPUs' peak rate the arithmetic of the model takes (Chowdhery et al. 2022, PaLM)."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from finetune.models.adapters import ADAPTERS
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.recipe import Bucket, Recipe
from finetune.recipe.schema import Partial
from finetune.recipe.table import Table
from finetune.runtime.gpus import Gpu
from finetune.runtime.logging import say


class Utilisation:
    """The utilisation of the GPUs in each step. It is not known where the GPU is not, and costs nothing there.

    The peak is that of bf16 or float32 as the recipe computes, also where some products are made in float8.
    """

    def __init__(self, recipe: Recipe, family: Family, gpu: Gpu | None) -> None:
        self._family, self._method, self._settings = family, recipe.train.method, recipe.adapter
        self._peak = gpu and (gpu.flops if recipe.train.precision == "bf16" else gpu.float32_flops)
        self._known: dict[Bucket, int] = {}

    def metrics(self, bucket: Bucket, batch: Batch, micro_batches: int, seconds: float) -> dict[str, float]:
        """The metric "mfu" of a step, in [0, 1]; none where it is not known.

        Args:
            batch: one of the micro-batches of a rank; its FLOPs are counted once for each bucket.
            micro_batches: how many of them each rank takes in a step.
            seconds: what the step took.
        """
        if not self._peak:
            return {}
        if bucket not in self._known:
            try:
                self._known[bucket] = step_flops(self._family, batch, self._method, self._settings)
            except (RuntimeError, NotImplementedError, TypeError) as error:  # a model that reads values of its tensors
                self._peak = None
                say(f"mfu is not reported: the FLOPs of a step cannot be counted ({str(error).partition(chr(10))[0]})")
                return {}
        return {"mfu": self._known[bucket] * micro_batches / seconds / self._peak}


def step_flops(family: Family, batch: Batch, method: str, settings: Table | None) -> int:
    """FLOPs of one forward and backward pass of a batch, counted on a transformer without data.

    What is recomputed is not counted, and neither is a LoRA. Where only a LoRA is trained, the backward pass has one matrix
    product for each of a frozen layer: the gradient of its input. Attention, and layers that are trained, have two. Where some
    weights are trained, the backward pass ends at the first of them, and is counted as it is.

    Args:
        method: the `train.method`.
        settings: of what is trained, see `Recipe.adapter`.
    Raises:
        RuntimeError: the model reads values of its tensors (NotImplementedError and TypeError likewise).
    """
    transformer = family.empty_transformer().float()
    inputs = tree_map_only(Tensor, _without_data, batch.inputs)
    if isinstance(settings, Partial):
        transformer.requires_grad_(False)
        ADAPTERS[method].add(transformer, family, settings, 0)
        # The kernels of a GPU compute attention's forward pass again in the backward pass; matrix products do not.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.autograd.backward([each.sum() for each in family.predict(transformer, inputs).values()])
        return counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.predict(transformer, inputs)
    total = counter.get_total_flops()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if {"bmm", "attention"} & _words(operation))
    return 3 * total if method == "full" else 2 * total + attention


def _words(operation: object) -> set[str]:
    """The parts of an operation's name, such as "aten._scaled_dot_product_flash_attention"."""
    return set(str(operation).replace(".", "_").split("_"))


def _without_data(tensor: Tensor) -> Tensor:
    tensor = tensor.to("meta")
    return tensor.float() if tensor.is_floating_point() else tensor
