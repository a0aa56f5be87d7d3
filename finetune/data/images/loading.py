"""Loads condition images, in their own size."""

import io

import numpy as np

from finetune.data import decode
from finetune.data.clip import VIDEO_SUFFIXES
from finetune.data.file_fault import open_fault
from finetune.data.images.address import fetch, is_address
from finetune.data.images.opening import opened_file, read_rgb
from finetune.recipe import Bucket
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.paths import NoSuchHome, expanded

_CURE = "set `image` to an image, a video or an http(s) address"


def missing_image(source: str) -> Problem | None:
    """The problem if there is no such file, else None. Addresses are not fetched."""
    if is_address(source):
        return None
    scheme, is_other_address, _ = source.partition("://")
    try:
        path = expanded(source)
    except NoSuchHome as error:
        return Problem(f"no such condition image ({error.what})", source, error.cure)
    fault = open_fault(path, "image file")
    if fault is None:
        return None
    if is_other_address and scheme.isalnum():
        return Problem(f"images are not fetched from {scheme}: addresses", source, _CURE)
    return Problem(f"no such condition image: {fault[0]}", source, _CURE)


def load_image(source: str, background: str = "white") -> np.ndarray:
    """Load an image in its own size, upright and in sRGB: uint8 (height, width, 3). Pipelines resize it.

    Args:
        background: a colour as CSS writes it, seen where the image is transparent.
    Raises:
        UserError: the source cannot be read or fetched, or is not an image.
    """
    if missing := missing_image(source):
        raise UserError.of([missing])
    if is_address(source):
        fetched = fetch(source)
        return np.array(read_rgb(io.BytesIO(fetched.data), source, background, fetched.content_type))
    path = expanded(source)
    if path.suffix.lower() in VIDEO_SUFFIXES - {".gif"}:
        info = decode.probe(path)
        return decode.decode(path, info, Bucket(1, info.height, info.width), info.fps)[0]
    with opened_file(path, source) as file:
        return np.array(read_rgb(file, source, background))
