"""The same training with every memory saver, by one process and by two.

Usage: [torchrun ... ] savers_worker.py OUT WHICH RECIPE...       WHICH is "all" or "some"; figures go to OUT as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from parity_worker import figures
from savers import METHODS, PLAIN, baseline, baseline_overrides, chosen, overrides

from finetune.checks.model import open_family
from finetune.checks.settings import check_recipe
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build


def main(recipe_files: list[str], which: str, out: Path, runtime: Runtime) -> None:
    results: dict[str, dict] = {}
    prepared = {}
    share = f"train.micro_batch_size={2 // runtime.world_size}"
    for file in recipe_files:
        family_name = Path(file).stem
        for method, of_method in METHODS.items():
            found = results.setdefault(family_name, {}).setdefault(method, {})
            runs = {name: overrides(name) for name in chosen(which, family_name, method, runtime.world_size)}
            if runtime.world_size == 1:
                names = [name for processes in (1, 2) for name in chosen(which, family_name, method, processes)]
                runs |= {f"as {name}": baseline_overrides(name) for name in sorted({*map(baseline, names)})}
            for name, settings in runs.items():
                torch._dynamo.reset()
                recipe = load_recipe(
                    file, [*of_method, *PLAIN, *settings, share, "train.steps=3", "schedule.warmup_steps=1"]
                )
                assert not check_recipe(recipe, runtime.world_size), name
                family = open_family(recipe)
                prepared.setdefault(file, prepare(recipe, family, runtime))
                job = build(recipe, runtime, family, prepared[file])
                if job.state.activations:
                    job.state.activations.smallest = 1  # tiny models save nothing that is worth a copy
                found[name] = figures(job, "first and last")
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[3:], sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
