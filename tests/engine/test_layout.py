"""What "auto" chooses, and why: the layout that needs least communication and fits."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from finetune.engine.layout import choose_layout
from finetune.recipe.schema import Memory
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime

GIB = 2**30


@dataclass(frozen=True)
class Gpu(Device):
    """A device of a known size."""

    size: int = 80 * GIB

    @property
    def total_memory(self) -> int:
        return self.size


def model(frozen_gib: float, trained_million: float) -> nn.Module:
    """Frozen bf16 weights and trained float32 ones, on meta."""
    with torch.device("meta"):
        module = nn.Module()
        module.frozen = nn.Parameter(torch.empty(int(frozen_gib * GIB / 2), dtype=torch.bfloat16), requires_grad=False)
        module.trained = nn.Parameter(torch.empty(int(trained_million * 1e6)))
    return module


def runtime(world_size: int, hosts: int = 1, gib: int = 80) -> Runtime:
    device = Gpu(torch.device("cuda", 0), gib * GIB)
    return Runtime(0, 0, world_size, device, None, world_size // hosts)


@pytest.mark.parametrize(
    "frozen_gib, trained_million, world, hosts, gib, expected",
    [
        (11, 130, 8, 1, 80, "replicate"),  # a LoRA of CogVideoX-5b
        (24, 160, 8, 1, 80, "replicate"),  # of HunyuanVideo
        (24, 160, 8, 1, 24, "shard"),
        (24, 160, 16, 2, 24, "hybrid"),
        (0, 5600, 8, 1, 80, "shard"),  # CogVideoX-5b, all weights: 83 GiB
        (0, 5600, 16, 2, 80, "hybrid"),
        (0, 5600, 16, 8, 80, "shard"),  # two devices a host do not hold it
        (0, 1700, 8, 1, 80, "replicate"),  # CogVideoX-2b: 25 GiB
        (0, 5600, 1, 1, 80, "shard"),
        (11, 130, 1, 1, 24, "replicate"),  # FSDP2 copies what it shards over one rank, too
        (24, 160, 1, 1, 8, "replicate"),
    ],
)
def test_auto_takes_what_fits(
    frozen_gib: float, trained_million: float, world: int, hosts: int, gib: int, expected: str
) -> None:
    method = "lora" if frozen_gib else "full"
    layout = choose_layout(Memory(), method, model(frozen_gib, trained_million), runtime(world, hosts, gib))
    replicated_full = expected == "replicate" and method == "full"
    assert layout.frozen_replicated == (expected == "replicate" and method == "lora")
    assert layout.shard_size == (1 if replicated_full else world // hosts if expected == "hybrid" else None)
    assert layout.why


def test_a_cpu_shards() -> None:
    on_cpu = dataclasses.replace(runtime(2), device=Device(torch.device("cpu")))
    layout = choose_layout(Memory(), "lora", model(0.1, 1), on_cpu)
    assert (layout.shard_size, layout.frozen_replicated) == (None, False)


def test_a_layout_of_the_recipe_is_taken() -> None:
    zero2 = choose_layout(Memory(layout="zero2"), "full", model(0, 1), runtime(8))
    assert zero2.gathered_until_backward
    assert choose_layout(Memory(layout="hybrid", shard_size=4), "full", model(0, 1), runtime(8)).shard_size == 4
    assert choose_layout(Memory(layout="hybrid"), "full", model(0, 1), runtime(16, hosts=2)).shard_size == 8
