"""The caching allocator's rules, as c10/cuda/CUDACachingAllocator.cpp documents them."""

import itertools
import random

import pytest

from finetune.planning.allocator import KIB, MIB, CachingAllocator, ExpandableAllocator


@pytest.mark.parametrize(
    "request_, allocated, reserved",
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest of the small ones
        (MIB + 1, MIB + 512, 20 * MIB),
        (7 * MIB, 7 * MIB, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # a segment of its own
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # in steps of 2 MiB
        (301 * MIB + 1, 302 * MIB, 302 * MIB),  # with a rest that is not worth splitting off
    ],
)
def test_a_first_request(request_: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(request_)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_nothing_is_nothing() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(0))
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_two_matrices_of_7_mib_share_a_segment_and_a_third_does_not() -> None:
    allocator = CachingAllocator()
    for reserved in (20, 20, 40):
        allocator.malloc(7 * MIB)
        assert allocator.reserved == reserved * MIB


def test_a_rest_of_at_most_1_mib_stays_with_a_large_block() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(19 * MIB)  # of its own, 20 MiB
    assert (block.size, allocator.allocated) == (20 * MIB, 20 * MIB)


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, between, small = (allocator.malloc(size * MIB) for size in (40, 2, 30))
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(25 * MIB).segment == small.segment
    assert allocator.malloc(35 * MIB).segment == large.segment
    assert between.segment not in (large.segment, small.segment)


def test_freed_neighbours_become_one_block_again() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]
    for place in (1, 3, 2, 0, 4):
        allocator.free(blocks[place])
    assert allocator.malloc(20 * MIB).size == 20 * MIB
    assert allocator.reserved == 20 * MIB


def test_only_empty_segments_go_back() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.malloc(4 * MIB), allocator.malloc(50 * MIB)
    allocator.free(gone)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved == 0
    assert allocator.peak_reserved == 70 * MIB
    allocator.reset_peak()
    assert allocator.peak_reserved == 0


def test_short_of_memory_it_gives_back_what_is_empty_before_it_takes_more() -> None:
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(80 * MIB)
    assert allocator.peak_reserved == 80 * MIB
    allocator.malloc(30 * MIB)
    assert allocator.peak_reserved - allocator.limit == 10 * MIB  # missing


def test_free_and_used_blocks_always_fill_the_segments() -> None:
    source, allocator, live = random.Random(0), CachingAllocator(), []
    for _ in range(5000):
        if live and source.random() < 0.48:
            allocator.free(live.pop(source.randrange(len(live))))
        else:
            live.append(allocator.malloc(int(2 ** source.uniform(0, 27))))
        assert allocator.allocated == sum(block.size for block in live)
        free = sum(block.size for pool in allocator._free.values() for _, block in pool)
        assert allocator.allocated + free == allocator.reserved
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
    assert allocator.peak_allocated > 100 * KIB


def test_an_expandable_segment_grows_by_pages_and_gives_them_back() -> None:
    allocator = ExpandableAllocator()
    blocks = [allocator.malloc(30 * MIB) for _ in range(3)]
    assert allocator.reserved == 100 * MIB  # 90 MiB on five pages of 20
    allocator.free(blocks[1])
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB  # of 30 MiB in between, one page held nothing else
    allocator.malloc(30 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (100 * MIB, 100 * MIB)


def test_an_expandable_segment_loses_less_between_its_pieces() -> None:
    reserved = []
    for kind in (CachingAllocator, ExpandableAllocator):
        allocator = kind()
        for size in range(20, 120, 7):  # each larger than the one that has just gone
            allocator.free(allocator.malloc(size * MIB))
        reserved.append(allocator.reserved)
    assert reserved[1] <= 120 * MIB < reserved[0]


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
def test_blocks_that_are_in_use_never_overlap(kind: type[CachingAllocator]) -> None:
    chance, allocator, live = random.Random(0), kind(), []
    for _ in range(3000):
        if chance.random() < 0.52 or not live:
            live.append(allocator.malloc(int(2 ** chance.uniform(9, 27))))
        else:
            allocator.free(live.pop(chance.randrange(len(live))))
    spans = sorted((block.small, block.segment, block.offset, block.size) for block in live)
    for (*place, offset, size), (*next_place, next_offset, _) in itertools.pairwise(spans):
        assert place != next_place or offset + size <= next_offset
    assert allocator.allocated == sum(block.size for block in live) <= allocator.reserved
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_an_expandable_segment_splits_off_small_rests() -> None:
    allocator = ExpandableAllocator()
    free, _ = allocator.malloc(10 * MIB), allocator.malloc(10 * MIB)
    allocator.free(free)
    assert allocator.malloc(10 * MIB - 600 * KIB).size == 10 * MIB - 600 * KIB
