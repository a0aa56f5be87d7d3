"""Decodes windows of video files to uint8 frames: the right frames, upright, in BT.709 RGB, or an error that names the file.

A window late in a file costs a seek to the key frame before it. Frames are converted one at a time into the result, so a
clip never exists in memory at its full resolution, and what is held does not grow with the file.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from finetune.data.clip import AGAIN
from finetune.data.video.info import Resampling, VideoInfo
from finetune.data.video.opening import FROM_THE_BEGINNING, command, opened, packets_of, without_times
from finetune.data.video.picture import Painter
from finetune.data.video.probe import probe
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

__all__ = ["DECODER", "FORMER_DECODER", "Resampling", "VideoInfo", "decode", "probe"]

# A part of cache keys: raise it when the pixels of an ordinary file change. A run goes on with clips as it began with them, so
# then `Source.former` has to name the keys of each earlier version, and `preparation.former` to choose by the version that the
# run's newest checkpoint has noted. They know one: FORMER_DECODER, of keys that have no version in them.
DECODER = 2
FORMER_DECODER = 1

_MARGINS = (0.0, 2.0, 10.0)  # seconds before the window to seek to, in turn, until a key frame before it is found
_FIELDS = 2  # frames before the window that deinterlacing looks at
_SKIPPING = {
    "h264",
    "hevc",
}  # decoders that heed skip_frame at each packet; libdav1d (AV1) reads it once, when it is opened


class _Elsewhere(Exception):
    """The window must be read again, from an earlier place or with deinterlacing."""

    def __init__(self, interlaced: bool = False) -> None:
        self.interlaced = interlaced


def decode(
    path: Path,
    info: VideoInfo,
    bucket: Bucket,
    fps: float,
    start: float = 0.0,
    threads: int = 0,
    background: str = "white",
) -> np.ndarray:
    """Decode `bucket.frames` frames, the nearest in time to start + k / fps, scaled to cover the bucket and cropped at the centre.

    Args:
        start: seconds after the first frame.
        threads: of the decoder and the scaler each; 0 takes as many as there are processors.
        background: a colour, seen where the video is transparent.
    Returns:
        uint8 array (F, H, W, 3), RGB.
    Raises:
        UserError: the clip ends before the window does, or frames that the window needs are damaged or missing.
    """
    info.require(fps, bucket.frames, start, str(path))
    wanted = info.frame_indices(fps, bucket.frames, start)
    window = _Window(path, info, bucket, wanted, threads, background)
    for margin in (*_MARGINS, None) if window.begin > 0 else (None,):
        place = None if margin is None else window.begin - round(margin * info.fps)
        try:
            return window.read(place if place is None or place > 0 else None)
        except _Elsewhere as again:
            window.deinterlace |= again.interlaced
            if margin is None or (place is not None and place <= 0):
                break
    return window.read(None)


class _Window:
    """The frames of a window, and what is needed to read them."""

    def __init__(
        self, path: Path, info: VideoInfo, bucket: Bucket, wanted: Sequence[int], threads: int, background: str
    ) -> None:
        self.path, self.info, self.bucket, self.wanted, self.threads = path, info, bucket, wanted, threads
        self.background = background
        self.deinterlace = "deinterlaced" in info.changes

    @property
    def begin(self) -> int:
        """The first frame that is looked at; it may be negative."""
        return self.wanted[0] - (_FIELDS if self.deinterlace else 0)

    def read(self, place: int | None) -> np.ndarray:
        """Decode from the key frame before a frame, or from the beginning: uint8 (F, H, W, 3)."""
        frames = np.empty((*self.bucket, 3), dtype=np.uint8)
        filled, index = 0, -1
        with opened(self.path) as (container, stream):
            self._set_up(stream)
            place = None if container.format.name in FROM_THE_BEGINNING else place
            if place is not None:
                self._seek(container, stream, place)
            painter = Painter(
                self.path, self.info, self.bucket, stream.sample_aspect_ratio, self.threads, self.background
            )
            source = _Decoder(container, stream, self.path, self.info.ticks_of(max(0, self.begin - 1)))
            try:
                for frame in _deinterlaced(source, stream) if self.deinterlace else source:
                    before, index = index, self._index(frame, stream)
                    self._check(frame, index, before, place)
                    if index > self.wanted[filled]:
                        raise self._broken(self.wanted[filled], "it cannot be decoded")
                    first = filled
                    while filled < len(self.wanted) and self.wanted[filled] == index:
                        filled += 1
                    if filled > first:
                        painter.paint(frame, frames[first])
                        frames[first + 1 : filled] = frames[first]
                    if filled == len(self.wanted):
                        break
                else:
                    if place is not None and index < self.wanted[0]:
                        raise _Elsewhere  # there is no key frame behind the place that was sought
                    raise self._broken(self.wanted[filled], "the stream ends early")
                if source.was_damaged():
                    raise self._broken(index, "a frame that it refers to is damaged")
            except av.error.FFmpegError as error:
                if place is not None and index < self.wanted[0]:
                    raise _Elsewhere from None
                raise self._broken(index + 1, error.strerror) from None
        return frames

    def _set_up(self, stream: av.VideoStream) -> None:
        stream.thread_type = "AUTO"
        stream.thread_count = self.threads

    def _seek(self, container: av.container.InputContainer, stream: av.VideoStream, place: int) -> None:
        try:
            container.seek(self.info.ticks_of(place), stream=stream)
        except av.error.FFmpegError:  # formats in which nothing can be found, such as RealMedia
            raise _Elsewhere from None

    def _index(self, frame: av.VideoFrame, stream: av.VideoStream) -> int:
        if frame.pts is None:
            raise without_times(self.path)
        return self.info.index_of(round(frame.pts * (frame.time_base or stream.time_base) / stream.time_base))

    def _check(self, frame: av.VideoFrame, index: int, before: int, place: int | None) -> None:
        """Raise if a frame cannot be trusted, or _Elsewhere if reading from another place may help."""
        if frame.interlaced_frame and not self.deinterlace:
            raise _Elsewhere(interlaced=True)
        if place is not None and before < 0 and index > self.wanted[0]:
            raise _Elsewhere
        if frame.is_corrupt:
            if place is not None and index <= self.wanted[0]:
                raise _Elsewhere
            raise self._broken(index, "its data is damaged")
        if index < before:
            raise without_times(self.path)

    def _broken(self, index: int, why: str) -> UserError:
        index = min(max(index, 0), self.info.frames)
        seconds = index / self.info.fps
        sound = (
            f"the {index} frames before it are sound" if self.wanted[0] <= index else "what lies before it is not read"
        )
        keep = f"; or keep its beginning: {command(self.path, f'-t {seconds:.2f}')}" if index else ""
        return UserError(
            f"the file breaks at frame {index} of {self.info.frames}, at {seconds:.2f} s ({why}); {sound}",
            f"{AGAIN}{keep}",
            str(self.path),
        )


class _Decoder:
    """Iterates over a stream's frames, and remembers in which order their packets came.

    Before the time `begin`, in ticks, only frames that others refer to are decoded, if the decoder can be told so.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, path: Path, begin: int) -> None:
        self.container, self.stream, self.path = container, stream, path
        self.fed: dict[int, int] = {}  # time of a packet to its place in decoding order
        self.waiting: deque[av.VideoFrame] = deque()
        self.last: int | None = None  # time of the last frame that was taken
        self.begin, self.skipping = begin, False

    def __iter__(self) -> Iterator[av.VideoFrame]:
        for packet in packets_of(self.container, self.stream, self.path):
            if packet.pts is not None:
                self.fed[packet.pts] = len(self.fed)
                self._skip(packet.pts < self.begin)
            self.waiting.extend(self.stream.decode(packet))
            while self.waiting:
                frame = self.waiting.popleft()
                self.last = frame.pts
                yield frame

    def _skip(self, skip: bool) -> None:
        """Pass over frames before the window that no other frame refers to, or stop doing so."""
        if skip != self.skipping and self.stream.codec_context.name in _SKIPPING:
            self.stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
            self.skipping = skip

    def was_damaged(self) -> bool:
        """Whether a frame that is decoded, but not yet shown, is damaged and may be what the last one taken refers to."""
        with suppress(av.error.FFmpegError):  # an error of a packet behind those that were needed
            self.waiting.extend(self.stream.decode(None))
        bound = self.fed.get(self.last, len(self.fed)) if self.last is not None else 0
        return any(frame.is_corrupt and self.fed.get(frame.pts, 0) < bound for frame in self.waiting)


def _deinterlaced(frames: Iterator[av.VideoFrame] | _Decoder, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames with both fields at one time, by FFmpeg's bwdif filter; those that are not interlaced stay as they are."""
    graph: av.filter.Graph | None = None
    for frame in frames:
        if graph is None:
            graph = _bwdif(frame, stream.time_base)
        if frame.is_corrupt:
            yield frame  # ends the decoding
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _bwdif(frame: av.VideoFrame, time_base: Fraction) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(time_base),
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    ).configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
