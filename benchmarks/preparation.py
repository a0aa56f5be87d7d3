"""How busy the encoder is while a cache is filled, and the speed over reading, encoding and writing one after the other.

`python -m benchmarks.preparation [--rounds N] [--clips N] [--threads N] [--decoder-threads N]`. Real H.264 clips are decoded, and
real VAEs of random weights encode them: a small one, for which decoding dominates, and a wider one, for which encoding does. Busy
is the share of the time from the first clip's encoding to the last one's end in which the encoder computes. Both ways take turns
in one run; ratios are medians over rounds. Objects that imports have made are left out of garbage collection, as the commands
do: `fill` ends with one, which would cost as much as two clips.

Processor seconds hold on a machine with other work; the rest does as long as others leave this process its cores: their share
of all cores is the last column.
"""

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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


class Measured(NamedTuple):
    """Seconds, processor seconds, the encoder's share of the time, and other processes' share of all cores."""

    seconds: float
    processor: float
    busy: float
    others: float


def used_by_all() -> float:
    """Processor seconds that all processes have used since the machine started (Linux)."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(rest[:2])) / os.sysconf("SC_CLK_TCK")


def measure(way: Callable[..., None], work: list[Encoding], width: int, folder: Path, runtime) -> Measured:
    """Fill a cache of its own."""
    encode = Timed(width)
    gc.collect()
    everybody, own, start = used_by_all(), time.process_time(), time.perf_counter()
    way(work, encode, Cache(folder), runtime)
    seconds, own, everybody = time.perf_counter() - start, time.process_time() - own, used_by_all() - everybody
    assert len(encode.spans) == len(work)
    shutil.rmtree(folder)
    others = max(0.0, everybody - own) / (seconds * (os.cpu_count() or 1))
    return Measured(seconds, own, encode.busy(), others)


def row(title: str, found: dict[str, list[Measured]], clips: int) -> list[object]:
    """A row of the table."""
    over, turn = found["overlapped"], found["sequential"]
    median = statistics.median
    per_clip = [f"{median(each.seconds for each in way) / clips:.3f}" for way in (over, turn)]
    busy = [f"{median(each.busy for each in way):.1%}" for way in (over, turn)]
    faster = median_ratio([each.seconds for each in turn], [each.seconds for each in over])
    processor = median_ratio([each.processor for each in over], [each.processor for each in turn])
    others = median(each.others for each in (*over, *turn))
    return [title, *per_clip, *busy, f"{faster:.2f}x", f"{processor:.2f}x", f"{others:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each way")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the encoder")
    parser.add_argument("--decoder-threads", type=int, default=0, help="0, as in a run: FFmpeg's choice")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gc.collect()
    gc.freeze()
    runtime = distributed.start(timeout_seconds=600, on_cpu=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = []
        for clip in make_clips(folder, arguments.clips):
            read = partial(decode, clip, probe(clip), BUCKET, FPS, threads=arguments.decoder_threads)
            work.append(Encoding("video", digest(clip.name), clip.name, (Source((), read),)))
        for title, width in WIDTHS.items():
            found: dict[str, list[Measured]] = {"overlapped": [], "sequential": []}
            for turn in range(arguments.rounds + 1):
                for way in (overlapped, sequential):
                    measured = measure(way, work, width, folder / "cache", runtime)
                    if turn:
                        found[way.__name__].append(measured)
            rows.append(row(title, found, len(work)))
    decoder = arguments.decoder_threads or "FFmpeg's choice"
    print(f"{arguments.clips} H.264 clips of {HEIGHT}x{WIDTH} into {BUCKET}, {os.cpu_count()} cores;")
    print(f"threads of the encoder: {arguments.threads}, of the decoder: {decoder}\n")
    head = ["VAE", "s/clip", "s/clip in turn", "encoder busy", "busy in turn", "faster", "processor", "others"]
    print_table(head, rows)
    distributed.stop()


if __name__ == "__main__":
    main()
