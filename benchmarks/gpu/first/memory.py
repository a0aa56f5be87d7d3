"""The peak memory of CogVideoX-2b's steps, measured beside planned, with the recipes of the cases that are measured."""

import gc
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu.cases import BUCKET, CASES, CHECKPOINTED, recipe_with
from benchmarks.gpu.first.bench import Bench, Failed
from benchmarks.gpu.measure import SMOKE_BUCKET, measure
from benchmarks.gpu.planned import Asked, planned
from benchmarks.gpu.random_model import RandomCogVideoX, model_folder, random_batch
from finetune.engine.precision import DTYPES
from finetune.runtime.device import PeakMemory
from finetune.runtime.units import GIB

TITLES = (
    CHECKPOINTED,
    "streamed, activations offloaded",
    "selective",
    "nf4",
    "full finetuning, bf16, 8 bits",
)
LIMIT = 0.1  # of what was measured
STEPS = 1  # after two that are not counted; later steps take what the third takes


def memory(bench: Bench) -> str:
    """Five cases; plans are made while the device works."""
    model, bucket, precision = ("smoke", SMOKE_BUCKET, "float32") if bench.smoke else ("2b", BUCKET, "bf16")
    device = bench.device
    asked = [Asked(model, title, bucket, precision, device.name, device.available_memory) for title in TITLES]
    with ThreadPoolExecutor(1) as pool:
        planning = pool.submit(planned, asked)
        found = {each: _measured(bench, each) for each in asked}
        plans = planning.result()
    if missing := [each.title for each in asked if each not in plans]:
        raise Failed(f"no plan of {', '.join(missing)}")
    return _compared(bench, found, plans)


def _measured(bench: Bench, asked: Asked) -> PeakMemory | None:
    """The peak of a case's steps; None if there is too little memory."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        family = RandomCogVideoX(model_folder(Path(folder), asked.model))
        recipe = recipe_with(CASES[asked.title], asked.precision)
        batch = random_batch(family, recipe, asked.bucket, DTYPES[asked.precision])
        try:
            return measure(family, recipe, batch, bench.runtime, STEPS)[1]
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            bench.device.empty_cache()


def _compared(bench: Bench, found: dict[Asked, PeakMemory | None], plans: dict[Asked, PeakMemory]) -> str:
    """A line on all cases. Raises Failed if a plan is off by more than the limit."""
    wrong, errors = [], []
    for asked, taken in found.items():
        plan = plans[asked]
        told = f"{asked.title}: planned {_gib(plan.allocated)} GiB allocated, {_gib(plan.reserved)} reserved"
        if bench.device.is_cpu:
            bench.notes.append(told)
            continue
        if taken is None:
            bench.notes.append(f"{told}; out of memory")
            if plan.reserved <= (1 - LIMIT) * (asked.capacity or 0):
                wrong.append(f"{asked.title} does not fit, and was planned to")
            continue
        off = {name: getattr(plan, name) / getattr(taken, name) - 1 for name in ("allocated", "reserved")}
        errors += off.values()
        bench.notes.append(
            f"{told}; measured {_gib(taken.allocated)} ({off['allocated']:+.1%}) and {_gib(taken.reserved)} "
            f"({off['reserved']:+.1%})"
        )
        wrong += [
            f"{asked.title}: the plan of memory {name} is {error:+.1%} off"
            for name, error in off.items()
            if abs(error) > LIMIT
        ]
    if wrong:
        raise Failed("; ".join(wrong))
    if bench.device.is_cpu:
        return f"{len(found)} cases are planned and trained; a CPU has no such memory to measure"
    return f"plans of {len(found)} cases are at most {max(map(abs, errors), default=0):.1%} off"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
