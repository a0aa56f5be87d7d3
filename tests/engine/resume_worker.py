"""Every optimizer broken off and resumed, on any number of processes: the same steps as without a break?

Usage: [torchrun ... ] resume_worker.py OUT RECIPE        writes the steps of both runs, by optimizer, to OUT as JSON.
"""

import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

NAMES = ("adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8")


def steps(job: Job, first: int, last: int) -> list[dict]:
    return [asdict(job.step(step, [job.micro_batches()[step]])) for step in range(first, last)]


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    found = {}
    for name, weights in product(NAMES, ("float32", "bf16")):
        overrides = [f"optimizer.name={name}", f"train.weights={weights}", "train.method=full", "optimizer.lr=1e-3"]
        overrides += [f"output={out.parent / f'{name} {weights} {runtime.world_size}'}", "train.micro_batch_size=1"]
        recipe = load_recipe(recipe_file, [*overrides, f"train.global_batch_size={runtime.world_size}"])
        family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        straight, broken = (build(recipe, runtime, family, prepared) for _ in range(2))
        expected = steps(straight, 0, 4)[2:]
        steps(broken, 0, 2)
        broken.save(2)
        resumed = build(recipe, runtime, family, prepared)
        assert resumed.resume() == 2
        found[f"{name} {weights}"] = [expected, steps(resumed, 2, 4)]
    if runtime.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
