"""Finds out what a video file holds, at the price of reading it through once; only its first frames are decoded, or
those up to the first that is transparent, if its pixels may be.

What is found here: files that cannot be read, are cut off, announce more frames or seconds than they have, have packets
marked as damaged, boxes that do not fit together, holes, no key frame at the beginning, no times, or colours that cannot
be converted. What is damaged inside a frame is found when that frame is decoded, if its format allows to tell.
"""

from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from finetune.data.clip import AGAIN
from finetune.data.video.info import VideoInfo, packed
from finetune.data.video.opening import (
    FROM_THE_BEGINNING,
    command,
    display_size,
    frames_of,
    opened,
    packets_of,
    pictures,
    unreadable,
    without_times,
)
from finetune.data.video.picture import (
    TRANSPARENT,
    UNREAD_ALPHA,
    has_alpha,
    is_transparent,
    known_colours,
    orientation_of,
)
from finetune.data.video.structure import break_in
from finetune.data.video.timeline import Timeline, hole, timeline
from finetune.runtime.errors import UserError

_ANNOUNCING = {"matroska,webm", "flv", "asf"}  # formats whose head says how long the file is
_WITHOUT_END = {"mpeg", "mpegts"}  # formats in which only the last frames tell whether the end is there
_WHOLE = {"matroska,webm", "gif", "avi"}  # formats whose boxes show that nothing is missing; a pause in them is meant
_RAW = {"h264", "hevc", "mjpeg", "mpegvideo", "m4v", "obu", "vvc", "dirac"}  # a stream without container has no times
_TAILS = (1, 10, 10**9)  # seconds before the end from which on the last frames are decoded, until a key frame is there
_LAST = 3  # frames at the end that must be sound: others may refer to what comes last
_LATE = 0.1  # share of the announced duration that may be missing, and
_LATE_SECONDS = 1.0  # what may be missing of it in any case


@dataclass
class _Packets:
    """What the packets of a file say; their data is not kept."""

    times: array = field(default_factory=lambda: array("q"))
    places: array = field(
        default_factory=lambda: array("q")
    )  # bytes of the file at which the packets begin; -1 unknown
    not_shown: array = field(default_factory=lambda: array("q"))  # times of empty packets and hidden frames
    last: tuple[int, int] = (-(2**63), 0)  # time and duration of the packet that is shown last
    last_of_all: tuple[int, int] = (-(2**63), 0)  # the same, with those that are not shown
    count: int = 0
    untimed: int = 0  # packets that do not say when they are shown
    marked: int | None = None  # time of the first packet that the container marks as damaged
    begins_with_key: bool = True
    begins_hidden: bool = False  # whether an edit list hides the first frames; FFmpeg leaves some of them out
    turns_back: bool = False  # whether a packet is to be decoded before the one that it follows
    decoded: int | None = None  # time at which the last packet is to be decoded
    end: float = 0.0  # seconds at which the last stream ends


def probe(path: Path) -> VideoInfo:
    """Read a video's size, times, and what must be done to its picture.

    Raises:
        UserError: the file cannot be used, with how much of it is sound where that is known.
    """
    with opened(path) as (container, stream):
        form = container.format.name
        if form in _RAW:
            raise without_times(path, f"say its rate: {command(path, '', before='-r 25')}")
        # Before the packets, because decoding takes what the demuxer has read while opening.
        first = _first_frame(container, stream, path)
        turn, colours = orientation_of(first, path), known_colours(first, path)
        height, width = display_size(first, stream.sample_aspect_ratio, turn.transposed)
        changes = ["deinterlaced"] if _is_interlaced(first, stream) else []
        changes += ["mirrored"] if turn.mirrored else []
        changes += [colours.change] if colours.change else []
        if has_alpha(first) and any(map(is_transparent, chain([first], frames_of(container, stream, path)))):
            changes.append(TRANSPARENT)
        if len(pictures(container)) > 1:
            changes.append("taken from one of several video streams")
        if stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
            changes.append(UNREAD_ALPHA)
    found, former = _read_through(path, form, first.pts)
    if form in _WITHOUT_END:
        _decode_tail(path, found, form in FROM_THE_BEGINNING)
    times = "" if found.rate else packed(found.ticks - found.ticks[0])
    frames, tick = len(found.ticks), float(found.tick)
    return VideoInfo(height, width, frames, found.duration, found.first, tick, times, tuple(changes), *former)


