"""Loads the weights of a transformer that was built without any. Each rank reads only the rows that it holds."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.engine.savers.lowbit import LowBitLinear
from finetune.engine.savers.streaming import Streamed
from finetune.models.adapters import ADAPTER, is_adapters
from finetune.models.adapters.dora import DoraLinear, initial_lengths
from finetune.models.building import replace_tensors
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.runtime.errors import UserError
from finetune.runtime.logging import is_main
from finetune.runtime.progress import PATIENCE, ProgressLine

_ALIGNMENT = 256  # bytes, like CUDA's allocations
_WRAPPERS = ("_checkpoint_wrapped_module.", "base_layer.")


def materialise(transformer: nn.Module, device: torch.device) -> None:
    """Allocate uninitialised memory on `device` for the parameters that are on meta. Shards stay shards."""
    replace_tensors(transformer, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def materialise_blocks(lists: list[nn.ModuleList], device: torch.device) -> None:
    """The same for blocks whose weights are whole on each rank, a buffer for each block: CUDA's allocator rounds the size of each
    weight, which can take a fifth more than all of them have.
    """
    for block in (block for blocks in lists for block in blocks):
        sizes = [_aligned(parameter) for parameter in block.parameters() if _is_whole_on_meta(parameter)]
        buffer = iter(torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes))

        def placed(tensor: Tensor, buffer: Iterator[Tensor] = buffer) -> Tensor:
            if not _is_whole_on_meta(tensor):
                return tensor
            return next(buffer)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        replace_tensors(block, placed)


def _is_whole_on_meta(tensor: Tensor) -> bool:
    return tensor.is_meta and not isinstance(tensor, DTensor)  # trained parameters are distributed


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def move_real(transformer: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers that are not on meta to `device`; these are the adapter and the buffers."""
    replace_tensors(transformer, lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def load_weights(transformer: nn.Module, weights: Weights, device: torch.device) -> None:
    """Fill all parameters except the adapter's, and the buffers that the files contain, in place. Of an adapter, only what is a
    function of the base weights is filled: the lengths of DoRA's rows.

    Args:
        device: the device that weights are quantised on.
    Raises:
        UserError: a file cannot be read. Names and shapes are not checked here; the command `check` does that.
    """
    on_host = host_copies(transformer)

    def destination(parameter: nn.Parameter) -> Tensor:
        return on_host.get(parameter, parameter.detach())

    modules = list(transformer.named_modules())
    is_shown = is_main() and weights.have_values
    line = ProgressLine("loading weights: layer", len(modules), enabled=is_shown, patience=PATIENCE)
    with torch.no_grad(), line:
        for number, (prefix, module) in enumerate(modules, start=1):
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                if is_adapters(name) or (isinstance(module, LowBitLinear) and parameter is not module.bias):
                    continue
                rows, start, stop = local_rows(destination(parameter))
                if rows.numel():
                    rows.copy_(weights.rows(plain_name(name), start, stop))
            if isinstance(module, LowBitLinear):
                codes, start, stop = local_rows(destination(module.weight))
                if codes.numel():
                    rows = weights.rows(plain_name(f"{prefix}.weight"), start, stop)
                    module.fill(codes, local_rows(destination(module.weight_scale))[0], rows.to(device))
            if isinstance(module, DoraLinear) and module.lora_magnitude_vector:
                _fill_lengths(module, plain_name(prefix), weights, device)
            line.update(number, "")
        for name, buffer in transformer.named_buffers():
            if plain_name(name) in weights.names():
                buffer.copy_(weights.rows(plain_name(name), 0, len(buffer) if buffer.dim() else 0))


def _fill_lengths(module: DoraLinear, name: str, weights: Weights, device: torch.device) -> None:
    """Set this rank's part of the trained lengths to those of the rows of the base weight, as it is held.

    They are computed from the file, wherever the base weight itself lies: sharded, whole, in host memory or in few bits.
    """
    lengths, start, stop = local_rows(module.lora_magnitude_vector[ADAPTER].weight.detach())
    if not lengths.numel():
        return
    base, rows = module.get_base_layer(), weights.rows(f"{name}.weight", start, stop).to(device)
    rows = base.rounded(rows) if isinstance(base, LowBitLinear) else rows.to(base.weight.dtype)
    found = initial_lengths(rows)
    if weights.have_values and not found.all():
        raise UserError(
            f"{name} has rows of zeros, which DoRA cannot give a length",
            "name other layers in lora.targets, or set lora.dora = false",
            "lora.dora",
        )
    lengths.copy_(found)


def host_copies(transformer: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The host memory of each parameter that is streamed from there."""
    streamed = [module for module in transformer.modules() if isinstance(module, Streamed)]
    return {parameter: copy for module in streamed for parameter, copy in module.host_copies()}


def whole_transformer(family: Family, dtype: torch.dtype) -> nn.Module:
    """Load the pretrained transformer onto the CPU, without an adapter, sharding or any other change."""
    transformer = family.build_transformer(dtype)
    materialise(transformer, torch.device("cpu"))
    load_weights(transformer, family.transformer_weights(), torch.device("cpu"))
    return transformer


def plain_name(name: str) -> str:
    """A parameter's name in the weight files, that is without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def local_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """(the local part of a tensor, the index of its first row, the index after its last row)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, len(tensor) if tensor.dim() else 0
    local = tensor.to_local()
    chunks = tensor.__create_chunk_list__()  # how DCP asks which part of a tensor is local
    start = chunks[0].offsets[0] if chunks else 0
    return local, start, start + len(local)
