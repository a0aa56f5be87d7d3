"""The pictures that a manifest names beside a clip's video: masks, and control and reference videos or images.

They are read at the clip's times, and scaled and cropped into the clip's bucket as the clip is.
"""

from pathlib import Path

import numpy as np

from finetune.data import decode
from finetune.data.buckets import BucketFit
from finetune.data.clip import VIDEO_SUFFIXES
from finetune.data.decode import VideoInfo
from finetune.data.images import decode_image, probe_image
from finetune.data.video.picture import UNREAD_ALPHA
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

MASK = "mask"  # weighs the loss, whatever the model
FRAME_COLUMNS = ("control", "reference")  # columns whose files encoders are given as frames
PICTURES = (MASK, *FRAME_COLUMNS)

_SAME_ASPECT = 0.01  # of the width: room for sizes that are rounded
_ROUNDED = 2  # pixels of the width


def is_image(path: Path) -> bool:
    """Whether a file of these columns is an image rather than a video."""
    return path.suffix.lower() not in VIDEO_SUFFIXES


def probe_picture(path: Path) -> VideoInfo:
    """The size of a video or an image, which has one frame. Raises UserError if it is neither."""
    return probe_image(path) if is_image(path) else decode.probe(path)


def check_picture(
    column: str, file: Path, info: VideoInfo, clip: Path, shown: VideoInfo, fit: BucketFit, frames: int
) -> None:
    """Raise UserError if a file of a column does not go with its clip: it is shorter, or has another aspect ratio.

    Args:
        info: the file's.
        shown: the clip's.
        frames: how many of the clip's first frames are used, at the frame rate of training.
    """
    named, where = f"its {column} {file}", str(clip)
    if column != "reference":  # which is another picture
        width = info.height * shown.width / shown.height
        if abs(info.width - width) > max(_ROUNDED, _SAME_ASPECT * width):
            raise UserError(
                f"{named} is {info.width}x{info.height} pixels, and the clip {shown.width}x{shown.height}, of another aspect ratio",
                f"scale or crop it to the clip's aspect ratio: it is fitted into {fit.bucket} as the clip is",
                where,
            )
    if column == MASK and UNREAD_ALPHA in info.changes:
        what = f"{named} is a video {UNREAD_ALPHA}: what is transparent in it would count"
        raise UserError(what, "make it without transparency, black where it must not count", where)
    if is_image(file):
        if column == "control" and fit.bucket.frames > 1:
            what = f"{named} is an image, and the clip is trained with {fit.bucket.frames} frames"
            raise UserError(what, "name a video that is as long as the clip", where)
        return
    if (available := info.frames_at(fit.fps)) < frames:
        or_image = ", or use an image, which holds for all frames" if column == MASK else ""
        raise UserError(
            f"{named} has {available} frame{'s' if available > 1 else ''} at {fit.fps:g} fps, and {frames} of the clip are used",
            f"make it as long as the clip{or_image}",
            where,
        )


def read_frames(
    path: Path, info: VideoInfo, bucket: Bucket, fps: float, start: float = 0.0, background: str = "white"
) -> np.ndarray:
    """The frames of a video at `fps` from `start` (seconds) on, or those of an image, which is one, as they fit into a bucket.

    Args:
        background: a colour, seen where the picture is transparent.
    Returns:
        uint8 (F, H, W, 3); F = 1 of an image.
    Raises:
        UserError: the file cannot be read.
    """
    if is_image(path):
        return decode_image(path, bucket._replace(frames=1), background)
    return decode.decode(path, info, bucket, fps, start, background=background)
