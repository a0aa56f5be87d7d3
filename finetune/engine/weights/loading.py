"""Weights of a transformer that was built without any: each rank reads the rows it holds, into where they stay."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.engine.savers.lowbit import LowBitLinear
from finetune.engine.savers.streaming import Streamed
from finetune.models.family import Family
from finetune.models.lora import ADAPTER
from finetune.models.weights import Weights

_WRAPPERS = ("_checkpoint_wrapped_module.", "base_layer.")


def materialise(transformer: nn.Module, device: torch.device) -> None:
    """Give the parameters that are on meta memory on `device`, uninitialised; shards stay shards."""
    _replace(transformer, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def move_real(transformer: nn.Module, device: torch.device) -> None:
    """Put what is not on meta, the adapter and buffers, on `device`."""
    _replace(transformer, lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def _replace(transformer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put changed parameters and buffers in the place of old ones. torch's own `.to` and `to_empty` change them in place, which
    works between some kinds of devices only; FSDP takes up new ones before its first forward pass.
    """
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            changed = change(parameter.detach())
            if changed.device != parameter.device:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = change(buffer)


def load_weights(transformer: nn.Module, weights: Weights, device: torch.device) -> None:
    """Fill all parameters but the adapter's, and the buffers that were saved with them, in place.

    Args:
        device: where weights are quantised.
    Raises:
        UserError: a file cannot be read. That names and shapes are right is `check`'s business.
    """
    homes = {p: home for module in transformer.modules() if isinstance(module, Streamed) for p, home in module.homes()}

    def here(parameter: nn.Parameter) -> Tensor:
        return homes.get(parameter, parameter.detach())

    with torch.no_grad():
        for prefix, module in transformer.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                if _is_adapters(name) or (isinstance(module, LowBitLinear) and parameter is not module.bias):
                    continue
                place, start, stop = _local(here(parameter))
                if place.numel():
                    place.copy_(weights.rows(plain_name(name), start, stop))
            if isinstance(module, LowBitLinear):
                codes, start, stop = _local(here(module.weight))
                if codes.numel():
                    rows = weights.rows(plain_name(f"{prefix}.weight"), start, stop)
                    module.fill(codes, _local(here(module.weight_scale))[0], rows.to(device))
        for name, buffer in transformer.named_buffers():
            if plain_name(name) in weights.names():
                buffer.copy_(weights.rows(plain_name(name), 0, len(buffer) if buffer.dim() else 0))


def whole_transformer(family: Family, dtype: torch.dtype) -> nn.Module:
    """The pretrained transformer on the CPU, with nothing done to it."""
    transformer = family.build_transformer(dtype)
    materialise(transformer, torch.device("cpu"))
    load_weights(transformer, family.transformer_weights(), torch.device("cpu"))
    return transformer


def plain_name(name: str) -> str:
    """A parameter's name in the file."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_adapters(name: str) -> bool:
    return f".{ADAPTER}." in name


def _local(tensor: Tensor) -> tuple[Tensor, int, int]:
    """(the part of it on this rank, its first row, the row after its last)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, len(tensor) if tensor.dim() else 0
    local = tensor.to_local()
    chunks = tensor.__create_chunk_list__()  # what DCP asks a tensor for
    start = chunks[0].offsets[0] if chunks else 0
    return local, start, start + len(local)
