"""What data costs once it is encoded: the start of a training with a warm cache, and the steps' wait for the loader.

`python -m benchmarks.loading [--clips 3000] [--steps 100]`. The start: so many clips, all different files, are encoded once by the
demo's LTX pipeline; then a new process looks at them again and finds all in the cache, and its processor time is printed, from
`prepare` to the order of samples, and with all imports. The wait: steps that sleep 50 ms take batches of 49x512x768 from a loader
with two processes; printed is the share of the time that they wait for a batch.
"""

import argparse
import resource
import struct
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from finetune.checks.model import open_family
from finetune.data.loader import BatchSplit, Dropout, MicroBatches, open_loader
from finetune.data.synthetic import RECORDINGS, Recording, record, scene
from finetune.models import family_class
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime import distributed
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import order_of

LARGE = "49x512x768"
SLEEP = 0.05  # seconds of a step
LARGE_CLIPS = 4


def write_recipe(folder: Path, data: Path, bucket: str) -> Path:
    """A recipe of the demo's pipeline on some clips."""
    path = folder / f"{data.name}.toml"
    path.write_text(
        f'output = "{folder / "run"}"\n[model]\nfamily = "ltx"\npath = "{folder / "model"}"\n'
        f'[data]\npath = "{data}"\nbuckets = ["{bucket}"]\ncache = "{folder / "cache"}"\n'
        '[train]\nglobal_batch_size = 1\nprecision = "float32"\n'
    )
    return path


def write_different(folder: Path, count: int) -> None:
    """So many clips that are different files, by a box of free space at their ends, with captions."""
    folder.mkdir()
    recording = RECORDINGS[1]
    frames, caption = scene(0, recording.frames, recording.height, recording.width)
    video = folder.parent / recording.name
    record(frames, video, recording)
    data = video.read_bytes()
    for number in range(count):
        (folder / f"{number:05}.mp4").write_bytes(data + struct.pack(">I4sI", 12, b"free", number))
        (folder / f"{number:05}.txt").write_text(f"{caption} {number % 100}")


def write_large(folder: Path) -> None:
    """Clips that fill the large bucket."""
    folder.mkdir()
    for number in range(LARGE_CLIPS):
        recording = Recording(f"{number}.mp4", 512, 768, 49, 25)
        frames, caption = scene(number, recording.frames, recording.height, recording.width)
        record(frames, folder / recording.name, recording)
        (folder / f"{number}.txt").write_text(caption)


def processor_time() -> float:
    """Seconds of this process, since it began."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def start(file: Path) -> None:
    """Prepare a recipe and plan its first step; print what that took of the processor."""
    quiet_libraries()
    runtime, recipe = distributed.start(60), load_recipe(file)
    family = open_family(recipe)
    before = processor_time()
    prepared = prepare(recipe, family, runtime)
    order_of(recipe, prepared).plan(0)
    print(f"start: {len(prepared.train)} clips, {processor_time() - before:.2f} s of the processor, "
          f"{processor_time():.2f} s with imports and the model's files", flush=True)  # fmt: skip
    distributed.stop()


def wait(recipe: Recipe, steps: int) -> None:
    """Take batches between sleeps; print the share of the waiting."""
    runtime, family = distributed.start(60), open_family(recipe)
    prepared = prepare(recipe, family, runtime)
    assemble = partial(family.batch, objective=family.training_objective(recipe.objective))
    split, dropout = BatchSplit(0, 1, 1, 1), Dropout(0.0, 0.0, prepared.unconditional_key)
    batches = MicroBatches(prepared.train, order_of(recipe, prepared), split, prepared.cache, assemble, 42, dropout)
    loader = open_loader(batches, 0, steps + 1, workers=2, pin_memory=False)
    next(loader)  # the processes have started
    waited, begun = 0.0, time.perf_counter()
    for _ in range(steps):
        time.sleep(SLEEP)
        asked = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - asked
    print(f"loader: {100 * waited / (time.perf_counter() - begun):.2f} % of {steps} steps is waiting")
    distributed.stop()


def main() -> None:
    """Make the clips, encode them once in a process of its own, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start)
        return
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        family_class("ltx").tiny(folder / "model")
        write_different(folder / "small", arguments.clips)
        write_large(folder / "large")
        small = write_recipe(folder, folder / "small", "9x64x96")
        for _ in ("cold", "warm"):
            subprocess.run([sys.executable, "-m", "benchmarks.loading", "--start", small], check=True)
        wait(load_recipe(write_recipe(folder, folder / "large", LARGE)), arguments.steps)


if __name__ == "__main__":
    main()
