"""The mesh's dimensions by name, and which share of the data is a rank's."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune.data.loader import BatchSplit
from finetune.runtime.device import Device
from finetune.runtime.distributed import Place, Runtime, data_mesh, mesh

CPU = Device(torch.device("cpu"))


def ranks(world_size: int, context_size: int) -> list[Runtime]:
    """Every rank of a run, as no process needs to be there for."""
    return [Runtime(rank, rank, world_size, CPU, None, world_size, context_size) for rank in range(world_size)]


@contextmanager
def process_group(rank: int, world_size: int) -> Iterator[None]:
    """One rank of a process group whose others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


# Shares of the data


def test_each_rank_has_a_share_of_its_own_if_no_samples_are_shared() -> None:
    assert [runtime.data for runtime in ranks(4, context_size=1)] == [Place(rank, 4) for rank in range(4)]
    assert {runtime.context for runtime in ranks(4, context_size=1)} == {Place(0, 1)}


def test_ranks_of_one_context_have_the_same_share_of_the_data() -> None:
    world = ranks(6, context_size=2)
    assert [runtime.data for runtime in world] == [Place(share, 3) for share in (0, 0, 1, 1, 2, 2)]
    assert [runtime.context for runtime in world] == [Place(place, 2) for place in (0, 1, 0, 1, 0, 1)]


@pytest.mark.parametrize("world_size, context_size, micro", [(4, 2, 2), (4, 2, 4), (8, 4, 1), (2, 2, 8), (8, 1, 1)])
def test_ranks_of_one_context_take_the_same_samples_and_contexts_share_the_batch(
    world_size: int, context_size: int, micro: int
) -> None:
    taken: dict[int, set[tuple[int, ...]]] = {}
    for runtime in ranks(world_size, context_size):
        split = BatchSplit(runtime.data.rank, runtime.data.size, 8, micro)
        positions = tuple(p for turn in range(split.accumulation) for p in split.positions(turn))
        taken.setdefault(runtime.data.rank, set()).add(positions)
    assert all(len(each) == 1 for each in taken.values())
    assert sorted(p for each in taken.values() for positions in each for p in positions) == list(range(8))


# Dimensions

SIZES = [
    (None, 1, {"shard": 8}),
    (4, 1, {"replicate": 2, "shard": 4}),
    (1, 1, {"replicate": 8, "shard": 1}),
    (None, 2, {"shard": 4, "context": 2}),
    (2, 2, {"replicate": 2, "shard": 2, "context": 2}),
    (None, 8, {"shard": 1, "context": 8}),
]


@pytest.mark.parametrize("shard_size, context_size, sizes", SIZES)
def test_the_mesh_has_the_dimensions_that_are_there(
    shard_size: int | None, context_size: int, sizes: dict[str, int]
) -> None:
    with process_group(rank=0, world_size=8):
        whole = mesh(ranks(8, context_size)[0], shard_size)
        assert list(zip(whole.mesh_dim_names or (), whole.shape, strict=True)) == list(sizes.items())
        assert whole.mesh.flatten().tolist() == list(range(8))


@pytest.mark.parametrize("rank, group", [(0, [[0, 2], [4, 6]]), (3, [[1, 3], [5, 7]]), (6, [[0, 2], [4, 6]])])
def test_weights_are_spread_over_one_rank_of_each_context(rank: int, group: list[list[int]]) -> None:
    with process_group(rank, world_size=8):
        found = data_mesh(mesh(ranks(8, context_size=2)[rank], shard_size=2))
        assert found.mesh_dim_names == ("replicate", "shard")
        assert found.mesh.tolist() == group


@pytest.mark.parametrize("rank", range(8))
@pytest.mark.parametrize("shard_size", [None, 2])
def test_the_place_of_a_rank_in_the_mesh_is_the_place_that_divides_its_data(rank: int, shard_size: int | None) -> None:
    with process_group(rank, world_size=8):
        runtime = ranks(8, context_size=2)[rank]
        whole = mesh(runtime, shard_size)
        *data, context = whole.get_coordinate() or ()
        sizes = whole.shape[:-1]
        place = data[0] if len(data) == 1 else data[0] * sizes[1] + data[1]
        assert (place, context) == (runtime.data.rank, runtime.context.rank)


def test_without_contexts_the_weights_have_the_whole_mesh() -> None:
    """The same object, so that no further process groups are made."""
    with process_group(rank=0, world_size=8):
        for shard_size in (None, 4):
            whole = mesh(ranks(8, context_size=1)[0], shard_size)
            assert data_mesh(whole) is whole
