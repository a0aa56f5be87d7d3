"""From a loaded transformer to a trainable one: the order in which it is transformed is visible here, and only here."""

from functools import partial

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from finetune.engine import activation, lowbit, precision
from finetune.engine.layout import choose_layout
from finetune.models import lora
from finetune.models.family import Family
from finetune.recipe.schema import Lora, Memory, Train
from finetune.runtime.distributed import Runtime, mesh
from finetune.runtime.logging import say


def parallelize(
    transformer: nn.Module, family: Family, train: Train, adapter: Lora, memory: Memory, runtime: Runtime
) -> nn.Module:
    """Prepare a transformer, loaded on the CPU in its storage dtype, for the step.

    Returns:
        the same module, an FSDPModule on the mesh's device; only what is trained requires gradients.
    """
    # 1. The adapter, while weights are whole: its initialisation must not differ between ranks.
    transformer.requires_grad_(train.method == "full")
    if train.method == "lora":
        lora.add(transformer, family, adapter, train.seed)
    precision.cast_trained_weights(transformer, train.weights)

    # 2. Low-bit storage of what stays frozen, after the adapter, which looks for linear layers.
    lists = [getattr(transformer, name) for name in family.block_lists]
    lowbit.quantize_blocks(lists, memory.low_bit, family.high_precision)

    # 3. Activation checkpointing inside the sharded unit, so that recomputation gathers a block's weights once.
    activation.checkpoint_blocks(lists, memory)

    # 4. Compilation in place, so that names stay, with recomputation inside the graph.
    if memory.compile:
        for blocks in lists:
            for block in blocks:
                block.compile()

    # 5. Sharding: one unit a block, the rest with the root. Replicated frozen weights stay outside of it.
    layout = choose_layout(memory, train.method, transformer, runtime)
    if runtime.world_size > 1:
        say(f"layout: {layout.why}")
    shard = partial(
        fully_shard,
        mesh=mesh(runtime, layout.shard_size),
        mp_policy=precision.policy(train.precision),
        offload_policy=CPUOffloadPolicy(pin_memory=not runtime.device.is_cpu) if memory.offload else OffloadPolicy(),
    )
    if layout.frozen_replicated:
        frozen = {parameter for parameter in transformer.parameters() if not parameter.requires_grad}
        transformer.to(runtime.device.torch_device)
        shard(transformer, ignored_params=frozen)
        return transformer.train()
    for blocks in lists:
        for block in blocks:
            shard(block, reshard_after_forward=not layout.gathered_until_backward)
    shard(transformer)
    assert isinstance(transformer, FSDPModule)
    return transformer.train()


def trained_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters the optimizer updates; collect them after sharding."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
