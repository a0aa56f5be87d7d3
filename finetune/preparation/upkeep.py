"""Upkeep of a cache: what takes room in it, what is damaged, and what no recipe uses."""

import stat
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from finetune.data.cache import Cache, DamagedItem, StoredItem, has_checksum, read_item
from finetune.runtime.errors import Problem
from finetune.runtime.progress import ProgressLine
from finetune.runtime.units import in_words

_DAY = 24 * 3600
_AT_ONCE = 50  # items between two updates of the progress line

Keys = Collection[tuple[str, str]]


def room(cache: Cache, uses: Mapping[str, Keys]) -> list[str]:
    """What takes room in a cache, in lines: each kind of item, and what each recipe uses.

    Args:
        uses: recipe -> the items that it uses.
    """
    items = list(cache.items())
    lines = [f"{cache.folder}: {_amount(items)}"]
    for kind in sorted({item.kind for item in items}):
        lines.append(f"  {kind}: {_amount(item for item in items if item.kind == kind)}")
    stored = {item.path for item in items}
    others = sum(_size(path) for path in cache.folder.rglob("*") if path not in stored)
    lines.append(f"  other files (plans, what is known of clips): {in_words(others)}")
    for recipe, keys in uses.items():
        found = [item for item in items if (item.kind, item.key) in keys]
        elsewhere = set().union(*(other for name, other in uses.items() if name != recipe))
        alone = [item for item in found if (item.kind, item.key) not in elsewhere]
        missing = len(keys) - len(found)
        lines.append(
            f"{recipe}: {_amount(found)}"
            + (f", of which {_amount(alone)} are used by no other recipe here" if len(uses) > 1 else "")
            + (f"; {missing} are not encoded yet" if missing else "")
        )
    if uses:
        lines.append(f"used by none of these recipes: {_amount(unused(cache, uses.values()))}")
    return lines


class Verified(NamedTuple):
    """What reading every item has shown: damaged ones, those that could not be read, and what was compared in words."""

    damaged: list[tuple[StoredItem, Problem]]
    unreadable: list[Problem]
    told: str


def verify(cache: Cache) -> Verified:
    """Read every item and compare its checksum."""
    items = list(cache.items())
    damaged: list[tuple[StoredItem, Problem]] = []
    unreadable: list[Problem] = []
    unchecked = 0
    with ProgressLine("verifying", len(items), enabled=True) as progress:
        for number, item in enumerate(items, start=1):
            try:
                read_item(item.path)
                unchecked += not has_checksum(item.path)
            except FileNotFoundError:  # another run has removed it in the meantime
                pass
            except DamagedItem as damage:
                cure = "remove it (--remove): the next start that needs it encodes it anew"
                damaged.append((item, Problem(f"this item is damaged: {damage}", str(item.path), cure)))
            except OSError as error:
                cure = "check the disk and the permissions"
                unreadable.append(Problem(f"this item cannot be read ({error.strerror})", str(item.path), cure))
            if number % _AT_ONCE == 0 or number == len(items):
                progress.update(number, "")
    told = f"{_amount(items)} read"
    if unchecked:
        told += (
            f"; {unchecked} of them were written before items had checksums, so that only damage to their form shows"
        )
    return Verified(damaged, unreadable, told)


def unused(cache: Cache, uses: Iterable[Keys], days: float = 0.0) -> list[StoredItem]:
    """The items that are in none of `uses`, and were written at least so many days ago."""
    keys = set().union(*uses)
    written_before = time.time() - days * _DAY
    return [
        item
        for item in cache.items()
        if (item.kind, item.key) not in keys and (not days or item.written <= written_before)
    ]


def remove(items: Sequence[StoredItem]) -> list[Problem]:
    """Remove items from their cache; returns what could not be removed."""
    problems = []
    for item in items:
        try:
            item.path.unlink(missing_ok=True)
        except OSError as error:
            cure = "check the permissions, and whether the disk is mounted read-only"
            problems.append(Problem(f"cannot be removed ({error.strerror})", str(item.path), cure))
    return problems


def by_kind(items: Sequence[StoredItem]) -> str:
    """How many items of each kind, and their size, in words."""
    kinds = sorted({item.kind for item in items})
    return "; ".join(f"{kind}: {_amount(item for item in items if item.kind == kind)}" for kind in kinds)


def _size(path: Path) -> int:
    """A file's bytes; 0 of a folder, and of what another run has removed or renamed since it was listed."""
    with suppress(OSError):
        found = path.stat()
        return found.st_size if stat.S_ISREG(found.st_mode) else 0
    return 0


def _amount(items: Iterable[StoredItem]) -> str:
    sizes = [item.size for item in items]
    return f"{len(sizes)} item{'' if len(sizes) == 1 else 's'}, {in_words(sum(sizes))}"
