"""Writes generated videos as mp4 files, single frames as PNG files, and all of them as a contact sheet."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.runtime.files import atomic


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


def strip(frames: np.ndarray, columns: int = 6, height: int = 128) -> np.ndarray:
    """Pick `columns` evenly spaced frames of a video, uint8 (F, H, W, 3), or all if it has fewer; scaled to `height` pixels."""
    picked = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]
    return np.stack([scaled(frame, height) for frame in picked])


def scaled(frame: np.ndarray, height: int) -> np.ndarray:
    """A frame, uint8 (H, W, 3), scaled to `height` pixels."""
    width = round(height * frame.shape[1] / frame.shape[0])
    return np.asarray(Image.fromarray(frame).resize((width, height)))


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], path: Path, columns: Sequence[str] = ()) -> None:
    """Write a PNG with one row for each video. `rows` has the label and the `strip` of each. Raises as `write_video`.

    Args:
        columns: what is written above the columns of the first row.
    """
    label_height, gap = 18, 4
    tiles = [(label, [Image.fromarray(tile) for tile in row]) for label, row in rows]
    tile_height = tiles[0][1][0].height
    sheet_width = max(sum(tile.width + gap for tile in row) for _, row in tiles) + gap
    head = label_height if columns else 0
    sheet = Image.new("RGB", (sheet_width, head + (tile_height + label_height + gap) * len(tiles) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for index, title in enumerate(columns):
        draw.text((gap + index * (tiles[0][1][0].width + gap), gap), title, fill="black", font=font)
    for index, (label, row) in enumerate(tiles):
        top = head + gap + index * (tile_height + label_height + gap)
        draw.text((gap, top + 2), label, fill="black", font=font)
        left = gap
        for tile in row:
            sheet.paste(tile, (left, top + label_height))
            left += tile.width + gap
    with atomic(path) as partial:
        sheet.save(partial)
