"""How a picture is fitted into a bucket: scaled so that it covers it, and cropped at the centre."""

from typing import NamedTuple

from finetune.recipe import Bucket


class Cover(NamedTuple):
    """A picture's size once it is scaled, and the place in it at which the bucket's rows and columns begin, in pixels."""

    height: int
    width: int
    top: int
    left: int


def cover_scale(height: int, width: int, bucket: Bucket) -> float:
    """The factor by which a picture is scaled; above 1 it is enlarged."""
    return max(bucket.height / height, bucket.width / width)


def cover(height: int, width: int, bucket: Bucket) -> Cover:
    """How a picture of `height` rows is fitted into a bucket."""
    scale = cover_scale(height, width, bucket)
    rows, columns = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    return Cover(rows, columns, (rows - bucket.height) // 2, (columns - bucket.width) // 2)
