"""Looks through the boxes of a file for a place where it is cut or overwritten, which FFmpeg passes over in silence.

Only headers are read, so that this costs little for large files. What is damaged inside a frame is found by its decoder.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEAD, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_TOP = frozenset(
    {  # what a Matroska segment consists of: heads, information, clusters, tracks, cues, attachments, chapters, tags
        0x114D9B74,
        0x1549A966,
        _CLUSTER,
        0x1654AE6B,
        0x1C53BB6B,
        0x1941A469,
        0x1043A770,
        0x1254C367,
    }
)
_IN_CLUSTER = {
    0xE7,
    0x5854,
    0xA7,
    0xAB,
    0xA3,
    0xA0,
    0xAF,
}  # times, silent tracks, position, sizes, blocks and groups of them
_ANYWHERE = frozenset({0xEC, 0xBF})  # void, checksum
_MOVIE_BOXES = {b"moov", b"mdat", b"moof"}


class Break(NamedTuple):
    """A place where a file is cut or damaged: what is wrong, in words, and the first byte of what is not sound."""

    what: str
    place: int


def break_in(path: Path, form: str) -> Break | None:
    """Where a file of one of FFmpeg's formats is cut or damaged; None if no such place is found. Raises OSError."""
    look = {"matroska,webm": _matroska, "gif": _gif, "mov,mp4,m4a,3gp,3g2,mj2": _movie}.get(form)
    if look is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        return look(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _cut(end: int, size: int, place: int) -> Break:
    return Break(f"the file is cut off: it has {size:,} of {end:,} bytes", place)


def _damaged(place: int, size: int) -> Break:
    return Break(f"the file is damaged {place / size:.0%} of the way into it (at byte {place:,})", place)


def _second(place: int) -> Break:
    return Break(f"a second film begins behind the first (at byte {place:,}), and players do not show it", place)


def _movie(handle: int, size: int) -> Break | None:
    """MP4 and QuickTime: a row of boxes, each with its length."""
    position, seen = 0, set[bytes]()
    while position + 8 <= size:
        head = os.pread(handle, 16, position)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if head[4:8] in _MOVIE_BOXES and position + length > size:
            return _cut(position + length, size, size)
        if head[4:8] == b"ftyp" and seen >= {b"moov", b"mdat"} and b"moof" not in seen:
            return _second(position)
        seen.add(head[4:8])
        if length < 8:  # 0 is "until the end"; anything else is no box
            return None
        position += length
    return None


def _matroska(handle: int, size: int) -> Break | None:
    """Matroska and WebM: nested elements, each with its number and its length, which live recordings leave open."""
    position = 0
    end: int | None = None
    while end is None:
        head = _element(handle, position, size)
        if head is None or (head[2] is None and head[0] != _SEGMENT):
            return None
        number, start, edge = head
        position, end = (start, edge or size) if number == _SEGMENT else (edge or size, None)
    for place, known, edge in _elements(handle, position, min(end, size)):
        if edge > size or (end > size and not known):
            return _cut(max(edge, end), size, place)
        if not known or edge > end:
            return _damaged(place, size)
    if (behind := _element(handle, end, size)) and behind[0] in (_HEAD, _SEGMENT):
        return _second(end)
    return _cut(end, size, size) if end > size else None


def _elements(handle: int, position: int, limit: int) -> Iterator[tuple[int, bool, int]]:
    """Position, whether it is a known one in its place, and end of the elements of a segment and of its clusters."""
    cluster_end: int | None = 0  # of the cluster around `position`; None if its length is open
    while position < limit:
        head = _element(handle, position, limit)
        inside = cluster_end is None or position < cluster_end
        known = (_IN_CLUSTER if inside else frozenset()) | (frozenset() if inside and cluster_end else _TOP) | _ANYWHERE
        if head is None or head[0] not in known or (head[2] is None and head[0] != _CLUSTER):
            yield position, False, position
            return
        number, start, end = head
        fits = not (inside and cluster_end and end and end > cluster_end)
        yield position, fits, start if end is None else end
        if number == _CLUSTER:
            cluster_end, position = end, start
        else:
            cluster_end = 0 if number in _TOP else cluster_end
            position = start if end is None else end


def _element(handle: int, position: int, limit: int) -> tuple[int, int, int | None] | None:
    """Number, start of the content and end (None if open) of the element at a position; None if there is none."""
    head = os.pread(handle, 12, position)
    if len(head) < 2 or position >= limit or not head[0]:
        return None
    digits = 9 - head[0].bit_length()
    if digits > 4 or len(head) <= digits or not head[digits]:
        return None
    width = 9 - head[digits].bit_length()
    if len(head) < digits + width:
        return None
    number = int.from_bytes(head[:digits], "big")
    length = int.from_bytes(head[digits : digits + width], "big") - (1 << 7 * width)
    start = position + digits + width
    return number, start, None if length == (1 << 7 * width) - 1 else start + length


def _gif(handle: int, size: int) -> Break | None:
    """GIF: a head, then images and extensions in blocks of at most 255 bytes, then a semicolon."""
    head = os.pread(handle, 13, 0)
    position = place = 13 + _palette(head[10]) if len(head) == 13 else size
    while position < size:
        place = position
        kind = os.pread(handle, 1, position)
        if kind == b";":
            return None
        if kind == b"!":
            position += 2
        elif kind == b",":
            image = os.pread(handle, 10, position)
            position += 11 + (_palette(image[9]) if len(image) == 10 else 0)
        else:
            return _damaged(position, size)
        while position < size and (length := os.pread(handle, 1, position)[0]):
            position += 1 + length
        position += 1
    return Break("the file is cut off: a GIF ends with a semicolon", place)


def _palette(flags: int) -> int:
    """Bytes of the colour table that flags announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
