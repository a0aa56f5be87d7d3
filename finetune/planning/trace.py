"""What lived in a memory when: each storage from its coming to its going, and what set the peak of each phase."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from finetune.planning.allocator import Block, CachingAllocator, ExpandableAllocator


@dataclass(eq=False)
class Storage:
    """One storage's life. `category` is what it was named, or else what was running when it came."""

    size: int
    category: str
    block: Block | None = None


@dataclass(frozen=True)
class Peak:
    """The most that was taken in a phase, in bytes, and what it consisted of.

    Attributes:
        allocated, reserved: as torch's statistics count, with rounding and segments.
        requested: the sizes of the storages alone.
        before: of that, what was there when the phase began.
        running, module: what set the peak, and the module that was called last then, if any.
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
    """Is told of each storage of one memory, by its key; keeps what it needs to explain a phase's peak."""

    def __init__(
        self, limit: int | None = None, expandable: bool = False, locked: frozenset[str] = frozenset()
    ) -> None:
        """
        Args:
            limit: bytes of the memory; None for any number.
            expandable: the allocator's segments grow.
            locked: categories that torch's allocator of page-locked host memory holds, in powers of two
                (ATen/core/CachingHostAllocator.h).
        """
        self.locked = locked
        self.allocator = (ExpandableAllocator if expandable else CachingAllocator)(limit)
        self.live: dict[int, Storage] = {}
        self.running, self.module = "load", ""
        self.begin()

    def begin(self) -> None:
        """A new phase."""
        self.allocator.reset_peak()
        self._before = list(self.live.values())
        self._size_before = sum(storage.size for storage in self._before)
        self._events: list[tuple[Storage, bool, int]] = []  # (which, whether it came, bytes then reserved)
        self._highest, self._at, self._in = self.allocator.allocated, 0, (self.running, self.module)

    def resize(self, key: int, size: int) -> None:
        """A storage has come, has got another size, or has gone (0 bytes)."""
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
        """Say what a live storage is."""
        if key in self.live:
            self.live[key].category = category

    def peak(self) -> Peak:
        """The peak since `begin`."""
        there = dict.fromkeys(self._before)
        for storage, came, _ in self._events[: self._at]:
            if came:
                there[storage] = None
            else:
                del there[storage]
        parts: Counter[str] = Counter()
        for storage in there:
            size = storage.size
            parts[storage.category] += 1 << (size - 1).bit_length() if storage.category in self.locked else size
        allocator = self.allocator
        return Peak(
            allocator.peak_allocated, allocator.peak_reserved, parts.total(), self._size_before, *self._in, dict(parts)
        )

    def timeline(self, count: int) -> list[tuple[int, dict[str, int]]]:
        """(bytes reserved, requested bytes by category) since `begin`, at about `count` moments."""
        sizes: Counter[str] = Counter()
        for storage in self._before:
            sizes[storage.category] += storage.size
        every, moments = max(1, len(self._events) // count), []
        for place, (storage, came, reserved) in enumerate(self._events):
            sizes[storage.category] += storage.size if came else -storage.size
            if place % every == 0:
                moments.append((reserved, dict(sizes)))
        return moments
