"""Opens video files; whatever hinders that is a UserError that names the file."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av

from finetune.data.clip import AGAIN
from finetune.data.file_fault import open_fault
from finetune.runtime.errors import Unreadable, UserError

_CURES = {
    errno.EACCES: "give yourself the right to read it (chmod), or remove it",
    errno.EPERM: "give yourself the right to read it (chmod), or remove it",
    errno.EIO: "check the disk that it is on, copy it again, or remove it",
    errno.ENOENT: "mend the path, or remove the clip",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOMEM: f"the file is damaged, or its picture is too large for this machine: {AGAIN}",
    errno.EMFILE: "allow more open files: ulimit -n",
    errno.ENFILE: "close other programs: all processes together have too many open files",
    errno.ESTALE: "mount its file system again",
    errno.ETIMEDOUT: "check the server or the network that it comes from",
}
_STRICT = {
    "mjpeg",
    "mpeg1video",
    "mpeg2video",
}  # decoders that hide damage without marking the frame, unless told to fail
FROM_THE_BEGINNING = {
    "mpeg"
}  # formats that time only some frames, so that behind a seek the times of others are guesses


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file's container and its video stream; of several, the one that FFmpeg takes for the best, but no cover picture.

    Raises:
        UserError: the file cannot be read, is no video, or has no video stream.
    """
    require_file(path)
    try:
        # Without "file:", FFmpeg takes what stands before a colon for a protocol. A playlist may name no other protocol.
        name, only = f"file:{path}", {"protocol_whitelist": "file"}
        with av.open(name, "r", options=only, metadata_errors="replace") as container:
            stream = _video_stream(container, path)
            if stream.codec_context.name in _STRICT:
                stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise unreadable(error, path) from None


def packets_of(
    container: av.container.InputContainer, stream: av.VideoStream | None, path: Path
) -> Iterator[av.Packet]:
    """The packets of a stream, or with None of all, and an empty one at the end of each. Raises UserError for damage."""
    packets = container.demux() if stream is None else container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except IndexError:  # PyAV looks for the packet's stream among those that were there when it opened the file
            what = "the file is damaged: there are packets of a stream that it does not announce"
            raise UserError(what, AGAIN, str(path)) from None
        yield packet


def frames_of(container: av.container.InputContainer, stream: av.VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a stream. Raises UserError for damaged packets, FFmpegError for frames that cannot be decoded."""
    for packet in packets_of(container, stream, path):
        yield from stream.decode(packet)


def require_file(path: Path) -> None:
    """Raise UserError unless the path is a file that has bytes and may be read."""
    if fault := open_fault(path):
        raise Unreadable(*fault, str(path))
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError("the file is empty (0 bytes)", AGAIN, str(path))
    except OSError as error:
        raise unreadable(error, path) from None


def unreadable(error: Exception, path: Path) -> UserError:
    """What an error of the system or of FFmpeg means for the user."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if number in _CURES:
        return Unreadable(f"cannot be read ({reason})", _CURES[number], str(path))
    if number and not isinstance(error, av.error.FFmpegError):  # FFmpeg has EINVAL and others for what a file holds
        return Unreadable(f"cannot be read ({reason})", "check the disk that it is on, or remove it", str(path))
    cure = f"the file is cut off or not a video: {AGAIN}"
    return UserError(f"cannot be read as a video ({reason})", cure, str(path))


def command(path: Path, options: str, before: str = "") -> str:
    """The ffmpeg line that makes another file of a clip, for the cure of an error; `before` are options of the input."""
    words = ["ffmpeg", before, "-i", _quoted(path.name), options, _quoted(f"{path.stem}_new.mp4")]
    return " ".join(word for word in words if word)


def _quoted(name: str) -> str:
    plain = all(letter.isalnum() or letter in "._-+" for letter in name) and not name.startswith("-")
    return name if plain else "'" + f"./{name}".replace("'", "'\\''") + "'"


def pictures(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The video streams of a file that are not its cover picture."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    streams = pictures(container)
    if not streams:
        raise UserError("there is no video stream in it", "remove it: sound alone cannot be trained on", str(path))
    form = container.format.name
    if form.endswith("_pipe") or form == "image2":
        kind = form.removesuffix("_pipe").upper()
        raise UserError(f"this is an image ({kind}), not a video", "remove it, or make a video of it", str(path))
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise UserError("the code of its video stream is unknown", "export it again as H.264", str(path))
    if not stream.time_base:
        raise without_times(path)
    return stream


def without_times(path: Path, cure: str = "") -> UserError:
    """The error of a file that does not say when its frames are shown."""
    what = "the file does not say when its frames are shown"
    return UserError(what, cure or f"convert it: {command(path, '')}", str(path))


def display_size(frame: av.VideoFrame, pixel_aspect: Fraction | None, turned: bool) -> tuple[int, int]:
    """Height and width of a frame as shown: pixel aspect applied, then rotation."""
    width = max(1, round(frame.width * (pixel_aspect or 1)))
    return (width, frame.height) if turned else (frame.height, width)
