"""DoRA (Liu et al. 2024): the rows of W + BA keep their directions, and get lengths of their own, which are trained.

peft's layer makes the whole matrix BA from an identity matrix in each forward pass, to measure the rows, and knows no weights of
few bits but its own. This one gives peft the same layer with the lengths computed from the products of the small matrices.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


class _Variant(DoraLinearVariant):
    """What peft calls in place of its own."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Make room for the lengths. `initial_lengths` gives their values once the base weights are there."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLinearLayer(fan_in_fan_out=False)
        layer.weight = nn.Parameter(torch.zeros(module.out_features))
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """m (W + s BA) x / |W + s BA| + bias; `result` is W x + bias. The norm is taken for a constant (section 4.3)."""
        first, second = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        base_layer = module.get_base_layer()
        weight = base_layer.weight if isinstance(base_layer, nn.Linear) else base_layer.dequantized(x.dtype)
        norm = row_norms(weight.detach(), first.weight.detach(), second.weight.detach(), scaling).to(x.dtype)
        scale = module.lora_magnitude_vector[active_adapter].weight / norm
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base = base_layer(x)
        else:
            base = result
        base = base if base_layer.bias is None else base - base_layer.bias
        # Exactly `result` where the scale is 1 and B is 0.
        return result + (scale - 1) * base + scale * (second(first(x)) * scaling)


class DoraLinear(Linear):
    """peft's adapter of a linear layer with this project's DoRA."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        return {(): None, ("use_dora",): _Variant}


def row_norms(weight: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
    """The lengths of the rows of W + s BA, float32 (out,), without that matrix: |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b.

    Args:
        weight: W (out, in).
        first, second: A (rank, in) and B (out, rank), in the dtype of W.
    """
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    mixed = ((weight @ first.T).float() * second.float()).sum(1)
    own = ((second @ (first @ first.T)).float() * second.float()).sum(1)
    return (squares + 2 * scaling * mixed + scaling**2 * own).clamp(min=0).sqrt()


def initial_lengths(weight: Tensor) -> Tensor:
    """The lengths of rows of W, float32 (out,), in the same bits as `row_norms` gives them where B is 0."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square().sqrt()
