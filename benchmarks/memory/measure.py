"""Measures on this machine's GPU, with random weights, the peak memory that `ours` predicts for a recipe."""

import dataclasses
import json
import sys
import time

from benchmarks.gpu.random_model import RandomCogVideoX
from benchmarks.memory.ours import BUCKET, Ours
from finetune.engine.step import run_step
from finetune.models.folder import ModelFolder
from finetune.models.published import CONFIGS
from finetune.planning.simulate import STEPS, example_batch
from finetune.runtime import distributed
from finetune.training.job import build_state


def measure(ours: Ours) -> dict[str, float]:
    """Peak bytes of loading and of as many steps as a plan simulates. Call it in a process of its own."""
    start = time.perf_counter()
    runtime = distributed.start(timeout_seconds=600)
    if runtime.device.is_cpu:
        raise SystemExit("there is no GPU here")
    recipe, family = ours.recipe(), RandomCogVideoX(ModelFolder(CONFIGS / ours.model))
    batch = example_batch(recipe, family, BUCKET)
    state = build_state(recipe, runtime, family, family.transformer_weights())
    for step in range(len(STEPS)):
        run_step(state, step, [batch])
    runtime.device.synchronize()
    figures = dataclasses.asdict(runtime.device.memory()) | {"gpu": runtime.device.name}
    distributed.stop()
    return figures | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(measure(Ours.parse(sys.argv[1]))))
