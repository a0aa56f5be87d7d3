"""Trainings with a part from outside, the average of tests/engine/average.py, on any number of processes.

Usage: [torchrun ... ] parts_worker.py OUT RECIPE        writes the figures of every configuration to OUT as JSON.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from average import DECAY, Average
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from finetune.checks.model import open_family
from finetune.models.family import Family
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

CONFIGURATIONS = {
    "lora": ["lora.rank=4", "optimizer.lr=1e-2"],
    "full": ["train.method=full", "optimizer.lr=1e-3"],
    "full, zero2": ["train.method=full", "optimizer.lr=1e-3", "memory.layout=zero2"],
}
STEPS, BREAK = 5, 2


def with_average(job: Job) -> tuple[Job, Average]:
    average = Average(job.state.transformer)
    job.state.parts.append(average)
    return job, average


def step(job: Job, number: int) -> dict:
    batches = job.micro_batches()
    first = number * job.split.accumulation
    return asdict(job.step(number, [batches[first + turn] for turn in range(job.split.accumulation)]))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of sharded tensors, from all ranks."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = sorted(whole(tensors).items())
    return hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in found)).hexdigest()


def averaged(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> dict:
    """The run that is never interrupted, measured on held-out clips each step, beside one without the part."""
    plain = build(recipe, runtime, family, prepared)
    job, average = with_average(build(recipe, runtime, family, prepared))
    oracle = whole(average.parameters)
    follow = get_ema_multi_avg_fn(DECAY)
    figures: dict = {"steps": [], "plain steps": [step(plain, number) for number in range(STEPS)]}
    for number in range(STEPS):
        figures["steps"].append(step(job, number))
        now = whole(average.parameters)
        follow(list(oracle.values()), list(now.values()), number)
        before = digest(average.parameters)
        heldout = job.heldout_loss()
        figures.setdefault("changed by evaluation", []).append(before != digest(average.parameters))
    figures["average"], figures["oracle"] = digest(average.values), digest(oracle)
    figures["weights"] = digest(average.parameters)

    # The same measured without the part, of weights and then of the average in their place.
    figures["heldout"], figures["heldout of weights"] = asdict(heldout), asdict(plain.heldout_loss())
    Average(plain.state.transformer)._put(average.values)
    figures["heldout of average"] = asdict(plain.heldout_loss())

    # A step that makes no update.
    batches = [job.micro_batches()[STEPS * job.split.accumulation + turn] for turn in range(job.split.accumulation)]
    batches[0].only.target.fill_(math.inf)
    figures["refused"] = not job.step(STEPS, batches).updated
    figures["updates"], figures["average after refusal"] = average.updates, digest(average.values)
    return figures


def interrupted(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> dict:
    """The run saved at a step, and gone on from there: with the part, and without it."""
    job, average = with_average(build(recipe, runtime, family, prepared))
    first = [step(job, number) for number in range(BREAK)]
    job.save(BREAK)
    resumed, restored = with_average(build(recipe, runtime, family, prepared))
    figures: dict = {"resumed at": resumed.resume(), "saved average": digest(average.values)}
    figures["restored average"], figures["restored updates"] = digest(restored.values), restored.updates
    figures["steps"] = first + [step(resumed, number) for number in range(BREAK, STEPS)]
    figures["average"] = digest(restored.values)
    figures["resumed without it at"] = build(recipe, runtime, family, prepared).resume()
    return figures


def missing(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> list[str]:
    """What each rank is told that resumes with the part from a checkpoint without it."""
    job = build(recipe, runtime, family, prepared)
    step(job, 0)
    job.save(1)
    resumed, _ = with_average(build(recipe, runtime, family, prepared))
    try:
        return runtime.gather(f"resumed at {resumed.resume()}")
    except UserError as error:
        return runtime.gather(str(error))


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    found = {}
    for name, overrides in CONFIGURATIONS.items():
        folder = out.parent / f"{name} {runtime.world_size}"
        overrides = [*overrides, f"train.micro_batch_size={4 // runtime.world_size}", "train.global_batch_size=4"]
        recipe = load_recipe(recipe_file, [*overrides, f"output={folder}"])
        other = load_recipe(recipe_file, [*overrides, f"output={folder} without"])
        family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        found[name] = {
            "straight": averaged(recipe, runtime, family, prepared),
            "interrupted": interrupted(recipe, runtime, family, prepared),
            "missing": missing(other, runtime, family, prepared),
        }
    if runtime.is_main:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
