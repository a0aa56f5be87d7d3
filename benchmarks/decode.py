"""Decoding throughput compared with bare PyAV: H.264 clips of 512x768, decoded into a bucket of that size and of half of it.

`python -m benchmarks.decode [--rounds N]`. Bare PyAV opens the file, decodes the same number of frames and converts each
to an RGB array of the bucket's size, without regard to frame rates, rotation or crops. It is measured in two ways: as
its documentation recommends, with `frame.to_ndarray(...)`, and with one scaler for all frames.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from benchmarks.paired import median_ratio, print_table, take_turns
from finetune.data.decode import decode, probe
from finetune.data.synthetic import Recording, record, scene
from finetune.recipe import Bucket

HEIGHT, WIDTH, FPS = 512, 768, 25
LENGTHS = (49, 73, 97, 121)
BUCKETS = (Bucket(49, 512, 768), Bucket(49, 256, 384))
GRAIN = 3  # of 255; costs the encoder as much as camera noise would


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


def bare(path: Path, bucket: Bucket, scaler: VideoReformatter | None = None) -> list[np.ndarray]:
    """Decode the first frames of a file with bare PyAV, (H, W, 3) each."""
    shape = {"width": bucket.width, "height": bucket.height, "format": "rgb24", "interpolation": "BICUBIC"}
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            frames.append((scaler.reformat(frame, **shape) if scaler else frame.reformat(**shape)).to_ndarray())
            if len(frames) == bucket.frames:
                return frames
    raise ValueError(f"{path} has fewer than {bucket.frames} frames")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each variant on each clip")
    rounds = parser.parse_args().rounds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder))
        megabits = [clip.stat().st_size * 8e-6 / (int(clip.stem) / FPS) for clip in clips]
        for bucket in BUCKETS:
            ours, plain, tuned = [], [], []
            for clip in clips:
                info = probe(clip)
                assert np.array_equal(decode(clip, info, bucket, info.fps), np.stack(bare(clip, bucket)))
                seconds = take_turns(
                    {
                        "ours": partial(decode, clip, info, bucket, info.fps),
                        "plain": partial(bare, clip, bucket),
                        "tuned": lambda clip=clip, bucket=bucket: bare(clip, bucket, VideoReformatter()),
                    },
                    rounds,
                )
                ours, plain, tuned = ours + seconds["ours"], plain + seconds["plain"], tuned + seconds["tuned"]
            rates = [f"{bucket.frames / statistics.median(times):.0f}" for times in (ours, plain, tuned)]
            rows.append(
                [bucket, *rates, f"{median_ratio(plain, ours):.2f}x", f"{median_ratio(tuned, ours):.2f}x"],
            )
    print(f"{len(clips)} H.264 clips of {HEIGHT}x{WIDTH}, {LENGTHS} frames, {statistics.median(megabits):.1f} Mbit/s;")
    print("the same frames bit for bit; frames a second, and throughput over bare PyAV's (paired, median)\n")
    print_table(["bucket", "finetune", "PyAV", "PyAV, one scaler", "over PyAV", "over PyAV, one scaler"], rows)


if __name__ == "__main__":
    main()
