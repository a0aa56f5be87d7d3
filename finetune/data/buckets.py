"""Assigns each clip the bucket that it is trained in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.cover import cover_scale
from finetune.data.decode import VideoInfo
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

_CROPPED = 0.02  # share of the picture: sides that are rounded to a multiple crop less


@dataclass(frozen=True)
class BucketFit:
    """A clip's bucket, and what is lost by fitting the clip into it.

    Attributes:
        fps: frame rate that the clip is trained at.
        former_fps: the same, as versions with the first decoder knew it.
        frames_available: number of frames that the clip has at this rate.
        cropped: share of the picture that lies outside the bucket.
        enlarged: factor by which the picture is scaled; above 1 it is enlarged.
    """

    bucket: Bucket
    fps: float
    frames_available: int
    cropped: float
    enlarged: float
    former_fps: float | None = None

    @property
    def is_cropped(self) -> bool:
        """Whether so much is cropped that it is worth a mention."""
        return self.cropped > _CROPPED

    @property
    def is_enlarged(self) -> bool:
        """Whether the picture is scaled up."""
        return self.enlarged > 1

    @property
    def trimmed(self) -> int:
        """How many more frames the clip has than its bucket, wherever its window lies."""
        return self.frames_available - self.bucket.frames


def fit_to_bucket(
    clip: VideoInfo,
    buckets: Sequence[Bucket],
    fps: float | None,
    where: str,
    is_image: bool = False,
    by_area: bool = False,
) -> BucketFit:
    """Choose the bucket that loses least of a clip: nearest aspect ratio, then most frames, then largest picture not enlarged.

    Images have buckets of one frame, and videos those of several, if they are long enough for any.

    Args:
        fps: the frame rate to train at; None keeps the clip's own.
        where: the clip's name, for the error.
        by_area: whether the buckets are those of data.area and data.frames, for the error.
    Raises:
        UserError: the clip is shorter than every bucket.
    """
    rate = fps or clip.fps
    available = 1 if is_image else clip.frames_at(rate)
    possible = [bucket for bucket in buckets if bucket.frames <= available]
    if not possible and is_image:
        near = min(buckets, key=lambda bucket: _aspect_distance(clip, bucket))
        example = Bucket(1, near.height, near.width)
        add = "add 1 to data.frames" if by_area else f'add one to data.buckets, like "{example}"'
        raise UserError("an image needs a bucket of one frame", add, where)
    if not possible:
        faster = "raise data.fps, " if fps and fps < clip.fps else ""
        shortest = min(bucket.frames for bucket in buckets)
        add = "length of at most {} to data.frames" if by_area else "bucket of at most {} frames to data.buckets"
        raise UserError(
            f"{available} frame{'s' if available > 1 else ''} at {rate:g} fps, but the shortest bucket has {shortest}",
            f"add a {add.format(available)}, {faster}or remove the clip",
            where,
        )

    def loss(bucket: Bucket) -> tuple[bool, float, int, bool, int]:
        area = bucket.height * bucket.width
        grows = cover_scale(clip.height, clip.width, bucket) > 1
        return (
            bucket.frames == 1,
            round(_aspect_distance(clip, bucket), 6),
            -bucket.frames,
            grows,
            area if grows else -area,
        )

    best = min(possible, key=loss)
    enlarged, cropped = cover_scale(clip.height, clip.width, best), 1 - math.exp(-_aspect_distance(clip, best))
    return BucketFit(best, rate, available, cropped, enlarged, fps or clip.former_fps)


def _aspect_distance(clip: VideoInfo, bucket: Bucket) -> float:
    return abs(math.log(clip.width / clip.height) - math.log(bucket.width / bucket.height))
