"""One of two ranks that fill a cache together, for test_fill.py. What happened to this one is written as JSON."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from finetune.data.cache import Cache, digest
from finetune.data.file_facts import content_hash
from finetune.data.sources import Source
from finetune.preparation import facts
from finetune.preparation.fill import Encoding, fill
from finetune.runtime import distributed
from finetune.runtime.errors import UserError
from finetune.runtime.watch import Watch

COUNT = 12  # items
TIMEOUT = 4.0  # seconds that a collective may take in the last scenarios

out, cache = Path(sys.argv[1]), Cache(Path(sys.argv[2]))
runtime = distributed.start(60, on_cpu=True)
is_second = runtime.rank == 1
figures: dict[str, dict] = {}


def written(scenario: str) -> int:
    return sum(cache.path("video", digest(scenario, number)).exists() for number in range(COUNT))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(scenario: str, encode_second: Callable[[int], None]) -> None:
    """Fill the cache with items of a scenario; `encode_second` is what rank 1 does when it encodes one."""
    seen: list[int] = []

    def encode(number: int) -> dict[str, torch.Tensor]:
        seen.append(number)
        if is_second:
            encode_second(number)
        return {"mean": torch.tensor([float(number)])}

    work = [
        Encoding("video", digest(scenario, number), f"clip {number}", (Source((), lambda number=number: number),))
        for number in range(COUNT)
    ]
    try:
        failed = fill(work, "video", lambda: encode, cache, runtime)
        error = str({key[:4]: [str(each) for each in problems] for key, problems in failed.items()})
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    figures[scenario] = {"seen": seen, "error": error, "written": written(scenario)}
    out.with_suffix(f".{runtime.rank}.json").write_text(json.dumps(figures))


def wait_for_the_first(number: int) -> None:
    until(lambda: written("one is slow") >= COUNT - 2)  # all but this one, and the one that is read ahead


def fail(error: Exception) -> Callable[[int], None]:
    def encode(number: int) -> None:
        raise error

    return encode


def refuse(number: int) -> None:
    raise UserError("the sound is empty", "remove it", f"clip {number}")


def take_longer_than_the_timeout(number: int) -> None:
    time.sleep(2 * TIMEOUT if number == 1 else 0)


def inspect_files_of_a_slow_disk() -> None:
    """Find the hashes of files, of which one takes rank 1 longer than ranks wait for each other."""
    files = [out.with_name(f"file_{number}") for number in range(COUNT)]
    for file in files:
        file.write_text(file.name)
    seen: list[str] = []

    def slow_hash(path: Path) -> str:
        seen.append(path.name)
        time.sleep(2 * TIMEOUT if is_second and len(seen) == 1 else 0)
        return content_hash(path)

    facts.content_hash = slow_hash
    try:
        table = facts.read_facts(dict.fromkeys(files, "file"), Cache(out.with_name(f"cache_{runtime.rank}")), runtime)
        error = str([table.hash(file) == content_hash(file) for file in files].count(True))
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    figures["slow disk"] = {"seen": seen, "error": error}
    out.with_suffix(f".{runtime.rank}.json").write_text(json.dumps(figures))


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


run("one is slow", wait_for_the_first)
run("bad clips", refuse)
run("disk is full", lambda number: fail(OSError(28, "No space left on device"))(number))
run("out of memory", fail(torch.OutOfMemoryError("CUDA out of memory")))
short = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
runtime = replace(runtime, control=short, watch=Watch(runtime.rank, 2, "short", 4 * TIMEOUT))
run("longer than the timeout", take_longer_than_the_timeout)
inspect_files_of_a_slow_disk()
run("killed", die)
os._exit(0)
