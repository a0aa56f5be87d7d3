"""GPU kernels as far as memory goes: where they allocate otherwise than torch's meta kernels say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.engine.savers.activation import ATTENTION

KIND = "simulated"  # the device's name

# cuBLAS allocates a workspace at a process's first matrix product, and keeps it (aten/src/ATen/cuda/CUDABlas.cpp): the default of
# CUBLAS_WORKSPACE_CONFIG, :4096:2:16:8, is two pieces of 4096 KiB and eight of 16; a Hopper's is 32 MiB.
WORKSPACE = (2 * 4096 + 8 * 16) * 1024
HOPPER_WORKSPACE = 32 * 2**20
MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

UNINITIALISED = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}

# Kernels that copy an input if it is not contiguous, and the input's place among the arguments. torch's meta kernels do not copy
# (aten/src/ATen/native/cuda/layer_norm_kernel.cu, group_norm.cpp, SoftMax.cu).
MADE_CONTIGUOUS = {
    torch.ops.aten.native_layer_norm.default: 0,
    torch.ops.aten.native_layer_norm_backward.default: 1,
    torch.ops.aten.native_group_norm.default: 0,
    torch.ops.aten._softmax.default: 0,
}


@torch.library.custom_op("finetune::fused_attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, efficient: bool) -> tuple[Tensor, Tensor]:
    """(output, float32 log-sum-exp): what fused kernels save beside their inputs (Dao et al. 2022). All values are zero.

    Args:
        efficient: whether by the memory-efficient kernel, whose output is always (B, N, H, D) in memory, and which rounds the
            rows of its sums up to 32 (kAlignLSE). The output of the flash kernels and cuDNN's has the strides of the query. All in
            aten/native/transformers/cuda/attention.cu. Seeds for dropout, which all keep, are two numbers.
    """
    *sizes, rows = query.shape[:-1]
    if efficient:
        out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        rows = -(-rows // 32) * 32
    else:
        out = torch.zeros_like(query)
    return out, torch.zeros((*sizes, rows), dtype=torch.float32, device=query.device)


@torch.library.custom_op("finetune::fused_attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


attention.register_fake(attention._init_fn)
attention_backward.register_fake(attention_backward._init_fn)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *([inputs[3]] if inputs[3] is not None else []))


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, sums, *_ = ctx.saved_tensors
    return *attention_backward(gradient, query, key, value, out, sums), None, None


attention.register_autograd(_backward, setup_context=_keep)

FORWARD = torch.ops.finetune.fused_attention.default
BACKWARD = torch.ops.finetune.fused_attention_backward.default


Piece = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a temporary."""


def made_before(function: Any, arguments: tuple) -> list[Piece]:
    """Temporaries that a kernel allocates before its results, like contiguous copies of inputs. Attention's backward copies its
    output and its gradient unless they are (B, N, H, D) in memory (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
    """
    if function is BACKWARD:
        gradient, out = arguments[0], arguments[4]
        return [(each.shape, each.dtype) for each in (gradient, out) if not each.transpose(1, 2).is_contiguous()]
    if function is torch.ops.aten._safe_softmax.default:
        # Of "math": a softmax, and which scores are -inf (attention.cpp).
        scores = arguments[0]
        return [(scores.shape, scores.dtype), (scores.shape, torch.bool)]
    place = MADE_CONTIGUOUS.get(function)
    if place is None or arguments[place].is_contiguous():
        return []
    return [(arguments[place].shape, arguments[place].dtype)]


def made_after(function: Any, arguments: tuple) -> list[Piece]:
    """Temporaries that a kernel allocates after its results. Attention's backward pass has row sums, and accumulates the query's
    gradient in float32, with rows rounded to 128 and head width to 32, or to 64 above 128 (flash_attn/flash_api.cpp there,
    mha_bwd). The memory-efficient kernel, for masks and float32, has a workspace of the same size.
    """
    if function is not BACKWARD:
        return []
    batch, heads, rows, width = arguments[1].shape
    rounding = 32 if width <= 128 else 64
    rows, width = -(-rows // 128) * 128, -(-width // rounding) * rounding
    return [((batch, heads, rows), torch.float32), ((batch, rows, heads, width), torch.float32)]


def attention_flops(function: Any, arguments: tuple) -> int:
    """FLOPs of attention: two matrix products in the forward pass, five in the backward pass. 0 for other operations."""
    if function not in (FORWARD, BACKWARD):
        return 0
    query, key = arguments[:2] if function is FORWARD else arguments[1:3]
    batch, heads, rows, width = query.shape
    return (2 if function is FORWARD else 5) * 2 * batch * heads * rows * key.shape[-2] * width


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
    """`scaled_dot_product_attention` as far as memory goes; its output is zero but for "math". A boolean mask is converted to the
    query's dtype (aten/native/transformers/attention.cpp).

    Which kernel it is follows torch's switches, as on a GPU: where there is a choice, the memory-efficient one takes masks and
    float32. That cuDNN is a Hopper's first choice makes no difference to what is allocated, except with a mask.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    cuda = torch.backends.cuda
    efficient, cudnn, flash = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()
    if not (efficient or cudnn or flash):  # products, a softmax and products, in float32
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    is_odd = attn_mask is not None or query.dtype == torch.float32
    return attention(query, key, value, attn_mask, efficient and (is_odd or not (cudnn or flash)))[0]


_REGISTERED: list[torch.library.Library] = []  # registrations end with their library objects


def register() -> None:
    """Register these operations with torch for the simulated device."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", fused_attention, "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", fused_attention, "PrivateUse1")
    # Without a kernel, torch decomposes it into operations with five temporaries.
    library.impl("silu_backward", lambda gradient, _: torch.empty_like(gradient), "PrivateUse1")
    any_operation = torch.library.Library("_", "IMPL")  # Mochi disables autocast, on any kind of device
    any_operation.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _REGISTERED.extend((library, any_operation))
    ATTENTION.add(FORWARD.name())  # selective checkpointing keeps its output
