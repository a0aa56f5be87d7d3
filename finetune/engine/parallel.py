"""Turns a transformer into a trainable one. The order of the transformations is decided here and nowhere else."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from finetune.engine import precision
from finetune.engine.attention import choose_kernel
from finetune.engine.layout import Layout, choose_layout
from finetune.engine.savers import activation, compiled, lowbit
from finetune.engine.savers.streaming import stream_blocks
from finetune.engine.weights.loading import materialise, materialise_blocks, move_real, plain_name
from finetune.models.adapters import ADAPTERS
from finetune.models.building import stays_float32
from finetune.models.family import Family
from finetune.models.text_mask import why_masked
from finetune.recipe.schema import Memory, Train
from finetune.recipe.table import Table
from finetune.runtime.distributed import Runtime, data_mesh, mesh
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say


def parallelize(
    transformer: nn.Module, family: Family, train: Train, adapter: Table | None, memory: Memory, runtime: Runtime
) -> nn.Module:
    """Prepare a transformer for training, in place.

    Args:
        transformer: in its storage dtype, with parameters on the meta device.
    Returns:
        the same module, now an FSDPModule. Only trained parameters require gradients. Parameters that were on meta have
        uninitialised memory in their final place; call `load_weights` next.
    """
    # 1. Add the adapter before sharding and with real tensors, so that its initial values are the same on all ranks.
    transformer.requires_grad_(train.method == "full")
    if train.method != "full":
        ADAPTERS[train.method].add(transformer, family, adapter, train.seed)
    precision.cast_trained_weights(transformer, train.weights)
    if train.method == "full":  # what no loss reaches has no gradients, and so no state that a checkpoint could have
        for parameter in family.without_gradient(transformer):
            parameter.requires_grad_(False)

    # 2. Store frozen weights in few bits, after the adapter, since peft looks for ordinary linear layers. Or multiply trained
    #    weights in float8. Then all tensors that are real already go to the device.
    lists = [getattr(transformer, name) for name in family.block_lists]
    lowbit.quantize_blocks(lists, memory.low_bit, family.high_precision, precision.DTYPES[train.precision])
    move_real(transformer, runtime.device.torch_device)
    if train.float8:
        precision.compute_in_float8(lists, family.high_precision, runtime.device)

    # 3. Choose the kernel of attention inside of what is checkpointed, so that recomputation takes the same one. Checkpoint
    #    activations inside the FSDP unit, so that one all-gather of a block's weights serves recomputation and gradients.
    why = why_masked(family.attention_masks, train.micro_batch_size, memory.compile)
    choose_kernel(lists, memory.attention, why is not None and family.attention_masks == "padding", runtime.device)
    activation.checkpoint_blocks(lists, memory)

    # 4. Compile blocks in place, which keeps parameter names; after checkpointing, so that the graph includes recomputation.
    if memory.compile:
        compiled.compile_blocks(lists, runtime.device)

    # 5. Stream or shard blocks outermost, so that copies and all-gathers stay outside of compiled graphs.
    layout = choose_layout(memory, train.method, transformer, runtime)
    if runtime.world_size > 1 or memory.offload:
        say(f"layout: {layout.why}")
    if layout.offload == "streamed":
        stream_blocks(lists, memory.resident_blocks, runtime.device)
    _shard(transformer, lists, layout, train.precision, runtime)

    # 6. Allocate memory, on the device or the host, for the parameters that this rank holds.
    device = torch.device("cpu") if layout.offload == "sharded" else runtime.device.torch_device
    if layout.frozen_replicated:
        materialise_blocks(lists, device)
    materialise(transformer, device)
    return transformer.train()


def _shard(transformer: nn.Module, lists: list[nn.ModuleList], layout: Layout, compute: str, runtime: Runtime) -> None:
    """Make each block an FSDP unit, and the root a unit of the rest. Frozen weights that are replicated stay outside of FSDP."""
    pinned = CPUOffloadPolicy(pin_memory=runtime.device.pins)
    shard = partial(
        fully_shard,
        mesh=data_mesh(mesh(runtime, layout.shard_size)),
        offload_policy=pinned if layout.offload == "sharded" else OffloadPolicy(),
    )
    outside = {p for p in transformer.parameters() if layout.frozen_replicated and not p.requires_grad}
    stays = stays_float32(transformer)
    if any(stays(name) and p not in outside for name, p in transformer.named_parameters()):
        _shard_by_dtype(shard, transformer, lists, layout, compute, outside)
        return
    shard = partial(shard, mp_policy=precision.policy(compute))
    if layout.frozen_replicated:
        shard(transformer, ignored_params=outside)
        return
    for blocks in lists:
        for block in blocks:
            shard(block, reshard_after_forward=not layout.gathered_until_backward)
    shard(transformer)


def _shard_by_dtype(
    shard: Callable[..., Any],
    transformer: nn.Module,
    lists: list[nn.ModuleList],
    layout: Layout,
    compute: str,
    outside: set[nn.Parameter],
) -> None:
    """The same for a model of which some parameters stay in float32, as Wan's time embedding and its blocks' modulation tables.

    A unit has one dtype to compute in, and trains parameters of one dtype. So all that stays in float32 is one unit, the root's,
    also what lies in blocks: it is little (29 million of Wan's 14 billion parameters), and whole on each rank from the beginning
    of the forward pass to the end of the backward pass. Units within a block would not do: a table that is the block's own has
    no module to be gathered for, and their hooks would run inside of checkpoints and compiled graphs.
    """
    stays = stays_float32(transformer)
    # The root comes first: a unit is not given what lies in modules that are units already.
    others = {p for name, p in transformer.named_parameters() if not stays(name)}
    shard(transformer, mp_policy=precision.policy("float32"), ignored_params=others | outside)
    shard = partial(
        shard,
        mp_policy=precision.policy(compute),
        # Sharding has replaced the parameters.
        ignored_params=outside | {p for name, p in transformer.named_parameters() if stays(name)},
    )
    left = others - outside
    for block in (block for blocks in lists for block in blocks):
        if not left.isdisjoint(block.parameters()):
            shard(block, reshard_after_forward=not layout.gathered_until_backward)
    for module in _largest_called(transformer, lists):
        if not left.isdisjoint(module.parameters()):
            shard(module, reshard_after_forward=False)  # as the root's other weights are
    if missed := [name for name, p in transformer.named_parameters() if p in left]:
        raise UserError(
            f"{', '.join(missed[:3])}: beside modules that stay in float32, these weights belong to none that is called",
            "have the family put them into a module with a forward pass of its own, in `adapt_transformer`",
            "model.family",
        )


def _largest_called(module: nn.Module, lists: list[nn.ModuleList]) -> Iterator[nn.Module]:
    """The largest modules within a module that are called, but for the lists of blocks."""
    for child in module.children():
        if child in lists:
            continue
        if type(child).forward is nn.Module.forward:  # a container
            yield from _largest_called(child, lists)
        else:
            yield child


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by their names without wrappers. Collect them after sharding, which replaces
    parameters.
    """
    return {plain_name(name): p for name, p in transformer.named_parameters() if p.requires_grad}
