"""The named sources of a clip, as encoders read them: its frames, its caption, and the files that a manifest names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data import column_files, decode
from finetune.data.clip import Clip
from finetune.data.images import IMAGE_DECODER, decode_image, load_image
from finetune.data.video.picture import TRANSPARENT
from finetune.recipe import Bucket

FRAMES = ("first_frame", "last_frame")  # sources that every clip has, and that a prompt's images stand for


@dataclass(frozen=True)
class Source:
    """One source of a clip.

    Attributes:
        fingerprint: JSON values that determine its content; they are part of a cache key.
        read: returns the content: uint8 frames (F, H, W, 3), a text, uint8 pixels (H, W, 3), a `SourceFile`, or None for
            an image that is not there.
        former: the fingerprint by which versions knew it that decoded videos otherwise; None if it is the same.
    """

    fingerprint: tuple[Any, ...]
    read: Callable[[], Any]
    former: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """The piece of a clip that is trained on.

    Attributes:
        fps: frame rate of training.
        start: its first frame, counted at this rate.
        former_fps: the frame rate as versions with the first decoder knew it; None if it is the same.
    """

    bucket: Bucket
    fps: float
    start: int = 0
    former_fps: float | None = None

    @property
    def seconds(self) -> float:
        """Time of its first frame."""
        return self.start / self.fps

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """JSON values for a cache key."""
        return str(self.bucket), self.fps, self.start or "head"

    @property
    def former(self) -> tuple[Any, ...]:
        """What versions with the first decoder had in a cache key."""
        return str(self.bucket), self.former_fps or self.fps, self.start or "head"


@dataclass(frozen=True)
class SourceFile:
    """A file beside a clip's video (sound, a mask, a control video), for an encoder that reads it itself.

    Attributes:
        start: seconds into the file at which the clip begins.
        bucket, fps: the clip's, whose frames the encoding has to match.
        clip: the clip's video, for messages.
        info: the file's size and length, of a mask, a control or a reference video or image; None of other files.
        background: a colour, seen where an image is transparent.
    """

    path: Path
    start: float
    bucket: Bucket
    fps: float
    clip: Path
    info: decode.VideoInfo | None = None
    background: str = "white"

    def frames(self) -> np.ndarray:
        """The file's frames, uint8 (F, H, W, 3), at the clip's times and in its bucket; one frame of an image."""
        assert self.info is not None
        return column_files.read_frames(self.path, self.info, self.bucket, self.fps, self.start, self.background)


def caption_source(text: str) -> Source:
    """A caption or prompt."""
    return Source((text,), lambda: text)


def clip_sources(
    clip: Clip, content_hash: str, info: decode.VideoInfo, piece: Piece, background: str
) -> dict[str, Source]:
    """A piece of a clip: its frames, and the first and the last of them, as a family takes them for condition images.

    Args:
        background: a colour, seen where a picture is transparent.
    """
    first = Bucket(1, piece.bucket.height, piece.bucket.width)

    def frames(bucket: Bucket) -> np.ndarray:
        if clip.is_image:
            return decode_image(clip.path, bucket, background)
        return decode.decode(clip.path, info, bucket, piece.fps, piece.seconds, background=background)

    def source(read: Callable[[], np.ndarray], *name: str) -> Source:
        if clip.is_image:  # which versions with the first decoder did not train on
            return Source((*_image_identity(content_hash, piece, background), *name), read)
        identity = content_hash, *piece.fingerprint, *_decoded(info, background), *name
        return Source(identity, read, (content_hash, *piece.former, *name))

    return {
        "video": source(lambda: frames(piece.bucket)),
        "first_frame": source(lambda: frames(first)[0], "first frame"),
        "last_frame": source(lambda: frames(piece.bucket)[-1], "last frame"),
    }


def _decoded(info: decode.VideoInfo, background: str) -> tuple[Any, ...]:
    """What determines the pixels of a video besides its file and the piece of it."""
    return decode.DECODER, *((background,) if TRANSPARENT in info.changes else ())


def _image_identity(content_hash: str, piece: Piece, background: str) -> tuple[Any, ...]:
    """What determines the pixels of an image file in a bucket. An image has no frame rate, and every piece of it is the same."""
    return content_hash, str(piece.bucket), "image", IMAGE_DECODER, background


def image_source(path_or_address: str, content: str, background: str) -> Source:
    """A condition image in its own size, since pipelines resize it.

    Args:
        content: the hash of its file, or its address.
        background: a colour, seen where it is transparent.
    """
    identity = ("image", content, IMAGE_DECODER, background)
    return Source(identity, lambda: load_image(path_or_address, background))


def fitted_source(source: Source, fit: Callable[[Image.Image, Bucket], Image.Image], shape: Bucket) -> Source:
    """A condition image as `fit` gives it to the pipeline that generates a video of a shape."""
    return Source((*source.fingerprint, str(shape)), lambda: np.asarray(fit(Image.fromarray(source.read()), shape)))


def no_image_source() -> Source:
    """The image of a prompt or caption that is encoded without one."""
    return Source(("no image",), lambda: None)


def file_source(
    column: str, clip: Clip, content_hash: str, info: decode.VideoInfo | None, piece: Piece, background: str
) -> Source:
    """A file that the manifest names beside the video: frames of a control or reference video, else a `SourceFile`.

    Args:
        info: size and length of a mask, a control or a reference video or image.
        background: a colour, seen where images are transparent, but for masks: what is transparent does not count.
    """
    path = clip.file(column)
    background = "black" if column == column_files.MASK else background
    file = SourceFile(path, piece.seconds, piece.bucket, piece.fps, clip.path, info, background)
    read = file.frames if column in column_files.FRAME_COLUMNS else lambda: file
    if info is None:
        return Source((content_hash, *piece.fingerprint), read, (content_hash, *piece.former))
    if column_files.is_image(path):
        return Source(_image_identity(content_hash, piece, background), read)
    return Source((content_hash, *piece.fingerprint, *_decoded(info, background)), read)
