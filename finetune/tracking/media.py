"""Writes generated videos as mp4 files, single frames as PNG files, and all of them as a contact sheet."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from finetune.runtime.files import atomic
from finetune.tracking.drawing import SOFT
from finetune.tracking.labels import draw_text, line_height, wrapped

_NARROWEST = 520  # pixels of a contact sheet, so that its labels can be read


def suffix_of(frames: np.ndarray) -> str:
    """The suffix of the file that frames (F, H, W, 3) are written to."""
    return ".png" if len(frames) == 1 else ".mp4"


def write_video(frames: np.ndarray, path: Path, fps: float) -> None:
    """Encode uint8 RGB frames (F, H, W, 3) as H.264 in mp4, or a single frame as PNG, if the path says so.

    Odd sides of an mp4 lose their last row or column, as H.264 needs even ones.

    Raises:
        UserError: the file cannot be written.
    """
    if path.suffix == ".png":
        (frame,) = frames
        with atomic(path) as partial:
            Image.fromarray(frame).save(partial, "PNG")
        return
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with atomic(path) as partial, av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def animation(path: Path, side: int = 256, most: int = 48) -> tuple[bytes, int, int]:
    """(a GIF, its width and height) of a video's file, or of a PNG: no side longer than `side`, no more frames than `most`."""
    frames, seconds = [], 1.0
    if path.suffix == ".png":
        frames = [Image.open(path).convert("RGB")]
    else:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_image() for frame in container.decode(stream)]
            seconds = len(frames) / float(stream.average_rate or 25)
    picked = [frames[index] for index in np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)]
    for frame in picked:
        frame.thumbnail((side, side))
    data = io.BytesIO()
    duration = round(1000 * seconds / len(picked))
    picked[0].save(data, "GIF", save_all=True, append_images=picked[1:], duration=duration, loop=0)
    return data.getvalue(), picked[0].width, picked[0].height


def strip(frames: np.ndarray, columns: int = 8, height: int = 128) -> np.ndarray:
    """Pick `columns` evenly spaced frames of a video, uint8 (F, H, W, 3), or all if it has fewer; scaled to `height` pixels."""
    picked = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]
    return np.stack([scaled(frame, height) for frame in picked])


def scaled(frame: np.ndarray, height: int) -> np.ndarray:
    """A frame, uint8 (H, W, 3), scaled to `height` pixels."""
    width = round(height * frame.shape[1] / frame.shape[0])
    return np.asarray(Image.fromarray(frame).resize((width, height)))


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], path: Path, columns: Sequence[str] = (), title: str = ""
) -> None:
    """Write a PNG with one row for each video. `rows` has the label and the `strip` of each. Raises as `write_video`.

    Labels are wrapped. A letter that no font of the machine has is drawn as a box.

    Args:
        columns: what is written above the columns of the first row.
        title: what is written above all of it.
    """
    gap, size = 6, 14
    step = line_height(size)
    tiles = [(label, [Image.fromarray(tile) for tile in row]) for label, row in rows]
    width = max(_NARROWEST, *(sum(tile.width + gap for tile in row) + gap for _, row in tiles))
    labels = [wrapped(label, width - 2 * gap, size) for label, _ in tiles]
    head = gap + (step + gap if title else 0) + (step if columns else 0)
    heights = [len(lines) * step + gap + row[0].height + 2 * gap for lines, (_, row) in zip(labels, tiles, strict=True)]
    sheet = Image.new("RGB", (width, head + sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw_text(draw, (gap, gap), wrapped(title, width - 2 * gap, size + 2, 1)[0], size + 2)
    for index, text in enumerate(columns):
        left, tile_width = gap + index * (tiles[0][1][0].width + gap), tiles[0][1][0].width
        draw_text(draw, (left, head - step), (wrapped(text, tile_width, size - 2, 1) or [""])[0], size - 2, SOFT)
    top = head
    for lines, height, (_, row) in zip(labels, heights, tiles, strict=True):
        for number, line in enumerate(lines):
            draw_text(draw, (gap, top + number * step), line, size)
        left = gap
        for tile in row:
            sheet.paste(tile, (left, top + len(lines) * step + gap))
            left += tile.width + gap
        top += height
    with atomic(path) as partial:
        sheet.save(partial, "PNG")
