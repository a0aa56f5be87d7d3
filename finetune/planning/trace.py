"""The storages of a memory over time: when each was allocated and freed, and what the peak of each phase consisted of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from finetune.planning.allocator import Block, CachingAllocator, ExpandableAllocator


@dataclass(eq=False)
class Storage:
    """One allocation. `category` is the name that it was given, or else what was running when it was allocated."""

    size: int
    category: str
    block: Block | None = None


@dataclass(frozen=True)
class Peak:
    """The peak of a memory in a phase, in bytes, and what it consisted of.

    Attributes:
        allocated, reserved: as torch's statistics count them, with rounding and segments.
        requested: the sum of the storages' own sizes.
        before: requested bytes when the phase began.
        running, module: what was running at the peak, and the module that had been called last, if any.
        parts: requested bytes by category.
    """

    allocated: int = 0
    reserved: int = 0
    requested: int = 0
    before: int = 0
    running: str = ""
    module: str = ""
    parts: dict[str, int] = field(default_factory=dict)


class Trace:
    """Records the storages of one memory, by key, as far as is needed to explain a phase's peak."""

    def __init__(
        self, limit: int | None = None, expandable: bool = False, locked: frozenset[str] = frozenset()
    ) -> None:
        """
        Args:
            limit: bytes of the memory; None for no limit.
            expandable: whether the allocator has expandable segments.
            locked: categories in page-locked host memory, whose sizes torch rounds up to powers of two
                (ATen/core/CachingHostAllocator.h).
        """
        self.locked = locked
        self.allocator = (ExpandableAllocator if expandable else CachingAllocator)(limit)
        self.live: dict[int, Storage] = {}
        self.running, self.module = "load", ""
        self.begin()

    def begin(self) -> None:
        """Begin a phase."""
        self.allocator.reset_peak()
        self._before = list(self.live.values())
        self._size_before = sum(storage.size for storage in self._before)
        self._events: list[tuple[Storage, bool, int]] = []  # (storage, whether it was allocated, bytes then reserved)
        self._highest, self._at, self._in = self.allocator.allocated, 0, (self.running, self.module)

    def resize(self, key: int, size: int) -> None:
        """Record that a storage was allocated, got another size, or was freed (0 bytes)."""
        old = self.live.pop(key, None)
        if old is not None:
            self.allocator.free(old.block)
            self._events.append((old, False, self.allocator.reserved))
        if size:
            storage = Storage(size, old.category if old else self.running, self.allocator.malloc(size))
            self.live[key] = storage
            self._events.append((storage, True, self.allocator.reserved))
            if self.allocator.allocated > self._highest:
                self._highest, self._at = self.allocator.allocated, len(self._events)
                self._in = self.running, self.module

    def name(self, key: int, category: str) -> None:
        """Set the category of a live storage; a key that is not live is ignored."""
        if key in self.live:
            self.live[key].category = category

    def peak(self) -> Peak:
        """The peak since `begin`."""
        live = dict.fromkeys(self._before)
        for storage, allocated, _ in self._events[: self._at]:
            if allocated:
                live[storage] = None
            else:
                del live[storage]
        parts: Counter[str] = Counter()
        for storage in live:
            size = storage.size
            parts[storage.category] += 1 << (size - 1).bit_length() if storage.category in self.locked else size
        allocator = self.allocator
        return Peak(
            allocator.peak_allocated, allocator.peak_reserved, parts.total(), self._size_before, *self._in, dict(parts)
        )

    def timeline(self, count: int) -> list[tuple[int, dict[str, int]]]:
        """(bytes reserved, requested bytes by category) at about `count` moments since `begin`."""
        sizes: Counter[str] = Counter()
        for storage in self._before:
            sizes[storage.category] += storage.size
        every, moments = max(1, len(self._events) // count), []
        for place, (storage, allocated, reserved) in enumerate(self._events):
            sizes[storage.category] += storage.size if allocated else -storage.size
            if place % every == 0:
                moments.append((reserved, dict(sizes)))
        return moments
