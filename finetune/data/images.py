"""Loads condition images from an image file, an http(s) address, or a video's first frame."""

import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune.data import decode
from finetune.data.clip import VIDEO_SUFFIXES
from finetune.recipe import Bucket
from finetune.runtime.errors import Problem, UserError

_TIMEOUT = 30.0  # seconds
_MAX_BYTES = 64 * 2**20


def is_address(source: str) -> bool:
    """Whether a source is an http(s) address rather than a file."""
    return source.startswith(("http://", "https://"))


def missing_image(source: str) -> Problem | None:
    """The problem if the file does not exist, else None. Addresses are not fetched."""
    if is_address(source) or Path(source).expanduser().is_file():
        return None
    return Problem("no such condition image", source, "set `image` to an image, a video or an http(s) address")


def load_image(source: str) -> np.ndarray:
    """Load an image in its own size, upright: uint8 (height, width, 3). Pipelines resize it.

    Raises:
        UserError: the source cannot be read or fetched, or is not an image.
    """
    if missing := missing_image(source):
        raise UserError.of([missing])
    path = Path(source).expanduser()
    if not is_address(source) and path.suffix.lower() in VIDEO_SUFFIXES:
        info = decode.probe(path)
        return decode.decode(path, info, Bucket(1, info.height, info.width), info.fps)[0]
    try:
        data = _fetch(source) if is_address(source) else path.read_bytes()
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"no image can be read from it ({reason})", "use a PNG, JPEG or WebP image", source) from None
    return np.asarray(image)


def _fetch(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "finetune"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            data = answer.read(_MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"cannot be fetched ({error})", "mend the address, or use a file", address) from None
    if len(data) > _MAX_BYTES:
        raise UserError(f"more than {_MAX_BYTES >> 20} MB", "use a smaller image", address)
    return data
