"""A model of torch's caching allocator for CUDA: from the tensors that are allocated and freed to the memory that is reserved.

Its rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings. Sizes are rounded to 512 bytes. Requests of up to
1 MiB are served from segments of 2 MiB, larger ones from segments of 20 MiB, and from 10 MiB on from a segment of their own size
rounded to 2 MiB. The smallest free block that fits is taken, and split if enough is left. Free neighbours are merged. An empty
segment is given back to the device when memory is short, or by `empty_cache`. With `expandable_segments:True` each pool is one
growing segment of pages of 2 MiB (small requests) or 20 MiB, and unused pages can be given back. All CUDA streams are modelled as
sharing one memory pool.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

KIB, MIB = 2**10, 2**20
ROUNDING = 512
SMALL = MIB  # the largest request from the pool of small ones
SMALL_SEGMENT, LARGE_SEGMENT, OWN_SEGMENT = 2 * MIB, 20 * MIB, 10 * MIB
SEGMENT_ROUNDING = 2 * MIB


@dataclass(eq=False)
class Block:
    """A part of a segment; `previous` and `next` are its neighbours in it."""

    segment: int
    offset: int
    size: int
    small: bool
    free: bool = False
    previous: Block | None = None
    next: Block | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


class CachingAllocator:
    """Serves allocations, and counts what is allocated and reserved. All figures are bytes."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: bytes of the device; None for no limit. A request beyond it is served all the same when there is nothing to give
        back, so that the peak says how much memory is missing.
        """
        self.limit = limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[tuple[int, int, int], Block]]] = {True: [], False: []}  # by small, ordered
        self._segments = 0

    def malloc(self, size: int) -> Block | None:
        """Allocate a block; None for 0 bytes."""
        if size == 0:
            return None
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        small = size <= SMALL
        pool = self._free[small]
        place = bisect.bisect_left(pool, ((size, -1, -1),))
        block = pool.pop(place)[1] if place < len(pool) else self._new_segment(size, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Return a block to its pool."""
        if block is None:
            return
        self.allocated -= block.size
        block.free = True
        if block.previous and block.previous.free:
            block = self._merge(block.previous, block, block.previous)
        if block.next and block.next.free:
            block = self._merge(block, block.next, block.next)
        bisect.insort(self._free[block.small], (block.order, block))

    def empty_cache(self) -> None:
        """Give empty segments back to the device."""
        for small, pool in self._free.items():
            empty = [block for _, block in pool if block.previous is None and block.next is None]
            self.reserved -= sum(block.size for block in empty)
            gone = set(empty)
            self._free[small] = [entry for entry in pool if entry[1] not in gone]

    def reset_peak(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _new_segment(self, size: int, small: bool) -> Block:
        segment = SMALL_SEGMENT if small else LARGE_SEGMENT
        if size >= OWN_SEGMENT:
            segment = -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        if self.limit is not None and self.reserved + segment > self.limit:
            self.empty_cache()
        self._segments += 1
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(self._segments, 0, segment, small)

    def _split(self, block: Block, size: int) -> None:
        left = block.size - size
        if left < self._least_rest(block.small):
            return
        rest = Block(block.segment, block.offset + size, left, block.small, True, block, block.next)
        if block.next:
            block.next.previous = rest
        block.next, block.size = rest, size
        bisect.insort(self._free[block.small], (rest.order, rest))

    def _least_rest(self, small: bool) -> int:
        """The smallest remainder, in bytes, that is split off."""
        return ROUNDING if small else SMALL + 1

    def _merge(self, first: Block, second: Block, waiting: Block) -> Block:
        """Merge two neighbours; `waiting` is the one that is in the pool."""
        pool = self._free[waiting.small]
        del pool[bisect.bisect_left(pool, (waiting.order,))]
        first.size += second.size
        first.next = second.next
        if first.next:
            first.next.previous = first
        first.free = True
        return first


class ExpandableAllocator(CachingAllocator):
    """The same with `expandable_segments:True`. The real allocator prefers free blocks whose pages are mapped; this one does not
    tell them apart.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        for small, pool in self._free.items():
            endless = Block(0, 0, _ENDLESS, small, free=True)
            pool.append((endless.order, endless))
        self._pages: dict[bool, set[int]] = {True: set(), False: set()}

    def malloc(self, size: int) -> Block | None:
        block = super().malloc(size)
        if block is not None:
            self._map(block)
        return block

    def empty_cache(self) -> None:
        """Unmap pages that no allocated block touches."""
        for small, pool in self._free.items():
            page = _page(small)
            for _, block in pool:
                first, stop = -(-block.offset // page), (block.offset + block.size) // page
                gone = {number for number in self._pages[small] if first <= number < stop}
                self._pages[small] -= gone
                self.reserved -= len(gone) * page

    def _least_rest(self, small: bool) -> int:
        return ROUNDING

    def _map(self, block: Block) -> None:
        """Map the pages of a block."""
        page, pages = _page(block.small), self._pages[block.small]
        missing = set(range(block.offset // page, -(-(block.offset + block.size) // page))) - pages
        if self.limit is not None and self.reserved + len(missing) * page > self.limit:
            self.empty_cache()
        pages |= missing
        self.reserved += len(missing) * page
        self.peak_reserved = max(self.peak_reserved, self.reserved)


_ENDLESS = 2**60


def _page(small: bool) -> int:
    return SMALL_SEGMENT if small else LARGE_SEGMENT
