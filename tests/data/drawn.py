"""Frames that say their own number, so that no decoder has to be trusted: a binary counter above four patches of colour."""

from pathlib import Path

import numpy as np
from ffmpeg_oracle import Ffmpeg

BITS = 8
PATCHES = ((128, 128, 128), (180, 70, 60), (60, 160, 80), (70, 80, 190))
DARK, BRIGHT = 40, 210


def draw(count: int, height: int = 128, width: int = 192) -> np.ndarray:
    """Frames 0, 1, 2, ... as uint8 (F, H, W, 3)."""
    frames = np.empty((count, height, width, 3), np.uint8)
    columns = np.arange(width)
    bit, patch = columns * BITS // width, columns * len(PATCHES) // width
    for number, frame in enumerate(frames):
        frame[: height // 2] = np.where(number >> bit & 1, BRIGHT, DARK)[None, :, None]
        frame[height // 2 :] = np.array(PATCHES)[patch]
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames say; fails for a block that is neither dark nor bright, as after mixing two frames."""
    _, height, width, _ = frames.shape
    centres = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    grey = frames[:, height // 4, centres].mean(-1)
    middle = (DARK + BRIGHT) / 2
    assert (np.abs(grey - middle) > (BRIGHT - DARK) / 4).all(), grey
    return [int(row @ (1 << np.arange(BITS))) for row in (grey > middle).astype(int)]


def patches(frames: np.ndarray) -> np.ndarray:
    """The mean colour of each patch's middle: float64 (4, 3)."""
    _, height, width, _ = frames.shape
    row, reach = height * 3 // 4, min(height, width) // 16
    centres = [(2 * index + 1) * width // (2 * len(PATCHES)) for index in range(len(PATCHES))]
    middles = [frames[:, row - reach : row + reach, at - reach : at + reach] for at in centres]
    return np.array([middle.reshape(-1, 3).mean(0) for middle in middles])


def film(
    ffmpeg: Ffmpeg, name: str, *options: str, fps: str = "25", count: int = 12, size: tuple[int, int] = (128, 192)
) -> Path:
    """A file of drawn frames, encoded once a session."""
    path = ffmpeg.folder / "drawn" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        height, width = size
        source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-")
        ffmpeg.run(*source, *options, path, given=draw(count, height, width).tobytes())
    return path
