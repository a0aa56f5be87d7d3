"""How busy the encoder is while a cache is filled, and the speed over reading, encoding and writing one after the other.

`python -m benchmarks.preparation [--rounds N] [--clips N]`. Real H.264 clips are decoded, and real VAEs of random weights encode
them, one thread each: a small one, which takes as long as the decoder at the least, and a wider one, as for which encoding
dominates. Busy is the share of the time from the first clip's encoding to the last one's end in which the encoder computes.
Both ways take turns in one run; ratios are medians over rounds.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from benchmarks.decode import GRAIN
from benchmarks.paired import median_ratio, print_table
from finetune.data.cache import Cache, digest
from finetune.data.decode import decode
from finetune.data.sources import Source
from finetune.data.synthetic import Recording, record, scene
from finetune.data.video.probe import probe
from finetune.preparation.fill import Encoding, fill
from finetune.recipe import Bucket
from finetune.runtime import distributed
from finetune.runtime.logging import quietly

BUCKET, HEIGHT, WIDTH, FPS = Bucket(17, 128, 192), 512, 768, 25
WIDTHS = {"small": 4, "wide": 32}  # channels of the VAE's first level


class Timed:
    """A VAE's encoder of uint8 frames (F, H, W, 3), and the times at which it began and ended."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        widths = (width, 2 * width, 2 * width, 2 * width)
        self.vae = AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=widths,
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
        self.spans: list[tuple[float, float]] = []

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> dict[str, Tensor]:
        start = time.perf_counter()
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        mean = self.vae.encode(video).latent_dist.mean[0]
        self.spans.append((start, time.perf_counter()))
        return {"mean": mean}

    def busy(self) -> float:
        """The share of the time since it first began in which it was at work."""
        return sum(end - start for start, end in self.spans) / (self.spans[-1][1] - self.spans[0][0])


def make_clips(folder: Path, count: int) -> list[Path]:
    """Write clips with grain, which costs a decoder as much as camera noise would."""
    random = np.random.default_rng(0)
    for index in range(count):
        video, _ = scene(index, BUCKET.frames, HEIGHT, WIDTH)
        grain = random.integers(-GRAIN, GRAIN + 1, (BUCKET.frames, HEIGHT, WIDTH, 1))
        noisy = np.clip(video + grain, 0, 255).astype(np.uint8)
        record(noisy, folder / f"{index}.mp4", Recording(f"{index}.mp4", HEIGHT, WIDTH, BUCKET.frames, FPS))
    return sorted(folder.glob("*.mp4"))


def overlapped(work: list[Encoding], encode: Timed, cache: Cache, runtime: distributed.Runtime) -> None:
    """As a run fills its cache."""
    with quietly():
        assert fill(work, "video", lambda: encode, cache, runtime) == {}


def sequential(work: list[Encoding], encode: Timed, cache: Cache, runtime: distributed.Runtime) -> None:
    """One clip after the other."""
    for item in work:
        cache.write("video", item.key, encode(*(source.read() for source in item.sources)), item.note)


def measure(way: Callable[..., None], work: list[Encoding], width: int, folder: Path, runtime) -> tuple[float, float]:
    """(seconds, the encoder's share of them), into a cache of its own."""
    encode = Timed(width)
    start = time.perf_counter()
    way(work, encode, Cache(folder), runtime)
    seconds = time.perf_counter() - start
    assert len(encode.spans) == len(work)
    shutil.rmtree(folder)
    return seconds, encode.busy()


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each way")
    parser.add_argument("--clips", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runtime = distributed.start(timeout_seconds=600, on_cpu=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = [
            Encoding(
                "video", digest(clip.name), clip.name, (Source((), partial(decode, clip, probe(clip), BUCKET, FPS)),)
            )
            for clip in make_clips(folder, arguments.clips)
        ]
        for title, width in WIDTHS.items():
            found: dict[str, list[tuple[float, float]]] = {"overlapped": [], "sequential": []}
            for turn in range(arguments.rounds + 1):
                for way in (overlapped, sequential):
                    measured = measure(way, work, width, folder / "cache", runtime)
                    if turn:
                        found[way.__name__].append(measured)
            seconds = {way: [each for each, _ in both] for way, both in found.items()}
            busy = {way: statistics.median(share for _, share in both) for way, both in found.items()}
            faster = median_ratio(seconds["sequential"], seconds["overlapped"])
            per_clip = [statistics.median(each) / len(work) for each in seconds.values()]
            shares = [f"{each:.1%}" for each in busy.values()]
            rows.append([title, *(f"{each:.3f}" for each in per_clip), *shares, f"{faster:.2f}x"])
    print(f"{arguments.clips} H.264 clips of {HEIGHT}x{WIDTH} into {BUCKET}, one thread each, {os.cpu_count()} cores\n")
    head = ["VAE", "s/clip", "s/clip in turn", "encoder busy", "busy in turn", "faster"]
    print_table(head, rows)
    distributed.stop()


if __name__ == "__main__":
    main()
