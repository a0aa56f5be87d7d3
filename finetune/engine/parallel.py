"""From a loaded transformer to a trainable one: the order in which it is transformed is visible here, and only here."""

from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from finetune.engine import precision
from finetune.engine.layout import Layout, choose_layout
from finetune.engine.savers import activation, lowbit
from finetune.engine.savers.streaming import stream_blocks
from finetune.engine.weights.loading import materialise, move_real
from finetune.models import lora
from finetune.models.family import Family
from finetune.recipe.schema import Lora, Memory, Train
from finetune.runtime.distributed import Runtime, data_mesh, mesh
from finetune.runtime.logging import say


def parallelize(
    transformer: nn.Module, family: Family, train: Train, adapter: Lora, memory: Memory, runtime: Runtime
) -> nn.Module:
    """Prepare a transformer for the step: built in its storage dtype, with its parameters on meta.

    Returns:
        the same module, an FSDPModule; only what is trained requires gradients. What was on meta has memory where it
        belongs, and waits for `load_weights`.
    """
    # 1. The adapter, whole and real: its initialisation must not differ between ranks.
    transformer.requires_grad_(train.method == "full")
    if train.method == "lora":
        lora.add(transformer, family, adapter, train.seed)
    precision.cast_trained_weights(transformer, train.weights)
    move_real(transformer, runtime.device.torch_device)

    # 2. Low-bit storage of what stays frozen, after the adapter, which looks for linear layers; or float8 products of what is
    #    trained.
    lists = [getattr(transformer, name) for name in family.block_lists]
    lowbit.quantize_blocks(lists, memory.low_bit, family.high_precision)
    if train.float8:
        precision.compute_in_float8(lists, family.high_precision, runtime.device)

    # 3. Activation checkpointing inside the sharded unit, so that recomputation gathers a block's weights once.
    activation.checkpoint_blocks(lists, memory)

    # 4. Compilation in place, so that names stay, with recomputation inside the graph.
    if memory.compile:
        activation.compile_blocks(lists, runtime.device)

    # 5. Sharding, or streaming: outermost, since a compiled graph must not see the copies.
    layout = choose_layout(memory, train.method, transformer, runtime)
    if runtime.world_size > 1 or memory.offload:
        say(f"layout: {layout.why}")
    if layout.offload == "streamed":
        stream_blocks(lists, memory.resident_blocks, runtime.device)
    _shard(transformer, lists, layout, train.precision, runtime)

    # 6. Memory, on the device or the host, for what a rank holds.
    materialise(transformer, torch.device("cpu") if layout.offload == "sharded" else runtime.device.torch_device)
    return transformer.train()


def _shard(transformer: nn.Module, lists: list[nn.ModuleList], layout: Layout, compute: str, runtime: Runtime) -> None:
    """One unit a block, the rest with the root. Replicated frozen weights stay outside of it."""
    pinned = CPUOffloadPolicy(pin_memory=runtime.device.pins)
    shard = partial(
        fully_shard,
        mesh=data_mesh(mesh(runtime, layout.shard_size)),
        mp_policy=precision.policy(compute),
        offload_policy=pinned if layout.offload == "sharded" else OffloadPolicy(),
    )
    if layout.frozen_replicated:
        shard(transformer, ignored_params={p for p in transformer.parameters() if not p.requires_grad})
        return
    for blocks in lists:
        for block in blocks:
            shard(block, reshard_after_forward=not layout.gathered_until_backward)
    shard(transformer)


def trained_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters the optimizer updates; collect them after sharding."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
