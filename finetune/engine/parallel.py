"""From a loaded transformer to a trainable one: the order in which it is transformed is visible here, and only here."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from finetune.engine import activation, precision
from finetune.models import lora
from finetune.models.family import Family
from finetune.recipe.schema import Lora, Memory, Train


def parallelize(
    transformer: nn.Module, family: Family, train: Train, adapter: Lora, memory: Memory, mesh: DeviceMesh
) -> nn.Module:
    """Prepare a transformer, loaded on the CPU in its storage dtype, for the step.

    Returns:
        the same module, an FSDPModule on the mesh's device; only what is trained requires gradients.
    """
    # 1. The adapter, while weights are whole: its initialisation must not differ between ranks.
    transformer.requires_grad_(train.method == "full")
    if train.method == "lora":
        lora.add(transformer, family, adapter, train.seed)
    precision.trained_weights_to_float32(transformer)

    # 2. Activation checkpointing inside the sharded unit, so that recomputation gathers a block's weights once.
    lists = [getattr(transformer, name) for name in family.block_lists]
    activation.checkpoint_blocks(lists, memory)

    # 3. Sharding: one unit a block, the rest with the root.
    policy = precision.policy(train.precision)
    for blocks in lists:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    assert isinstance(transformer, FSDPModule)
    return transformer.train()


def trained_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters the optimizer updates; collect them after sharding."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
