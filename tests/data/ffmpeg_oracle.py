"""The ffmpeg binary of the package imageio-ffmpeg as the outside oracle of what a video file shows."""

import subprocess
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np

PATTERN = "testsrc2=size=192x128:rate={fps}:duration={seconds}"  # saturated, moving, different in every frame
H264 = ("-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "veryfast", "-crf", "10")
ACCURATE = (
    "bicubic+accurate_rnd+full_chroma_int"  # flags of swscale; with its defaults, limited range comes out too dark
)
LEFT = "in_chroma_loc=left"  # where H.264, HEVC and MPEG have their chroma; ffmpeg's scale filter does not ask the file
PLAIN = f"scale=flags={ACCURATE}:{LEFT}"
VP9 = ("-pix_fmt", "yuv420p", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-crf", "10")


class Shown(NamedTuple):
    """What ffmpeg says of a file: stored size after rotation, pixel aspect, frame count, seconds."""

    height: int
    width: int
    pixel_aspect: Fraction
    frames: int
    duration: float


class Ffmpeg:
    """Makes and decodes files; the binary shares no library with PyAV."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.binary = folder, imageio_ffmpeg.get_ffmpeg_exe()

    def run(self, *arguments: object, given: bytes | None = None) -> bytes:
        """Run the binary; `given` is its standard input. Returns its standard output."""
        command = [self.binary, "-nostdin", "-v", "error", "-y", *map(str, arguments)]
        command = [word for word in command if given is None or word != "-nostdin"]
        try:
            return subprocess.run(command, input=given, capture_output=True, timeout=60, check=True).stdout
        except subprocess.CalledProcessError as error:
            raise AssertionError(error.stderr.decode(errors="replace")) from error

    def make(self, name: str, *options: str, fps: str = "25", seconds: float = 1.0) -> Path:
        """A moving test pattern, encoded once a session."""
        path = self.folder / name
        if not path.exists():
            self.run("-f", "lavfi", "-i", PATTERN.format(fps=fps, seconds=seconds), *options, path)
        return path

    def remake(self, name: str, source: Path, *before: str, after: tuple[str, ...] = ()) -> Path:
        """A copy of a file's packets with other container data; `before` are options of the input."""
        path = self.folder / name
        if not path.exists():
            self.run(*before, "-i", source, *after, "-c", "copy", path)
        return path

    def frames(self, path: Path, height: int, width: int, filters: str = PLAIN) -> np.ndarray:
        """Decoded frames, rotated as their file asks: uint8 (F, H, W, 3)."""
        raw = self.run(
            *("-i", path, "-vf", filters, "-sws_flags", ACCURATE),
            *("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
        )
        return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)

    def times(self, path: Path) -> np.ndarray:
        """Seconds at which the frames begin that ffmpeg decodes, from the first: float64 (F,)."""
        header, rows = self._framecrc(path)
        return np.array([float((row[2] - rows[0][2]) * Fraction(header["#tb"])) for row in rows])

    def shown(self, path: Path) -> Shown:
        """Size, pixel aspect, number and times of the frames that ffmpeg decodes."""
        header, rows = self._framecrc(path)
        width, height = map(int, header["#dimensions"].split("x"))
        seconds = (rows[-1][2] + rows[-1][3] - rows[0][2]) * Fraction(header["#tb"])
        aspect = Fraction(header["#sar"]) if header["#sar"] != "0/1" else Fraction(1)
        return Shown(height, width, aspect, len(rows), float(seconds))

    def _framecrc(self, path: Path) -> tuple[dict[str, str], list[list[int]]]:
        """What ffmpeg says of a stream, and stream, decoding time, time and duration of each of its frames, in ticks."""
        lines = self.run("-i", path, "-an", "-fps_mode", "passthrough", "-f", "framecrc", "-").decode().splitlines()
        header = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("#")}
        return header, [[int(cell) for cell in line.split(",")[:4]] for line in lines if not line.startswith("#")]
