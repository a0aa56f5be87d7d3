"""Peak memory of the cases' steps as `plan` simulates it, each in a process of its own, several at a time."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from benchmarks.gpu.cases import CASES, recipe_with
from benchmarks.gpu.random_model import RandomCogVideoX, model_folder
from finetune.planning.gpus import GPUS, Hardware
from finetune.planning.simulate import simulate
from finetune.recipe import Bucket
from finetune.runtime.device import PeakMemory


@dataclass(frozen=True)
class Asked:
    """A case whose memory is planned.

    Attributes:
        model: of `random_model.MODELS`.
        title: of `CASES`.
        gpu: the device's name.
        capacity: bytes of its memory that torch can have; None if it does not say.
    """

    model: str
    title: str
    bucket: Bucket
    precision: str
    gpu: str
    capacity: int | None


def planned(asked: Sequence[Asked]) -> dict[Asked, PeakMemory]:
    """The peak of each case's steps. Cases whose plan fails are told on standard error, and left out."""
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        found = dict(zip(asked, pool.map(_in_a_process, asked), strict=True))
    return {each: peak for each, peak in found.items() if peak is not None}


def _in_a_process(asked: Asked) -> PeakMemory | None:
    # torch keeps the simulated device registered; and a plan needs no GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.planned", json.dumps(astuple(asked))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"no plan of {asked.model}, {asked.title}: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def plan(asked: Asked) -> PeakMemory:
    """The peak of a case's steps. Call it in a process of its own."""
    names = [name for name in GPUS if name in asked.gpu]
    gpu = GPUS[max(names, key=len)] if names else None
    with tempfile.TemporaryDirectory() as folder:
        family = RandomCogVideoX(model_folder(Path(folder), asked.model))
        recipe = recipe_with(CASES[asked.title], asked.precision)
        return simulate(recipe, family, [asked.bucket], Hardware(1, capacity=asked.capacity, gpu=gpu)).step_peak


if __name__ == "__main__":
    model, title, bucket, *rest = json.loads(sys.argv[1])
    print(json.dumps(asdict(plan(Asked(model, title, Bucket(*bucket), *rest)))))
