"""FLOPs and bytes of a step, and its time by the roofline model."""

from collections import Counter

import pytest
import torch

from finetune.planning.cost import Cost
from finetune.runtime.gpus import GPUS

A100 = GPUS["A100"]
TERA, GB = 10**12, 10**9


def cost(flops: int = 0, size: int = 0, float32: bool = False, count: int = 1, **moved: int) -> Cost:
    return Cost(Counter({(flops, size, float32): count}), **moved)


@pytest.mark.parametrize(
    "done, seconds",
    [
        (cost(312 * TERA), 1.0),
        (cost(312 * TERA, count=3), 3.0),
        (cost(39 * TERA, float32=True), 2.0),  # 19.5 TFLOP/s without tensor cores
        (cost(312 * TERA, 10 * GB), 1.0),  # the slower of computing and memory
        (cost(1, 4078 * GB), 2.0),
        (cost(312 * TERA, to_device=64 * GB), 2.0),  # copied beside what is computed
        (cost(312 * TERA, to_device=64 * GB, to_host=32 * GB), 2.0),  # both ways at once
        (cost(312 * TERA, peer_bytes=900 * GB), 3.0),
        (cost(312 * TERA, to_device=64 * GB, host_bytes=50 * GB), 3.0),  # updates on the CPU come after all else
    ],
)
def test_seconds_are_those_of_the_slowest(done: Cost, seconds: float) -> None:
    assert done.seconds(A100) == pytest.approx(seconds)


def test_copies_that_nothing_hides_are_added() -> None:
    assert cost(312 * TERA, to_device=64 * GB).seconds(A100, overlaps=False) == pytest.approx(3.0)


def test_an_update_in_host_memory_counts_what_it_reads_and_writes() -> None:
    counted, (weight, gradient) = Cost.none(), (torch.empty(1000, device="meta") for _ in range(2))
    function = torch.ops.aten.add_.Tensor
    counted.add_on_host(function, [weight, gradient], function(weight, gradient))
    assert counted.host_bytes == 2 * 8000
    assert counted.flops == 0


def test_further_micro_batches_repeat_what_the_second_added() -> None:
    """The optimizer's part comes once, a micro-batch's part as often as there are micro-batches."""
    micro, update = (10, 20, False), (0, 100, True)
    one = Cost(Counter({micro: 5, update: 2}), to_device=7)
    two = Cost(Counter({micro: 10, update: 2}), to_device=9)
    eight = two.repeated(one, 8)
    assert eight.operations[micro] == 40
    assert eight.operations[update] == 2
    assert eight.to_device == 7 + 7 * 2


def test_a_product_counts_its_operations_bytes_and_precision() -> None:
    left, right = torch.empty(8, 4, device="meta"), torch.empty(4, 2, device="meta")
    counted = Cost.none()
    function = torch.ops.aten.mm.default
    counted.add(function, (left, right), {}, [left, right], function(left, right))
    assert counted.operations == Counter({(2 * 8 * 4 * 2, 4 * (32 + 8 + 16), True): 1})
    assert counted.flops == 128
