"""Peak memory of the cases' steps as `plan` simulates it, in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from benchmarks.gpu.cases import CASES, recipe_with
from benchmarks.gpu.random_model import RandomCogVideoX, model_folder
from finetune.planning.gpus import Hardware
from finetune.planning.simulate import simulate
from finetune.recipe import Bucket
from finetune.runtime.device import PeakMemory
from finetune.runtime.gpus import known_gpu


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
    processes = max(1, min(len(asked), len(os.sched_getaffinity(0)) // 2))
    with ThreadPoolExecutor(processes) as pool:
        shares = pool.map(_in_a_process, [asked[index::processes] for index in range(processes)])
        return {each: peak for share in shares for each, peak in share.items()}


def _in_a_process(asked: Sequence[Asked]) -> dict[Asked, PeakMemory]:
    """Plan cases one after the other. torch keeps the simulated device registered, so no training may follow."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # a plan needs no GPU
    command = [sys.executable, "-m", "benchmarks.gpu.planned", json.dumps([astuple(each) for each in asked])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    peaks = map(json.loads, done.stdout.splitlines())
    return {each: PeakMemory(**peak) for each, peak in zip(asked, peaks, strict=False) if peak}


def plan(asked: Asked) -> PeakMemory:
    """The peak of a case's steps. Call it in a process in which nothing is trained."""
    gpu = known_gpu(asked.gpu)
    with tempfile.TemporaryDirectory() as folder:
        family = RandomCogVideoX(model_folder(Path(folder), asked.model))
        recipe = recipe_with(CASES[asked.title], asked.precision)
        return simulate(recipe, family, [asked.bucket], Hardware(1, capacity=asked.capacity, gpu=gpu)).step_peak


def main() -> None:
    """Print the peaks of the cases in the first argument, or null, a line each."""
    for model, title, bucket, *rest in json.loads(sys.argv[1]):
        try:
            peak = asdict(plan(Asked(model, title, Bucket(*bucket), *rest)))
        except Exception:  # the other plans are still wanted
            print(f"no plan of {model}, {title}:", traceback.format_exc(), file=sys.stderr, flush=True)
            peak = None
        print(json.dumps(peak), flush=True)


if __name__ == "__main__":
    main()
