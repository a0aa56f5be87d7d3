"""Ways in which files are damaged: by broken transfers, failing disks and recorders that were switched off."""

import random
from collections.abc import Callable

Damage = Callable[[bytes, random.Random], bytes]


def cut(data: bytes, chance: random.Random) -> bytes:
    """The end is missing."""
    return data[: int(len(data) * chance.uniform(0.4, 0.9))]


def hole(data: bytes, chance: random.Random) -> bytes:
    """A part is missing, and what follows has moved up."""
    start = int(len(data) * chance.uniform(0.3, 0.7))
    return data[:start] + data[start + len(data) // 10 :]


def zeros(data: bytes, chance: random.Random) -> bytes:
    """A part was never written."""
    start, length = int(len(data) * chance.uniform(0.3, 0.7)), len(data) // 15
    return data[:start] + bytes(length) + data[start + length :]


def flips(data: bytes, chance: random.Random) -> bytes:
    """Some bits are wrong."""
    changed = bytearray(data)
    for _ in range(20):
        changed[chance.randrange(len(data) // 4, len(data) * 9 // 10)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def headless(data: bytes, chance: random.Random) -> bytes:
    """The beginning is missing."""
    return data[int(len(data) * chance.uniform(0.05, 0.2)) :]


def noise(data: bytes, chance: random.Random) -> bytes:
    """A part was overwritten by something else."""
    start, length = int(len(data) * chance.uniform(0.3, 0.7)), len(data) // 20
    return data[:start] + chance.randbytes(length) + data[start + length :]


def anywhere(data: bytes, chance: random.Random) -> bytes:
    """Bytes are wrong, most of them in the head, where a file says what is in it."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 3, 10, 50))):
        reach = chance.choice((64, 1024, len(data)))
        changed[chance.randrange(min(reach, len(data)))] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
    return bytes(changed)


DAMAGES: dict[str, Damage] = {f.__name__: f for f in (cut, hole, zeros, flips, headless, noise)}
