"""Images as training data: their size, and their pixels in a bucket of one frame."""

from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.cover import cover
from finetune.data.decode import VideoInfo
from finetune.data.images.opening import checked_size, opened_file, read_rgb
from finetune.recipe import Bucket

IMAGE_DECODER = 1  # a part of cache keys: raise it when the pixels of an ordinary image change

_SECONDS = 1 / 1000  # so short that an image is one frame at any frame rate


def probe_image(path: Path) -> VideoInfo:
    """Read an image's upright size, as a video of one frame. The image is decoded, so that damage is found.

    Raises:
        UserError: the file is damaged, too large, not an image, or of colours that cannot be converted.
    """
    with opened_file(path, str(path)) as file:
        height, width = checked_size(file, str(path))
    return VideoInfo(height=height, width=width, frames=1, duration=_SECONDS)


def decode_image(path: Path, bucket: Bucket, background: str = "white") -> np.ndarray:
    """Decode an image, scaled to cover a bucket of one frame and cropped at the centre, as videos are.

    The filter is the bicubic one that videos are scaled with, so that both are equally sharp. It averages over all pixels
    that it reduces to one.

    Args:
        background: a colour as CSS writes it, seen where the image is transparent.
    Returns:
        uint8 array (1, H, W, 3), RGB.
    Raises:
        UserError: as `probe_image`.
    """
    assert bucket.frames == 1
    with opened_file(path, str(path)) as file:
        image = read_rgb(file, str(path), background)
    height, width, top, left = cover(image.height, image.width, bucket)
    # The part of the image that is seen. Only it is scaled: a long strip as a whole could be of any size.
    down, across = image.height / height, image.width / width
    right, bottom = (left + bucket.width) * across, (top + bucket.height) * down
    seen = left * across, top * down, min(right, image.width), min(bottom, image.height)
    fitted = image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=seen)
    return np.array(fitted)[None]
