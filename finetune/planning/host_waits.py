"""What makes the host wait for a GPU: the operations that `torch.cuda.set_sync_debug_mode` warns of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from finetune.planning.kernels import KIND
from finetune.runtime.errors import UserError

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MASKS = {torch.bool, torch.uint8}
_OTHERS = [Path(torch.__file__).parent, Path(__file__).parent]  # whose code runs between an operation and its caller


def waits(function: Any, arguments: tuple, keywords: dict, tensors: Sequence[Tensor]) -> bool:
    """Whether the host waits in an operation: a copy between host and device without `non_blocking`, or a result whose value or
    shape the host must know.

    Args:
        tensors: all inputs of the operation.
    """
    places = {tensor.fake_device.type == KIND if isinstance(tensor, FakeTensor) else False for tensor in tensors}
    if function in _COPIES:
        if (device := keywords.get("device")) is not None:
            places.add(torch.device(device).type == KIND)
        return len(places) == 2 and not (keywords.get("non_blocking") or arguments[2:3] == (True,))
    if True not in places:
        return False
    if function in _INDEXED:  # masks are converted to indices by `nonzero`, if what is written is more than one number
        masked = any(isinstance(index, Tensor) and index.dtype in _MASKS for index in arguments[1])
        return masked and (function is _aten.index.Tensor or arguments[2].numel() > 1)
    return bool(_READS & set(function.tags))


def described(function: Any) -> str:
    """An operation, and the file and line that it was called in."""
    return f"{_name(function)} in {_place()}"


def _name(function: Any) -> str:
    return "`.item()`" if function is _aten._local_scalar_dense.default else f"`{function}`"


def _place() -> str:
    """The file and line that an operation was called in: the innermost that is neither torch's nor the simulation's."""
    frame = sys._getframe(1)
    while frame.f_back and any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in _OTHERS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def unknown(function: Any) -> UserError:
    """The error of an operation that needs values which a simulation does not have."""
    return UserError(
        f"{_name(function)} reads values of the device, which a simulation does not have, and for which a GPU lets the host wait",
        "compute with tensors that stay on the device, whose shapes follow from shapes alone",
        _place(),
    )
