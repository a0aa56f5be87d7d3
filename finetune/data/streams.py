"""The named sources of a clip, as encoders read them: its frames, its caption, and the files that a manifest names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import decode
from finetune.data.images import load_image
from finetune.recipe import Bucket


@dataclass(frozen=True)
class Stream:
    """One source of a clip.

    Attributes:
        name: "video", "caption", "image", or the manifest's column.
        fingerprint: JSON values that its content follows from; they are part of a cache key.
        read: its content: uint8 frames (F, H, W, 3), a text, uint8 pixels (H, W, 3), or the path of a file.
        file: where it lies; None for a text.
        start: seconds into the file at which it begins.
    """

    name: str
    fingerprint: tuple[Any, ...]
    read: Callable[[], Any]
    file: Path | None = None
    start: float = 0.0


def caption_stream(text: str) -> Stream:
    """A caption or prompt."""
    return Stream("caption", (text,), lambda: text)


def video_stream(path: Path, content_hash: str, info: decode.VideoInfo, bucket: Bucket, fps: float) -> Stream:
    """The first frames of a video that fill a bucket at a frame rate."""
    fingerprint = content_hash, str(bucket), fps, "head"
    return Stream("video", fingerprint, lambda: decode.decode(path, info, bucket, fps), path)


def image_stream(source: str, content: str, bucket: Bucket) -> Stream:
    """A condition image of a bucket's height and width; `content` is its hash, or its address."""
    fingerprint = content, bucket.height, bucket.width
    return Stream("image", fingerprint, lambda: load_image(source, bucket.height, bucket.width))


def file_stream(name: str, path: Path, content_hash: str) -> Stream:
    """Any other file, for an encoder that reads it itself."""
    return Stream(name, (content_hash,), lambda: path, path)
