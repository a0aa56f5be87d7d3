"""Decodes video files to uint8 frames with PyAV: handles variable frame rates, rotation and non-square pixels.

`probe` gets the time of every frame from the packets, which is exact and cheap, since only the first frame is decoded.
`decode` converts one frame at a time to its final size, so a clip never exists in memory at its full resolution.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

_TICK_SLACK = 1.5  # ticks: times are rounded by up to half a tick, and the duration behind the frame rate by one tick
_FRAME_SLACK = 0.1  # frames: upper limit of the slack, for containers with long ticks


@dataclass(frozen=True)
class VideoInfo:
    """A video as players show it: height and width after pixel aspect and rotation, duration in seconds."""

    height: int
    width: int
    frames: int
    duration: float

    @property
    def fps(self) -> float:
        """Average frame rate."""
        return self.frames / self.duration

    def frames_at(self, fps: float) -> int:
        """Number of frames that the clip has at a frame rate."""
        return max(1, int(self.duration * fps + _FRAME_SLACK))


@dataclass(frozen=True)
class _Timeline:
    """Presentation times of all frames, ascending, in units of `time_base` seconds."""

    ticks: list[int]
    last_ticks: int  # duration of the last frame
    time_base: Fraction

    @property
    def duration(self) -> float:
        return float((self.ticks[-1] - self.ticks[0] + self.last_ticks) * self.time_base)


def probe(path: Path) -> VideoInfo:
    """Read a video's size, frame count and duration; only its first frame is decoded.

    Raises:
        UserError: the file is empty, cut off, not a video, or has no video stream.
    """
    if path.stat().st_size == 0:
        raise UserError("the file is empty (0 bytes)", "copy or export it again", str(path))
    try:
        timeline = _timeline(path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            first = next(iter(container.decode(stream)), None)
            if first is None:
                raise UserError("not one frame can be decoded", "export it again, or remove it", str(path))
            height, width = _display_size(first, stream.sample_aspect_ratio)
    except av.error.FFmpegError as error:
        cure = "the file is cut off or not a video: copy or export it again, or remove it"
        raise UserError(f"cannot be read as a video ({error.strerror})", cure, str(path)) from None
    return VideoInfo(height, width, len(timeline.ticks), timeline.duration)


def _timeline(path: Path) -> _Timeline:
    """Presentation times of all frames, read from the packets without decoding."""
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        stored = [packet for packet in container.demux(stream) if packet.pts is not None]
        announced, time_base, rate = stream.frames, stream.time_base, stream.average_rate
    packets = sorted((p.pts, p.duration or 0) for p in stored if _is_shown(p))
    if len(stored) < announced or not packets:
        raise UserError(
            f"the file is cut off: {len(stored)} of the {announced or 'unknown number of'} frames it announces are there",
            "copy or export it again, or remove it",
            str(path),
        )
    ticks = [pts for pts, _ in packets]
    last = packets[-1][1] or (ticks[-1] - ticks[0]) // max(len(ticks) - 1, 1) or round(1 / (time_base * (rate or 25)))
    return _Timeline(ticks, last, time_base)


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    if not container.streams.video:
        raise UserError("there is no video stream in it", "remove it: sound alone cannot be trained on", str(path))
    form = container.format.name
    if form.endswith("_pipe") or form == "image2":
        kind = form.removesuffix("_pipe").upper()
        raise UserError(f"this is an image ({kind}), not a video", "remove it, or make a video of it", str(path))
    return container.streams.video[0]


def frame_indices(times: Sequence[float], tick: float, fps: float, count: int, start: float = 0.0) -> list[int]:
    """Indices of the frames that are on screen at 0, 1/fps, 2/fps, ... seconds.

    Args:
        times: presentation times of all frames in seconds, ascending from 0.
        tick: unit in seconds to which the container rounds times (Matroska and WebM: a millisecond). Without slack for it,
            a clip at its own rate would repeat one frame and lose the next wherever a time was rounded up.
    Returns:
        `count` indices into `times`, non-decreasing.
    """
    slack = min(_TICK_SLACK * tick, _FRAME_SLACK / fps)
    return [max(0, bisect_right(times, start + k / fps + slack) - 1) for k in range(count)]


def decode(path: Path, clip: VideoInfo, bucket: Bucket, fps: float, start: float = 0.0) -> np.ndarray:
    """Decode the first `bucket.frames` frames at `fps`, scaled to cover the bucket and cropped at the centre.

    Returns:
        uint8 array (F, H, W, 3), RGB.
    Raises:
        UserError: the file breaks before the last frame that is needed, or does not say when its frames are shown.
    """
    frames = np.empty((*bucket, 3), dtype=np.uint8)
    filled, shown = 0, float("-inf")
    scaler = VideoReformatter()  # one for all frames, because setting up its filters takes as long as scaling a frame
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            packets = _packets(container, stream, start + bucket.frames / fps)
            ticks = sorted(packet.pts for packet in packets if _is_shown(packet))
            times = [float((tick - ticks[0]) * stream.time_base) for tick in ticks]
            wanted = frame_indices(times, float(stream.time_base), fps, bucket.frames, start)
            for frame in chain.from_iterable(stream.decode(packet) for packet in (*packets, None)):
                if frame.pts is None or frame.pts < shown:  # such as H.264 with B-frames in AVI
                    cure = f"convert it: ffmpeg -i {path.name} {path.stem}.mp4"
                    raise UserError("the file does not say when its frames are shown", cure, str(path))
                shown = frame.pts
                index = bisect_right(ticks, shown) - 1
                first = filled
                while filled < len(wanted) and wanted[filled] <= index:
                    filled += 1
                if filled > first:
                    frames[first:filled] = _cover(frame, clip, bucket, scaler)
                if filled == len(wanted):
                    return frames
    except av.error.FFmpegError as error:
        raise _broken(path, filled, bucket.frames, error.strerror) from None
    raise _broken(path, filled, bucket.frames, "the stream ends early")


def _packets(container: av.container.InputContainer, stream: av.VideoStream, seconds: float) -> list[av.Packet]:
    """The packets of a stream's first `seconds`, in decoding order. The rest of a long file is not read.

    A frame is decoded before it is shown. So once a decoding time is later than `seconds`, all later packets are shown after that.
    """
    packets: list[av.Packet] = []
    start = None
    for packet in container.demux(stream):
        if not packet.size:  # the end of the file
            continue
        packets.append(packet)
        if _is_shown(packet):
            start = packet.pts if start is None else min(start, packet.pts)
        if start is not None and packet.dts is not None and (packet.dts - start) * stream.time_base > seconds:
            break
    return packets


def _is_shown(packet: av.Packet) -> bool:
    """Whether the packet's frame is shown. An edit list can hide frames."""
    return packet.pts is not None and not packet.is_discard


