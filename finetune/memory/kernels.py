"""Kernels of GPUs, as far as memory goes: where they differ from what torch makes of an operation without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.memory.work import Work

KIND = "simulated"  # the device's name

# cuBLAS keeps a workspace for a process from its first matrix product on (aten/src/ATen/cuda/CUDABlas.cpp): the default of
# CUBLAS_WORKSPACE_CONFIG, :4096:2:16:8, is two pieces of 4096 KiB and eight of 16; a Hopper's is 32 MiB.
WORKSPACE = (2 * 4096 + 8 * 16) * 1024
HOPPER_WORKSPACE = 32 * 2**20
MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

# Kernels that copy an input which is not contiguous (aten/src/ATen/native/cuda/layer_norm_kernel.cu, group_norm.cpp, SoftMax.cu):
# its place among the arguments. torch's meta kernels do not.
MADE_CONTIGUOUS = {
    torch.ops.aten.native_layer_norm.default: 0,
    torch.ops.aten.native_layer_norm_backward.default: 1,
    torch.ops.aten.native_group_norm.default: 0,
    torch.ops.aten._softmax.default: 0,
}


class Attention(torch.autograd.Function):
    """The fused kernels' memory: they keep query, key, value, output and a float32 log-sum-exp (Dao et al. 2022), and their
    backward pass makes the three gradients. With `inside` also what it makes for itself
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu and flash_attn/flash_api.cpp, mha_bwd): output and its gradient
    in order as (B, N, H, D), row sums, and the query's gradient in float32, rows rounded to 128 and heads to 32 (to 64 beyond
    128). The memory-efficient kernel, which takes masks and float32, has a workspace as large.
    """

    inside = True
    work: Work | None = None  # where its matrix products are counted

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and query.dtype != torch.float32:
            out = torch.zeros_like(query)  # the flash kernel's lies in memory as the query does
        else:  # the memory-efficient kernel's always as (B, N, H, D) (aten/native/transformers/cuda/attention.cu)
            out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        if Attention.work is not None:
            Attention.work.attention(query, key, products=2)
        sums = torch.zeros(query.shape[:-1], dtype=torch.float32, device=query.device)
        context.save_for_backward(query, key, value, out, sums, *([mask] if mask is not None else []))
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums, *_ = context.saved_tensors
        if Attention.work is not None:
            Attention.work.attention(query, key, products=5)
        if not Attention.inside:
            torch.zeros_like(sums)
            return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), None
        in_order = gradient.transpose(1, 2).contiguous(), out.transpose(1, 2).contiguous()
        gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        batch, heads, rows, width = query.shape
        rounding = 32 if width <= 128 else 64
        rows, width = -(-rows // 128) * 128, -(-width // rounding) * rounding
        row_sums, accumulator = sums.new_empty(batch, heads, rows), sums.new_empty(batch, rows, heads, width)
        del in_order, row_sums, accumulator
        return *gradients, None


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as far as memory goes: its numbers are zeros. A mask of truth values becomes one of
    numbers (aten/native/transformers/attention.cpp).
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    return Attention.apply(query, key, value, attn_mask)


def register() -> None:
    """Give them to torch, for the simulated device."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", fused_attention, "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", fused_attention, "PrivateUse1")
    # Without a kernel torch takes it apart, into five temporaries.
    library.impl("silu_backward", lambda gradient, _: torch.empty_like(gradient), "PrivateUse1")
    any_operation = torch.library.Library("_", "IMPL")  # Mochi turns autocast off, for every kind of device
    any_operation.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    register.kept = library, any_operation  # they end with their registrations
