"""Decoding throughput compared with bare PyAV and with ffmpeg, one thread each, at the same accuracy of colours.

`python -m benchmarks.decode [--rounds N]`. H.264 clips of 512x768 are decoded into a bucket of that size and of half of it.
Bare PyAV opens the file, decodes the same number of frames and converts each to an RGB array of the bucket's size with one
scaler and accurate flags, without regard to frame rates, rotation, crops or damage. ffmpeg is the binary of imageio-ffmpeg,
with its start and its pipe; it writes the same pixels. Then, a window at the end of a clip of 20 minutes that has a key
frame a second, as cameras write them, is compared with one at its start.
"""

import argparse
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from benchmarks.paired import median_ratio, print_table, take_turns
from finetune.data.decode import VideoInfo, decode, probe
from finetune.data.synthetic import Recording, record, scene
from finetune.recipe import Bucket

HEIGHT, WIDTH, FPS = 512, 768, 25
LENGTHS = (49, 73, 97, 121)
BUCKETS = (Bucket(49, 512, 768), Bucket(49, 256, 384))
GRAIN = 3  # of 255; costs the encoder as much as camera noise would
MINUTES = 20
LATE = MINUTES * 60 - 3.5  # seconds; half a second behind a key frame
FLAGS = "bicubic+accurate_rnd+full_chroma_int"
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
NEAR = 0.01  # of 255: the two swscales are not bit-exact


def make_clips(folder: Path) -> list[Path]:
    """Write clips of 49 to 121 frames, with grain. Returns their paths."""
    random = np.random.default_rng(0)
    for index, frames in enumerate(LENGTHS):
        video, _ = scene(index, frames, HEIGHT, WIDTH)
        for picture in video:
            grain = random.integers(-GRAIN, GRAIN + 1, (HEIGHT, WIDTH, 1))
            picture[:] = np.clip(picture + grain, 0, 255)
        record(video, folder / f"{frames}.mp4", Recording(f"{frames}.mp4", HEIGHT, WIDTH, frames, FPS))
    return sorted(folder.glob("*.mp4"))


def make_long(folder: Path) -> Path:
    """Write a clip of 20 minutes, with a key frame a second."""
    path = folder / "long.mkv"
    source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate={FPS}:duration=60"
    code = ("-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "ultrafast", "-g", str(FPS), "-bf", "2")
    _ffmpeg("-f", "lavfi", "-i", source, *code, folder / "minute.mkv")
    _ffmpeg("-stream_loop", str(MINUTES - 1), "-i", folder / "minute.mkv", "-c", "copy", path)
    return path


def bare(path: Path, bucket: Bucket) -> np.ndarray:
    """Decode the first frames of a file with bare PyAV: uint8 (F, H, W, 3)."""
    frames = np.empty((*bucket, 3), np.uint8)
    scaler, filled = VideoReformatter(), 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for frame in container.decode(stream):
            shape = {"width": bucket.width, "height": bucket.height, "format": "rgb24", "threads": 1}
            colours = {"interpolation": ACCURATE, "dst_color_range": ColorRange.JPEG}
            frames[filled] = scaler.reformat(frame, **shape, **colours).to_ndarray()
            filled += 1
            if filled == bucket.frames:
                return frames
    raise ValueError(f"{path} has fewer than {bucket.frames} frames")


def binary(path: Path, bucket: Bucket) -> np.ndarray:
    """Decode the first frames of a file with ffmpeg: uint8 (F, H, W, 3)."""
    one = ("-threads", "1", "-filter_threads", "1")
    scale = f"scale={bucket.width}:{bucket.height}:flags={FLAGS}:in_chroma_loc=left"
    output = ("-frames:v", str(bucket.frames), "-f", "rawvideo", "-pix_fmt", "rgb24", "-threads", "1", "-")
    raw = _ffmpeg(*one, "-i", path, "-vf", scale, "-sws_flags", FLAGS, *output)
    return np.frombuffer(raw, np.uint8).reshape(*bucket, 3)


def ours(path: Path, info: VideoInfo, bucket: Bucket, start: float = 0.0) -> np.ndarray:
    return decode(path, info, bucket, info.fps, start, threads=1)


def compare(clips: list[Path], bucket: Bucket, rounds: int) -> list[object]:
    """A row of the table: frames a second, and ratios."""
    names = ("finetune", "PyAV", "ffmpeg")
    times: dict[str, list[float]] = {name: [] for name in names}
    for clip in clips:
        info = probe(clip)
        calls = (partial(ours, clip, info, bucket), partial(bare, clip, bucket), partial(binary, clip, bucket))
        first, *others = [call() for call in calls]
        assert all(np.abs(first.astype(int) - other).mean() < NEAR for other in others)
        for name, seconds in take_turns(dict(zip(names, calls, strict=True)), rounds).items():
            times[name] += seconds
    rates = [f"{bucket.frames / statistics.median(times[name]):.0f}" for name in names]
    return [bucket, *rates, *(f"{median_ratio(times[name], times['finetune']):.2f}x" for name in names[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each variant on each clip")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder))
        megabits = [clip.stat().st_size * 8e-6 / (int(clip.stem) / FPS) for clip in clips]
        rows = [compare(clips, bucket, rounds) for bucket in BUCKETS]
        long = make_long(Path(folder))
        info = probe(long)
        windows = {start: partial(ours, long, info, BUCKETS[0], start) for start in (0.0, LATE)}
        seconds = take_turns({str(start): call for start, call in windows.items()}, rounds)
    print(
        f"{len(clips)} H.264 clips of {HEIGHT}x{WIDTH}, {LENGTHS} frames, {statistics.median(megabits):.1f} Mbit/s, one thread;"
    )
    print("frames a second, and throughput over that of others (paired, median)\n")
    print_table(["bucket", "finetune", "PyAV", "ffmpeg", "over PyAV", "over ffmpeg"], rows)
    late = median_ratio(seconds[str(LATE)], seconds["0.0"])
    print(
        f"\n{BUCKETS[0].frames} frames at {LATE:g} s of {MINUTES} minutes cost {late:.2f} times as much as those at the start"
    )


def _ffmpeg(*arguments: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    main()
