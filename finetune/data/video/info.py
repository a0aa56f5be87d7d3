"""What is known of a video file once it has been probed, and which of its frames a window at a frame rate shows."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from finetune.runtime.errors import UserError

_SLACK = 0.1  # frames: a clip that lacks at most this share of its last frame still has it
_ROUNDING = 1e-6  # frames: what float arithmetic may add to a time that lies exactly between two frames


class Resampling(NamedTuple):
    """How a window differs from the frames that lie in its span."""

    repeated: int  # frames of the window that show the same frame as the one before
    left_out: int  # frames of the clip within the window's span that are not shown


@dataclass(frozen=True)
class VideoInfo:
    """A video as players show it. All fields are JSON values, so that they can be remembered.

    Attributes:
        height: rows after pixel aspect and rotation; so is `width`.
        frames: number of frames that are shown.
        duration: seconds from the first frame until the last one ends.
        first: time of the first frame, in ticks of the stream's time base.
        tick: seconds of a tick.
        times: times of a clip of variable rate as `packed` by this module; empty if the clip's rate is constant.
        changes: what is done to its picture besides scaling, in words, such as "deinterlaced".
        former_frames: the number of frames as versions counted it that had the first decoder; None if it is the same.
        former_duration: the duration as they measured it; None if it is the same.
    """

    height: int
    width: int
    frames: int
    duration: float
    first: float = 0.0
    tick: float = 0.0
    times: str = ""
    changes: tuple[str, ...] = ()
    former_frames: int | None = None
    former_duration: float | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "VideoInfo | None":
        """Restore what `dataclasses.asdict` has made of it; None if a field is missing, as in facts of earlier versions."""
        names = [field.name for field in fields(cls)]
        if any(name not in facts for name in names):
            return None
        return cls(**{name: facts[name] for name in names} | {"changes": tuple(facts["changes"])})

    @property
    def fps(self) -> float:
        """Frame rate; of a clip of variable rate, the average."""
        return self.frames / self.duration

    @property
    def former_fps(self) -> float:
        """Frame rate as versions with the first decoder knew it: keys of their cached items contain it."""
        frames = self.frames if self.former_frames is None else self.former_frames
        return frames / (self.duration if self.former_duration is None else self.former_duration)

    def frames_at(self, fps: float) -> int:
        """Number of frames that the clip has at a frame rate."""
        return max(1, int(self.duration * fps + _SLACK))

    @cached_property
    def ticks(self) -> np.ndarray:
        """Times of the frames of a clip of variable rate, in ticks after the first: int64 (frames,)."""
        return unpacked(self.times)

    def index_of(self, ticks: int) -> int:
        """Index of the frame that is shown at a time, which is given in ticks of the stream's time base."""
        since = ticks - self.first
        if not self.times:
            return round(since * self.tick * self.fps) if self.tick else 0
        after = int(np.searchsorted(self.ticks, since))
        if after and (after == len(self.ticks) or since - self.ticks[after - 1] <= self.ticks[after] - since):
            return after - 1
        return after

    def ticks_of(self, index: int) -> int:
        """Time of a frame in ticks of the stream's time base; of a clip of constant rate, the ideal time."""
        return round(self.first + (self.ticks[index] if self.times else index / (self.fps * self.tick)))

    def frame_indices(self, fps: float, count: int, start: float = 0.0) -> list[int]:
        """Indices of the frames nearest in time to start + k / fps; of two that are equally near, the earlier.

        A clip of constant rate is taken at its ideal times: what its container rounds, and jitter, count for nothing.

        Args:
            start: seconds after the first frame.
        Returns:
            `count` indices, non-decreasing.
        """
        at = start + np.arange(count) / fps
        if not self.times:
            nearest = np.floor(at * self.fps + 0.5 - _ROUNDING)
        else:
            times = self.ticks * self.tick
            nearest = np.searchsorted((times[1:] + times[:-1]) / 2, at - _ROUNDING / self.fps)
        return np.clip(nearest, 0, self.frames - 1).astype(int).tolist()

    def resampled(self, fps: float, count: int, start: float = 0.0) -> Resampling:
        """How many frames of a window are shown again, and how many of the clip's within its span are not shown."""
        indices = self.frame_indices(fps, count, start)
        shown = len(set(indices))
        return Resampling(count - shown, indices[-1] - indices[0] + 1 - shown)

    def require(self, fps: float, count: int, start: float, where: str) -> None:
        """Raise UserError unless the clip has `count` frames from `start` on. Its first frame is there at any rate."""
        end = start + (count - _SLACK) / fps
        if start < 0 or (end > self.duration + 1e-6 and (start, count) != (0, 1)):
            raise UserError(
                f"{count} frames at {fps:g} fps from {start:g} s on end at {end:.3f} s, the clip at {self.duration:.3f} s",
                "take a shorter bucket or an earlier window",
                where,
            )


def packed(ticks: np.ndarray) -> str:
    """Times as a text: the differences of ascending integers, compressed. About two characters a frame."""
    steps = np.diff(ticks, prepend=0).astype("<i8")
    return base64.b85encode(zlib.compress(steps.tobytes(), 9)).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """The times that were `packed`: int64 (frames,)."""
    return np.cumsum(np.frombuffer(zlib.decompress(base64.b85decode(text)), "<i8"))
