"""Autocast to float16 on the simulated device, by CUDA's rules (aten/src/ATen/autocast_mode.h).

The casts of trained weights are cached until the outermost autocast region ends, as in torch. The recomputation of a
checkpointed block is a region of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from finetune.planning.kernels import KIND

HALF = torch.float16
_LOWER = ("linear", "matmul", "mm", "addmm", "bmm", "conv2d", "conv3d", "scaled_dot_product_attention")
_FLOAT = ("layer_norm", "group_norm")
_OUTSIDE = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

_kept: dict[int, tuple[Tensor, Tensor]] = {}  # id of a weight -> (the weight, its cast)


def region() -> torch.autocast:
    """An autocast region on the simulated device."""
    return torch.autocast(KIND, HALF)


@contextmanager
def simulated_autocast() -> Iterator[None]:
    """Make autocast regions inside the block act on the simulated device."""
    library = torch.library.Library("aten", "IMPL")
    for names, cast in ((_LOWER, _to_half), (_FLOAT, _to_float)):
        for name in names:
            library.impl(name, _with(getattr(torch.ops.aten, name), cast), "AutocastPrivateUse1")
    clear = torch.clear_autocast_cache

    def clear_both() -> None:  # torch calls it by this name when the outermost region ends
        _kept.clear()
        clear()

    torch.clear_autocast_cache = clear_both
    try:
        yield
    finally:
        torch.clear_autocast_cache = clear
        library._destroy()


def _with(operation: Any, cast: Callable[[Tensor], Tensor]) -> Callable:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_OUTSIDE):
            arguments, keywords = tree_map_only(Tensor, cast, (arguments, keywords))
            return operation(*arguments, **keywords)

    return run


def _to_half(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == HALF:
        return tensor
    if not (tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()):
        return tensor.to(HALF)
    if id(tensor) not in _kept:
        _kept[id(tensor)] = tensor, tensor.to(HALF)
    return _kept[id(tensor)][1]


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
