"""Small pictures of the clips as the model will see them: the first frame of each window, cropped to its bucket."""

import io
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from finetune.data import decode
from finetune.data.column_files import MASK
from finetune.data.images import decode_image
from finetune.data.masks import decode_mask
from finetune.preparation.inspect import InspectedClip
from finetune.recipe import Bucket
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.progress import ProgressLine

_MOST_WINDOWS = 4  # pictures of one clip
_MOST = 6000  # pictures in all
_ALL_BYTES = 9 * 10**6  # of all pictures, before base64 makes a third more of them
_LARGEST_BYTES = 5000  # of one picture
_OF_MASK = 4  # a mask's picture may have a fourth of the bytes, and has half the sides
_QUALITIES = ((128, 75), (128, 60), (128, 40), (96, 40), (96, 20), (64, 20), (32, 1))  # longer side, WebP's quality
_THREADS = 8


@dataclass(frozen=True)
class Thumbnails:
    """Pictures of a clip's windows as WebP files, or why there are none.

    Attributes:
        height: pixels; so is `width`.
        problems: what is wrong with the clip.
        masks: for each of the pictures the clip's mask at that frame, where it has one; of half the height and width.
    """

    images: tuple[bytes, ...] = ()
    height: int = 0
    width: int = 0
    problems: tuple[Problem, ...] = ()
    masks: tuple[bytes, ...] = ()


def thumbnails(clips: Sequence[InspectedClip], background: str, runtime: Runtime) -> list[Thumbnails]:
    """Pictures of clips and of their masks, in the clips' order. Ranks share the work. Collective; returns the same on every rank.

    The more there are, the fewer windows of a clip are shown, and the smaller its pictures are. Clips beyond the first
    6,000 get none.

    Args:
        background: a colour, seen where an image is transparent.
    """
    shown = clips[:_MOST]
    windows = max(1, min(_MOST_WINDOWS, _MOST // max(1, len(shown))))
    counts = {id(entry): min(windows, len(entry.windows.starts)) for entry in shown}
    masks = sum(counts[id(entry)] for entry in shown if MASK in entry.pictures)
    most_bytes = bytes_of_each(sum(counts.values()), masks)
    mine = shown[runtime.rank :: runtime.world_size]
    with runtime.together():
        threads = max(1, min(_THREADS, (os.cpu_count() or 1) // runtime.local_world_size))
        made = []
        with (
            ThreadPoolExecutor(threads) as pool,
            ProgressLine("thumbnails", len(mine), enabled=runtime.is_main) as line,
        ):
            for each in pool.map(lambda entry: _of_clip(entry, background, windows, most_bytes), mine):
                made.append(each)
                line.update(len(made), "")
    found = [Thumbnails()] * len(clips)
    for rank, share in enumerate(runtime.gather(made)):
        found[rank : len(shown) : runtime.world_size] = share
    return found


def bytes_of_each(count: int, masks: int = 0) -> int:
    """How large each of so many pictures may be, beside so many masks of a fourth of that."""
    return min(_LARGEST_BYTES, _ALL_BYTES // max(1, count + math.ceil(masks / _OF_MASK)))


def _of_clip(entry: InspectedClip, background: str, windows: int, most_bytes: int) -> Thumbnails:
    try:
        images = [Image.fromarray(pixels) for pixels in _first_frames(entry, windows, background)]
        masks = [Image.fromarray(pixels) for pixels in _masks(entry, windows)]
    except UserError as error:
        return Thumbnails(problems=error.problems)
    files = [small_file(image, most_bytes) for image in images]
    mask_files = [small_file(mask.reduce(2), most_bytes // _OF_MASK) for mask in masks]
    scale = _QUALITIES[0][0] / max(images[0].size)
    width, height = (max(1, round(side * scale)) for side in images[0].size)
    return Thumbnails(tuple(files), height, width, masks=tuple(mask_files))


def _first_frames(entry: InspectedClip, windows: int, background: str) -> Iterator[np.ndarray]:
    """The first frame of each of a clip's windows, uint8 (H, W, 3); of many windows, evenly chosen. Raises UserError."""
    clip, fit, starts = entry.clip, entry.fit, entry.windows.starts
    first = Bucket(1, fit.bucket.height, fit.bucket.width)
    for start in (starts[number] for number in _shown(entry, windows)):
        if clip.is_image:
            yield decode_image(clip.path, first, background)[0]
        else:  # several threads would decode frames ahead that are not needed
            yield decode.decode(clip.path, entry.info, first, fit.fps, start / fit.fps, 1, background)[0]


def _masks(entry: InspectedClip, windows: int) -> Iterator[np.ndarray]:
    """The clip's mask at the same frames, uint8 (H, W); nothing if it has none. Raises UserError."""
    if MASK in entry.pictures:
        files, first = entry.masks, entry.fit.bucket._replace(frames=1)
        for number in _shown(entry, windows):
            yield decode_mask(replace(files[number], bucket=first))[0]


def _shown(entry: InspectedClip, windows: int) -> list[int]:
    """The numbers of the windows that have a picture."""
    total = len(entry.windows.starts)
    count = min(windows, total)
    return [number * total // count for number in range(count)]


def small_file(image: Image.Image, most_bytes: int) -> bytes:
    """A picture as a WebP file of at most `most_bytes`, in the best quality that allows it, or the worst there is."""
    data, small = b"", image
    for side, quality in _QUALITIES:
        if max(small.size) > side:
            small = small.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality, method=4)
        data = file.getvalue()
        if len(data) <= most_bytes:
            break
    return data
