"""Samples of a model with two transformers, in number and length different from rank to rank.

Usage: [torchrun ...] companion_worker.py OUT RECIPE     writes figures to OUT as JSON, and the videos beside it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experts import step, training_state, with_companion

from finetune.checks.model import open_family
from finetune.engine.generate import Request, generate
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build
from finetune.training.samples import request_of

CONFIGURATIONS = {
    "lora, sharded": ["memory.layout=shard"],
    "lora, replicated": ["memory.layout=replicate"],
    "full, sharded": ["train.method=full", "optimizer.lr=1e-3"],
}
STOPS = (0, 2, 5, 12)  # calls after which one rank stops


def requests_of(job: Job) -> list[tuple[int, Request]]:
    """This rank's share of the prompts, with their indices."""
    requests = [request_of(job, prompt, 0) for prompt in job.prepared.prompts]
    data = job.state.runtime.data
    return list(enumerate(requests))[data.rank :: data.size]


def sample(
    job: Job, done: Callable[[int, np.ndarray], None], stop: Callable[[], bool] = lambda: False, count: int = 3
) -> bool:
    mine = [(index, request) for index, request in requests_of(job) if index < count]
    return generate(
        job.state,
        [request for _, request in mine],
        job.idle_batch(),
        False,
        torch.float32,
        lambda turn, frames: done(mine[turn][0], frames),
        stop,
    )


def stopped(job: Job, calls: int) -> dict[str, bool]:
    """What becomes of samples when the last rank stops them after some calls."""
    last = job.state.runtime.rank == job.state.runtime.world_size - 1
    votes = iter([False] * calls + [last] * 100)
    made = sample(job, lambda *_: None, lambda: next(votes))
    return {"made": made, "companion": job.state.companion.is_on_device}


def unwritable(job: Job) -> dict[str, Any]:
    """What becomes of them when the second prompt's video cannot be written."""
    made, error = [], "none"

    def write(index: int, frames: np.ndarray) -> None:
        if index == 1:
            raise UserError("no room", "make some", "the disk")
        made.append(index)

    try:
        sample(job, write)
    except UserError as caught:
        error = caught.problems[0].what
    return {"error": error, "made": len(made), "companion": job.state.companion.is_on_device}


def figures(make: Callable[[], Job], runtime: Runtime, save: Callable[[int, np.ndarray], None]) -> dict[str, Any]:
    job, plain = make(), make()
    companion = with_companion(job)
    steps, expected = [step(job, 0)], [step(plain, 0)]
    before = training_state(job)
    sample(job, lambda *_: None, count=1)  # the second rank has none
    found: dict[str, Any] = {"stopped by one rank": {calls: runtime.gather(stopped(job, calls)) for calls in STOPS}}
    found["unwritable"] = runtime.gather(unwritable(job)) if runtime.world_size > 1 else None
    found["unchanged"] = runtime.gather(training_state(job) == before)
    for number in (1, 2):
        steps.append(step(job, number))
        expected.append(step(plain, number))
    found |= {"steps": steps, "steps without samples": expected}
    found["as without samples"] = runtime.gather(training_state(job) == training_state(plain))
    pristine = make()
    companion = with_companion(pristine)
    assert sample(pristine, save)
    return found | {"swaps": runtime.gather(companion.swaps)}


def main(out: Path, recipe_file: str, runtime: Runtime) -> None:
    found = {}
    for name, overrides in CONFIGURATIONS.items():
        recipe = load_recipe(recipe_file, [*overrides, f"output={out.parent / name}"])
        family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        found[name] = figures(
            lambda recipe=recipe, family=family, prepared=prepared: build(recipe, runtime, family, prepared),
            runtime,
            lambda index, frames, name=name: np.save(out.parent / f"{name}-{index}.npy", frames),
        )
    if runtime.is_main:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2], distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
