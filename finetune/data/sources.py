"""The named sources of a clip, as encoders read them: its frames, its caption, and the files that a manifest names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data import column_files, decode
from finetune.data.images import load_image
from finetune.recipe import Bucket

_START = "head"  # every source is read from its beginning
FRAMES = ("first_frame", "last_frame")  # sources that every clip has, and that a prompt's images stand for


@dataclass(frozen=True)
class Source:
    """One source of a clip.

    Attributes:
        fingerprint: JSON values that determine its content; they are part of a cache key.
        read: returns the content: uint8 frames (F, H, W, 3), a text, uint8 pixels (H, W, 3), a `SourceFile`, or None for
            an image that is not there.
    """

    fingerprint: tuple[Any, ...]
    read: Callable[[], Any]


@dataclass(frozen=True)
class SourceFile:
    """A file beside a clip's video (sound, a mask, a control video), for an encoder that reads it itself.

    Attributes:
        start: seconds into the file at which the clip begins.
        bucket, fps: the clip's, whose frames the encoding has to match.
        clip: the clip's video, for messages.
        info: the file's size and length, of a mask, a control or a reference video or image; None of other files.
    """

    path: Path
    start: float
    bucket: Bucket
    fps: float
    clip: Path
    info: decode.VideoInfo | None = None

    def frames(self) -> np.ndarray:
        """The file's frames, uint8 (F, H, W, 3), at the clip's times and in its bucket; one frame of an image."""
        assert self.info is not None
        return column_files.read_frames(self.path, self.info, self.bucket, self.fps, self.start)


def caption_source(text: str) -> Source:
    """A caption or prompt."""
    return Source((text,), lambda: text)


def video_source(path: Path, content_hash: str, info: decode.VideoInfo, bucket: Bucket, fps: float) -> Source:
    """The first frames of a video, as many as the bucket has, at `fps` frames a second."""
    fingerprint = content_hash, str(bucket), fps, _START
    return Source(fingerprint, lambda: decode.decode(path, info, bucket, fps))


def frame_sources(
    path: Path, content_hash: str, info: decode.VideoInfo, bucket: Bucket, fps: float
) -> dict[str, Source]:
    """The first and the last of a video's frames in a bucket, as a family takes them for condition images."""
    identity = content_hash, str(bucket), fps, _START
    first = Bucket(1, bucket.height, bucket.width)
    return {
        "first_frame": Source((*identity, "first frame"), lambda: decode.decode(path, info, first, fps)[0]),
        "last_frame": Source((*identity, "last frame"), lambda: decode.decode(path, info, bucket, fps)[-1]),
    }


def image_source(path_or_address: str, content: str) -> Source:
    """A condition image as it is, since pipelines resize it; `content` is the hash of its file, or its address."""
    return Source(("image", content), lambda: load_image(path_or_address))


def fitted_source(source: Source, fit: Callable[[Image.Image, Bucket], Image.Image], shape: Bucket) -> Source:
    """A condition image as `fit` gives it to the pipeline that generates a video of a shape."""
    return Source((*source.fingerprint, str(shape)), lambda: np.asarray(fit(Image.fromarray(source.read()), shape)))


def no_image_source() -> Source:
    """The image of a prompt or caption that is encoded without one."""
    return Source(("no image",), lambda: None)


def file_source(column: str, file: SourceFile, content_hash: str) -> Source:
    """A file that the manifest names beside the video: frames of a control or reference video, else a `SourceFile`."""
    fingerprint = content_hash, str(file.bucket), file.fps, _START
    return Source(fingerprint, file.frames if column in column_files.FRAME_COLUMNS else lambda: file)