def _first_frame(container: av.container.InputContainer, stream: av.VideoStream, path: Path) -> av.VideoFrame:
    stream.thread_count = 1
    frame = next(frames_of(container, stream, path), None)
    if frame is None:
        raise UserError("not one frame can be decoded", "export it again, or remove it", str(path))
    has_no_order = container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc")
    if frame.pts is None or (has_no_order and stream.codec_context.has_b_frames):
        raise without_times(path)
    if frame.is_corrupt:
        raise UserError("its first frame is damaged", AGAIN, str(path))
    return frame


def _is_interlaced(frame: av.VideoFrame, stream: av.VideoStream) -> bool:
    progressive = (0, 1)  # field orders "unknown" and "progressive"
    return frame.interlaced_frame or stream.codec_context.field_order not in progressive


def _read_through(path: Path, form: str, first: int) -> tuple[Timeline, tuple[int, float]]:
    """The times of all frames, from the packets; and what `_former` makes of them."""
    with opened(path) as (container, stream):
        tick, announced = stream.time_base, stream.frames
        announced_end = (stream.start_time or 0) + (stream.duration or 0)
        rates = (stream.base_rate, stream.guessed_rate, stream.average_rate)
        packets = _packets(container, stream, path, all_streams=form in _ANNOUNCING)
        seconds = (container.duration or 0) / av.time_base if form in _ANNOUNCING else 0.0
        begin = (container.start_time or 0) / av.time_base
    if 2 * packets.untimed > packets.count:
        raise without_times(path)
    times = np.frombuffer(packets.times, np.int64)
    ticks = np.unique(times)
    if not len(ticks):
        raise UserError("there is not one frame in it", AGAIN, str(path))
    if packets.turns_back or len(ticks) < len(times):
        _require_order(path, max((rate for rate in rates if rate), default=Fraction(25)))
    if first > ticks[0] or not packets.begins_with_key:
        lost = max(1, int(np.searchsorted(ticks, first)))
        what = f"the stream does not begin with a key frame: its first {lost} frames cannot be decoded"
        raise UserError(what, f"make a file of those that can: {command(path, '')}", str(path))
    found = timeline(ticks, tick, packets.last[1], rates)
    last, lasts = packets.last
    is_whole = packets.begins_hidden and last + 2 * lasts >= announced_end  # an edit may end within a frame
    if packets.count < announced and not is_whole:
        what = f"the file is cut off: {packets.count} of the {announced} frames it announces are there"
        raise _refused(path, what, found, packets.marked)
    if packets.marked is not None:
        raise _refused(path, f"a frame of the {packets.count} in it is damaged", found, packets.marked)
    try:
        broken = break_in(path, form)
    except OSError as error:
        raise unreadable(error, path) from None
    if broken:
        behind = times[np.frombuffer(packets.places, np.int64) >= broken.place]
        raise _refused(path, broken.what, found, int(behind.min()) if len(behind) else None)
    if seconds and packets.end - begin < seconds - max(_LATE_SECONDS, _LATE * seconds):
        what = f"the file is cut off: it has {packets.end - begin:.2f} of the {seconds:.2f} s it announces"
        raise _refused(path, what, found, None)
    if not announced and form not in _WHOLE:
        _require_no_hole(path, found, form in _WITHOUT_END)
    return found, _former(packets, tick, rates[-1])


def _former(packets: _Packets, tick: Fraction, average_rate: Fraction | None) -> tuple[int, float]:
    """Number of frames and duration as versions with the first decoder found them, which keys of cached items contain.

    They took times as the container writes them, and counted packets whose frames are not shown.
    """
    times = np.frombuffer(packets.times + packets.not_shown, np.int64)
    span, (_, last) = int(times.max() - times.min()), packets.last_of_all
    last = last or span // max(len(times) - 1, 1) or round(1 / (tick * (average_rate or 25)))
    return len(times), float((span + last) * tick)


