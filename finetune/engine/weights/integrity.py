"""Whether the files of a checkpoint are those that were written: their sizes and SHA-256, noted then and compared before a load."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

Digests = dict[str, tuple[int, str]]
"""File, relative to the checkpoint's folder -> (bytes, SHA-256 in hexadecimal, as `sha256sum` prints it)."""


def digests(folder: Path, rank: int) -> Digests | OSError:
    """The digests of the files in a checkpoint's folder that a rank has written, or why it cannot read them.

    DCP names its files by ranks; all others are rank 0's.
    """
    try:
        found = {}
        for file in (file for file in folder.rglob("*") if file.is_file()):
            writer = re.match(r"__(\d+)_", file.name)
            if rank == (int(writer[1]) if writer else 0):
                found[file.relative_to(folder).as_posix()] = _digest(file)
    except OSError as error:
        return error
    return found


def damage(folder: Path, expected: Mapping[str, tuple[int, str]], share: int, shares: int) -> list[str]:
    """What is wrong with files, in words, a line each; empty if they are as they were written.

    Args:
        expected: from `digests`.
        share, shares: only this one of so many shares of the files is read, of about the same size each.
    Raises:
        OSError: a file that is there cannot be read just now.
    """
    by_size = sorted(expected, key=lambda name: (-expected[name][0], name))
    found = []
    for name in by_size[share::shares]:
        size, digest = expected[name]
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                found.append(f"{name} has {actual} bytes instead of {size}")
            elif _digest(folder / name) != (size, digest):
                found.append(f"{name} has other contents than were written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
    return found


def _digest(file: Path) -> tuple[int, str]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return opened.tell(), digest


def missing_bytes(folder: Path, contents: Metadata) -> list[str]:
    """Which files of DCP are shorter than its table of contents says, or absent, a line each."""
    ends: dict[str, int] = {}
    for place in contents.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    found = []
    for name, end in sorted(ends.items()):
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size is None:
            found.append(f"{folder.name}/{name} is missing")
        elif size < end:
            found.append(f"{folder.name}/{name} has {size} bytes instead of {end}")
    return found
