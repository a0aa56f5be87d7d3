"""The named sources of a clip, as encoders read them: its frames, its caption, and the files that a manifest names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import decode
from finetune.data.images import load_image
from finetune.recipe import Bucket

_START = "head"  # every source is read from its beginning


@dataclass(frozen=True)
class Source:
    """One source of a clip.

    Attributes:
        fingerprint: JSON values that determine its content; they are part of a cache key.
        read: returns the content: uint8 frames (F, H, W, 3), a text, uint8 pixels (H, W, 3), or a `SourceFile`.
    """

    fingerprint: tuple[Any, ...]
    read: Callable[[], Any]


@dataclass(frozen=True)
class SourceFile:
    """A file beside a clip's video (sound, a mask, a control video), for an encoder that reads it itself.

    Attributes:
        start: seconds into the file at which the clip begins.
        bucket, fps: the clip's, whose frames the encoding has to match.
    """

    path: Path
    start: float
    bucket: Bucket
    fps: float


def caption_source(text: str) -> Source:
    """A caption or prompt."""
    return Source((text,), lambda: text)


def video_source(path: Path, content_hash: str, info: decode.VideoInfo, bucket: Bucket, fps: float) -> Source:
    """The first frames of a video, as many as the bucket has, at `fps` frames a second."""
    fingerprint = content_hash, str(bucket), fps, _START
    return Source(fingerprint, lambda: decode.decode(path, info, bucket, fps))


def image_source(path_or_address: str, content: str, bucket: Bucket) -> Source:
    """A condition image with the height and width of a bucket; `content` is the hash of its file, or its address."""
    fingerprint = content, bucket.height, bucket.width
    return Source(fingerprint, lambda: load_image(path_or_address, bucket.height, bucket.width))


def file_source(path: Path, content_hash: str, bucket: Bucket, fps: float) -> Source:
    """A file that the manifest names beside the video."""
    return Source((content_hash, str(bucket), fps, _START), lambda: SourceFile(path, 0.0, bucket, fps))