def _require_order(path: Path, rate: Fraction) -> None:
    """Raise UserError if frames would be lost because they are not shown after the one that they follow.

    Packets do not tell: that two of them have one time may mean the two fields of a frame.
    """
    latest, count, lost = -(2**63), 0, 0
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in frames_of(container, stream, path):
            if frame.pts is not None:
                count, lost = count + 1, lost + (frame.pts <= latest)
                latest = max(latest, frame.pts)
    if lost:
        retimed = command(path, f"-vf settb={rate.denominator}/{rate.numerator},setpts=N -r {rate} -an")
        what = f"{lost} of its {count} frames are shown no later than the frame before them, and would be lost"
        cure = f"give each a time of its own: {retimed}; or, if two films were joined, cut them where they meet"
        raise UserError(what, cure, str(path))


def _require_no_hole(path: Path, found: Timeline, is_broadcast: bool) -> None:
    gap = hole(found, is_broadcast)
    if gap:
        filled = command(path, f"-vf fps={round(1 / float(np.median(np.diff(found.ticks)) * found.tick), 3):g}")
        what = f"frames are missing between {gap[0]:.2f} and {gap[1]:.2f} s, everywhere else they come at one rate"
        raise UserError(what, f"{AGAIN}; if the pause is meant, fill it: {filled}", str(path))


def _packets(container: av.container.InputContainer, stream: av.VideoStream, path: Path, all_streams: bool) -> _Packets:
    """Go through a file's packets; of each, only numbers are kept. An edit list hides frames, which are not counted."""
    found = _Packets()
    for packet in packets_of(container, None if all_streams else stream, path):
        if all_streams and packet.pts is not None:
            found.end = max(found.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index or (packet.pts is None and not packet.size):
            continue
        if packet.is_corrupt and found.marked is None:
            found.marked = packet.dts if packet.pts is None else packet.pts
        if not found.count:
            found.begins_with_key = packet.is_keyframe
            found.begins_hidden = packet.is_discard
        found.count += 1
        found.untimed += packet.pts is None
        if packet.dts is not None:
            found.turns_back |= found.decoded is not None and packet.dts < found.decoded
            found.decoded = packet.dts
        if packet.pts is None or packet.is_discard:
            continue
        last = packet.pts, packet.duration or 0
        found.last_of_all = max(found.last_of_all, last)
        if packet.size and not _is_hidden(packet, stream):
            found.times.append(packet.pts)
            found.places.append(-1 if packet.pos is None else packet.pos)
            found.last = max(found.last, last)
        else:
            found.not_shown.append(packet.pts)
    return found


def _is_hidden(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether a frame only serves others as a reference: VP8 stores such frames in packets of their own."""
    return stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10


def _decode_tail(path: Path, found: Timeline, is_guessed: bool) -> None:
    """Decode the last frames of a file whose format has no other sign of its end. Raises UserError if they are damaged.

    Args:
        is_guessed: whether times behind a seek are guesses, so that only the file from its beginning shows that it is cut.
    """
    for seconds in _TAILS:
        with opened(path) as (container, stream):
            stream.thread_count = 1
            if seconds < found.duration:
                container.seek(int(found.ticks[-1] - seconds / found.tick), stream=stream)
            # After a seek, the first frames may refer to some that were not read.
            shown = [(frame.pts, frame.is_corrupt) for frame in frames_of(container, stream, path)][-_LAST:]
        is_sound = bool(shown) and shown[-1][0] == found.ticks[-1] and not any(damaged for _, damaged in shown)
        if is_sound or (shown and not is_guessed) or seconds >= found.duration:
            break
    if not is_sound:
        first = int(found.ticks[-min(_LAST, len(found.ticks))])
        raise _refused(path, "the file is cut off: its last frame is damaged", found, first)


def _refused(path: Path, what: str, found: Timeline, until: int | None) -> UserError:
    """An error that says how much of a file is sound: the frames before a time in ticks, or with None all that are there."""
    frames = len(found.ticks) if until is None else int(np.searchsorted(found.ticks, until))
    seconds = frames / len(found.ticks) * found.duration
    if 0 < frames < len(found.ticks):
        seconds = float((found.ticks[frames - 1] - found.ticks[0] + int(np.median(np.diff(found.ticks)))) * found.tick)
    keep = f"; or keep its beginning: {command(path, f'-t {seconds:.2f}')}" if frames else ""
    return UserError(
        f"{what}; at most its first {frames} frames ({seconds:.2f} s) are sound", f"{AGAIN}{keep}", str(path)
    )