def _broken(path: Path, got: int, wanted: int, why: str) -> UserError:
    return UserError(
        f"the file breaks after {got} of {wanted} frames ({why})", "copy or export it again, or remove it", str(path)
    )


def _display_size(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Height and width as shown: pixel aspect applied, then rotation."""
    width = round(frame.width * (pixel_aspect or 1))
    return (width, frame.height) if frame.rotation % 180 else (frame.height, width)


def _cover(frame: av.VideoFrame, clip: VideoInfo, bucket: Bucket, scaler: VideoReformatter) -> np.ndarray:
    """Convert one frame to uint8 (H, W, 3): scaled to cover the bucket, rotated upright, cropped at the centre."""
    scale = max(bucket.height / clip.height, bucket.width / clip.width)
    height, width = max(bucket.height, round(clip.height * scale)), max(bucket.width, round(clip.width * scale))
    rows, columns = (width, height) if frame.rotation % 180 else (height, width)
    scaled = scaler.reformat(frame, columns, rows, "rgb24", interpolation="BICUBIC").to_ndarray()
    upright = np.rot90(scaled, k=frame.rotation // 90) if frame.rotation else scaled
    top, left = (height - bucket.height) // 2, (width - bucket.width) // 2
    return upright[top : top + bucket.height, left : left + bucket.width]
