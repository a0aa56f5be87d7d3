"""A training shape, written `FxHxW`: frames, height and width in pixels; and the area of one, written `HxW`."""

import re
from typing import NamedTuple


class Bucket(NamedTuple):
    """Frames, height, width: the order of a recipe's `"49x512x768"`."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: object) -> "Bucket":
        """Parse a text like `"49x512x768"`. Raises ValueError that names the expected form."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text) if isinstance(text, str) else None
        if match is None or 0 in map(int, match.groups()):
            raise ValueError(f'{text!r} is not a bucket; write frames x height x width, like "49x512x768"')
        return cls(*map(int, match.groups()))


class Area(NamedTuple):
    """Height, width: the order of a recipe's `area = "512x768"`. Their product counts, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: object) -> "Area":
        """Parse a text like `"512x768"`. Raises ValueError that names the expected form."""
        match = re.fullmatch(r"(\d+)x(\d+)", text) if isinstance(text, str) else None
        if match is None or 0 in map(int, match.groups()):
            raise ValueError(f'{text!r} is not an area; write height x width, like "512x768"')
        return cls(*map(int, match.groups()))
