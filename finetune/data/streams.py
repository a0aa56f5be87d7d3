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
        fingerprint: JSON values that determine its content; they are part of the cache key.
        read: returns its content: uint8 frames (F, H, W, 3), a text, uint8 pixels (H, W, 3), or the path of a file.
        file: the dataset's file that holds it, if there is one.
        start: time in the file at which it begins, in seconds.
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
    """The first frames of a video at a frame rate, as many and as large as the bucket."""
    fingerprint = content_hash, str(bucket), fps, "head"
    return Stream("video", fingerprint, lambda: decode.decode(path, info, bucket, fps), path)


def image_stream(source: str, content: str, bucket: Bucket) -> Stream:
    """A condition image at a bucket's height and width. `content` is the hash of its file, or its address."""
    fingerprint = content, bucket.height, bucket.width
    return Stream("image", fingerprint, lambda: load_image(source, bucket.height, bucket.width))


def file_stream(name: str, path: Path, content_hash: str) -> Stream:
    """Any other file. The encoder gets its path and reads it itself."""
    return Stream(name, (content_hash,), lambda: path, path)
