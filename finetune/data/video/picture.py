"""One frame to pixels: upright, scaled to cover a bucket, cropped at its centre, in BT.709 RGB."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import ImageColor

from finetune.data.cover import cover
from finetune.data.video.colour import Colours, colours_of, to_bt709
from finetune.data.video.info import VideoInfo
from finetune.data.video.opening import command, display_size
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

# Without the last two, swscale makes limited-range video about 2 of 255 too dark.
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_PLANES = (1, 2, 0)  # channels of the planes of gbrp
TRANSPARENT = "with transparent parts shown on the background"  # one of `VideoInfo.changes`, and so is
UNREAD_ALPHA = "with an alpha channel that is not read (VP8 or VP9)"  # which FFmpeg's own decoders leave out


class Orientation(NamedTuple):
    """How a stored picture becomes upright: transposed, then flipped."""

    transposed: bool
    rows_flipped: bool
    columns_flipped: bool

    @property
    def mirrored(self) -> bool:
        """Whether the picture is mirrored, not only turned."""
        return sum(self) % 2 == 1

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """A view of a stored plane (rows, columns) as it is shown."""
        plane = plane.T if self.transposed else plane
        return plane[:: -1 if self.rows_flipped else 1, :: -1 if self.columns_flipped else 1]


def orientation_of(frame: av.VideoFrame, path: Path) -> Orientation:
    """The orientation that a frame's display matrix asks for.

    Raises:
        UserError: it asks for an angle that is not a multiple of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation(False, False, False)
    a, b, _, c, d = np.frombuffer(matrix, "<i4" if sys.byteorder == "little" else ">i4")[:5].tolist()
    straight, across = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, across) > 0.01 * max(straight, across):
        cure = f"turn it: {command(path, '')}"
        raise UserError(f"a player turns it by {frame.rotation} degrees, which is not upright", cure, str(path))
    return Orientation(True, b < 0, c < 0) if across > straight else Orientation(False, d < 0, a < 0)


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether a frame's pixels may be transparent."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether a frame is transparent anywhere."""
    if not has_alpha(frame):
        return False
    # With its default flags, swscale makes 254 of an opaque yuva422p.
    return bool(frame.reformat(format="rgba", interpolation=_ACCURATE).to_ndarray()[..., 3].min() < 255)


class Painter:
    """Converts frames of one clip into a bucket's pixels; keeps swscale's filters between frames.

    Setting the filters up takes as long as scaling a frame.
    """

    def __init__(
        self,
        path: Path,
        info: VideoInfo,
        bucket: Bucket,
        pixel_aspect: Fraction | None,
        threads: int,
        background: str = "white",
    ) -> None:
        self.path, self.info, self.bucket = path, info, bucket
        self.background = np.array(ImageColor.getrgb(background))  # uint8 (3,) in range
        self.pixel_aspect, self.threads = pixel_aspect, threads
        self.cover = cover(info.height, info.width, bucket)
        self.scaler = VideoReformatter()

    def paint(self, frame: av.VideoFrame, pixels: np.ndarray) -> None:
        """Write a frame to uint8 pixels (H, W, 3).

        Raises:
            UserError: the frame has another size than the clip, or colours that cannot be converted.
        """
        turn = orientation_of(frame, self.path)
        size = display_size(frame, self.pixel_aspect, turn.transposed)
        if size != (self.info.height, self.info.width):
            raise self._changed("{1}x{0}".format(*size))
        colours = known_colours(frame, self.path)
        if TRANSPARENT in self.info.changes and is_transparent(frame):
            frame = self._opaque(frame, colours)
        height, width, top, left = self.cover
        rows, columns = (width, height) if turn.transposed else (height, width)
        scaled = self.scaler.reformat(
            frame,
            columns,
            rows,
            "gbrp16le" if colours.is_wide else "gbrp",
            src_colorspace=None if frame.format.is_rgb else colours.matrix,
            interpolation=_ACCURATE,
            dst_color_range=ColorRange.JPEG,
            threads=self.threads,
        )
        kind = "<u2" if colours.is_wide else "u1"
        target = np.empty(pixels.shape, kind) if colours.is_wide else pixels
        for channel, plane in zip(_PLANES, scaled.planes, strict=True):
            stored = np.frombuffer(memoryview(plane), kind).reshape(rows, -1)[:, :columns]
            shown = turn.upright(stored)[top : top + self.bucket.height, left : left + self.bucket.width]
            target[..., channel] = shown
        if colours.is_wide:
            pixels[:] = to_bt709(target, colours)

    def _opaque(self, frame: av.VideoFrame, colours: Colours) -> av.VideoFrame:
        """A frame on the background, as RGB in its own size; before it is scaled, so that no hidden colour is mixed in."""
        form, peak = ("rgba64le", 65535) if colours.is_wide else ("rgba", 255)
        full = VideoReformatter().reformat(
            frame,
            format=form,
            src_colorspace=colours.matrix,
            interpolation=_ACCURATE,
            dst_color_range=ColorRange.JPEG,
            threads=self.threads,
        )
        pixels = full.to_ndarray().astype(np.int64)
        alpha, behind = pixels[..., 3:], self.background * (peak // 255)
        mixed = (pixels[..., :3] * alpha + behind * (peak - alpha) + peak // 2) // peak
        kind, form = (np.uint16, "rgb48le") if colours.is_wide else (np.uint8, "rgb24")
        return av.VideoFrame.from_ndarray(mixed.astype(kind), format=form)

    def _changed(self, size: str) -> UserError:
        what = f"its picture changes size, from {self.info.width}x{self.info.height} to {size}"
        filters = f"-vf scale={self.info.width}:{self.info.height}"
        cure = f"cut it where it changes, or scale it to one size: {command(self.path, filters)}"
        return UserError(what, cure, str(self.path))


def known_colours(frame: av.VideoFrame, path: Path) -> Colours:
    """A frame's colours. Raises UserError with the line that converts them if this program cannot."""
    colours = colours_of(frame)
    if colours.unknown:
        to = "-vf libplacebo=colorspace=bt709:color_primaries=bt709:color_trc=bt709 -pix_fmt yuv420p"
        raise UserError(
            f"its colours are coded as {colours.unknown}, which is not supported",
            f"convert it: {command(path, to)}",
            str(path),
        )
    return colours
