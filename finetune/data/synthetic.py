"""Makes video files of moving shapes with real video encoders, for the quickstart, the tests and the benchmarks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COLOURS = {
    "red": (210, 50, 40),
    "green": (60, 180, 75),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 40),
    "white": (235, 235, 235),
}


@dataclass(frozen=True)
class Recording:
    """How one file is encoded.

    Attributes:
        height: pixels as stored, before rotation; so is `width`.
        rotation: degrees counter-clockwise by which a player turns the picture.
        uneven: whether the frame rate is variable.
    """

    name: str
    height: int
    width: int
    frames: int
    fps: int
    codec: str = "libx264"
    rotation: int = 0
    uneven: bool = False


RECORDINGS = (
    Recording("wide.mp4", 128, 192, 25, 25),
    Recording("small.mp4", 64, 96, 17, 24),
    Recording("long.mp4", 128, 192, 61, 30),
    Recording("vp9.webm", 128, 192, 33, 25, codec="libvpx-vp9"),
    Recording("vp9_small.webm", 96, 144, 20, 24, codec="libvpx-vp9"),
    Recording("fast.mp4", 96, 160, 50, 50),
    Recording("slow.mp4", 96, 144, 18, 12),
    Recording("square.mp4", 128, 128, 25, 25),
    Recording("tall.mp4", 192, 128, 25, 25),
    Recording("turned.mp4", 128, 192, 25, 25, rotation=90),
    Recording("uneven.mp4", 128, 192, 30, 25, uneven=True),
    Recording("hevc.mkv", 128, 192, 25, 25, codec="libx265"),
)


def scene(index: int, frames: int, height: int, width: int) -> tuple[np.ndarray, str]:
    """Draw a disc or square that moves over a plain floor. Returns uint8 frames (F, H, W, 3) and the caption."""
    names = list(COLOURS)
    name = names[index % len(names)]
    shape = ("ball", "square")[index // len(names) % 2]
    direction = ("right", "left")[index % 2]
    rows, columns = np.mgrid[0:height, 0:width]
    radius = 0.22 * min(height, width)
    backdrop = np.array((30, 34, 40)) + 40 * (rows / height)[..., None]
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for k in range(frames):
        progress = k / max(frames - 1, 1)
        x = width * (0.2 + 0.6 * (progress if direction == "right" else 1 - progress))
        y = height * (0.5 + 0.15 * math.sin(2 * math.pi * progress))
        distance = np.hypot(columns - x, rows - y) if shape == "ball" else np.maximum(abs(columns - x), abs(rows - y))
        cover = np.clip(radius - distance, 0, 1)[..., None]
        video[k] = backdrop * (1 - cover) + np.array(COLOURS[name]) * cover
    return video, f"a {name} {shape} moves to the {direction} over a dark floor"


def record(video: np.ndarray, path: Path, recording: Recording) -> None:
    """Encode uint8 frames (F, H, W, 3) to a file as `recording` says."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(recording.codec, rate=recording.fps, options=_options(recording.codec))
        stream.height, stream.width, stream.pix_fmt = recording.height, recording.width, "yuv420p"
        stream.thread_count = 2
        if recording.rotation:
            stream.set_display_rotation(recording.rotation)
        if recording.uneven:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if recording.uneven:
                frame.time_base = Fraction(1, 1000)
                frame.pts = number * 40 + (15 if number % 3 == 1 else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_clips(folder: Path, recordings: Sequence[Recording], first_scene: int = 0) -> None:
    """Write the recordings as video files, each with a caption in a .txt file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, recording in enumerate(recordings, start=first_scene):
        turned = recording.rotation % 180 != 0
        height, width = (recording.width, recording.height) if turned else (recording.height, recording.width)
        video, caption = scene(index, recording.frames, height, width)
        stored = np.rot90(video, k=-recording.rotation // 90, axes=(1, 2)) if recording.rotation else video
        path = folder / recording.name
        record(stored, path, recording)
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def _options(codec: str) -> dict[str, str]:
    return {
        "libx264": {"crf": "14", "preset": "veryfast"},
        "libx265": {"crf": "14", "preset": "veryfast", "x265-params": "log-level=none"},
        "libvpx-vp9": {"crf": "20", "b:v": "0", "deadline": "realtime", "cpu-used": "8"},
    }.get(codec, {})
