"""Frozen linear layers with weights of 8 or 4 bits for LoRA, which are dequantised when they are used.

torchao's weight-only tensors fail under FSDP2 (`aten.split`; its NF4 on one rank), so codes and scales are ordinary
frozen parameters here, with one row an output, so that they shard, load and save like any other. Their bits are held in
the dtype that blocks compute in, as bitsandbytes does with `quant_storage`: FSDP2's mixed precision has nothing to cast
in it, and FSDP2 of torch 2.11 takes no integers. Quantising is round-to-nearest, by row or by block.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # NF4: weights that share a scale
_ROW = 4  # int8, float8: rows are whole numbers of float32, the largest dtype that bits are held in

# Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, appendix E)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize_blocks(lists: list[nn.ModuleList], kind: str, high_precision: str, storage: torch.dtype) -> None:
    """Replace the blocks' frozen linear layers in place.

    Args:
        kind: "none", "int8", "float8" (e4m3) or "nf4".
        high_precision: regular expression of layers that stay as they are, searched in names within a block.
        storage: FSDP's `param_dtype`, bf16 or float32.
    """
    if kind == "none":
        return
    for blocks in lists:
        for block in blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear) and not _is_kept(name, module, kind, high_precision, storage):
                    parent, _, child = name.rpartition(".")
                    setattr(block.get_submodule(parent), child, LowBitLinear(module, kind, storage))


def _is_kept(name: str, linear: nn.Linear, kind: str, high_precision: str, storage: torch.dtype) -> bool:
    if linear.weight.dtype != storage:  # it stays in float32
        return True
    odd = linear.in_features % (BLOCK if kind == "nf4" else _ROW)
    return linear.weight.requires_grad or bool(odd) or re.search(high_precision, name) is not None


class LowBitLinear(nn.Module):
    """y = x W^T + b with W kept as codes of 8 or 4 bits (out, ...) and float32 scales (out, ...), both held as bits of
    `storage`: as numbers they mean nothing, and may be NaN.
    """

    table: Tensor | None

    def __init__(self, linear: nn.Linear, kind: str, storage: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, linear.weight.dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = quantize(linear.weight.detach(), kind)
        self.weight = nn.Parameter(codes.view(storage), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.view(storage), requires_grad=False)
        self.bias = linear.bias
        self._trains_bias = self.bias is not None and self.bias.requires_grad
        # A table that goes to the device with the layer: a new one in each product would make the host wait for its copy.
        self.register_buffer("table", pairs_table() if kind == "nf4" else None, persistent=False)

    def fill(self, codes: Tensor, scale: Tensor, weight: Tensor) -> None:
        """Quantise rows of a weight, rounded to the layer's own dtype first, and write them to `codes` and `scale`.

        Args:
            codes, scale: the rows' part of `weight` and `weight_scale`, or of a copy of them.
            weight: (rows, in), on the device that quantises.
        """
        new_codes, new_scale = quantize(weight.to(self.dtype), self.kind)
        codes.copy_(new_codes.view(codes.dtype))
        scale.copy_(new_scale.view(scale.dtype))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The whole weight (out, in)."""
        return dequantize(self.weight, self.weight_scale, self.kind, dtype, self.table)

    def rounded(self, weight: Tensor) -> Tensor:
        """Rows of a weight (rows, in) as they are once they have been held in few bits, in the layer's own dtype."""
        return dequantize(*quantize(weight.to(self.dtype), self.kind), self.kind, self.dtype, self.table)

    def forward(self, x: Tensor) -> Tensor:
        if self._trains_bias:  # the product has no gradient for it
            return _Product.apply(x, self.weight, self.weight_scale, self.table, None, self.kind) + self.bias
        return _Product.apply(x, self.weight, self.weight_scale, self.table, self.bias, self.kind)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """Saves codes and scales for the backward pass instead of the dequantised weight."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, codes: Tensor, scale: Tensor, table: Tensor | None, bias: Tensor | None, kind: str
    ) -> Tensor:
        context.save_for_backward(codes, scale, table)
        context.kind = kind
        return nn.functional.linear(x, dequantize(codes, scale, kind, x.dtype, table), bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, table = context.saved_tensors
        if torch.compiler.is_compiling():
            return _input_gradient(gradient, codes, scale, table, context.kind), None, None, None, None, None
        return gradient @ dequantize(codes, scale, context.kind, gradient.dtype, table), None, None, None, None, None


@torch.library.custom_op("finetune::low_bit_input_gradient", mutates_args=())
def _input_gradient(gradient: Tensor, codes: Tensor, scale: Tensor, table: Tensor | None, kind: str) -> Tensor:
    """A custom operation, because torch.compile would otherwise save the dequantised weight of the forward pass for it."""
    return gradient @ dequantize(codes, scale, kind, gradient.dtype, table)


@_input_gradient.register_fake
def _(gradient: Tensor, codes: Tensor, scale: Tensor, table: Tensor | None, kind: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], codes.shape[1] * codes.itemsize * (2 if kind == "nf4" else 1))


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, float32 scales) of a weight (out, in). Codes are int8, float8 as uint8, or two of nf4 in a uint8."""
    weight = weight.float()
    if kind == "nf4":
        blocks = weight.view(len(weight), -1, BLOCK)
        scale = blocks.abs().amax(2)
        table = torch.tensor(_NF4, device=weight.device)
        middles = (table[1:] + table[:-1]) / 2
        index = torch.bucketize(blocks / scale.clamp(min=1e-12)[..., None], middles).to(torch.uint8).flatten(1)
        return index[:, ::2] << 4 | index[:, 1::2], scale
    limit = 127.0 if kind == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scale = weight.abs().amax(1, keepdim=True) / limit
    scaled = weight / scale.clamp(min=1e-12)
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale


def pairs_table() -> Tensor:
    """The two values of each byte of NF4 codes, float32 (256, 2)."""
    values = torch.tensor(_NF4)
    return torch.cartesian_prod(values, values)


def dequantize(codes: Tensor, scale: Tensor, kind: str, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
    """The weight (out, in) in `dtype`, from the bits of codes and scales; multiplied in float32, rounded once.

    Args:
        table: from `pairs_table`, on the device of the codes, for "nf4".
    """
    scale = scale.view(torch.float32)
    if kind == "nf4":
        table = pairs_table().to(codes.device) if table is None else table
        pairs = nn.functional.embedding(codes.view(torch.uint8).int(), table)  # indexing would make the indices int64
        return (pairs.view(len(codes), -1, BLOCK) * scale[..., None]).flatten(1).to(dtype)
    values = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return (values.float() * scale).to(dtype)
