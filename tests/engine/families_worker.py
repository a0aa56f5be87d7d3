"""The same training of every family, by one process and by two: started once each, for the session.

Usage: [torchrun ... ] families_worker.py OUT RECIPE...       writes each recipe's figures to OUT as JSON, by its name.
"""

import json
import sys
from pathlib import Path

from parity_worker import figures

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build

METHODS = {
    "lora": ["lora.rank=4", "lora.alpha=8"],
    "full": ["train.method=full", "optimizer.lr=1e-3"],
}
# One process keeps activations, two recompute them: neither may show.
SPREAD = {1: ["memory.activation_checkpointing=none"], 2: ["memory.activation_checkpointing=full"]}


def main(recipe_files: list[str], out: Path, runtime: Runtime) -> None:
    results: dict[str, dict] = {}
    for file in recipe_files:
        for method, overrides in METHODS.items():
            share = f"train.micro_batch_size={2 // runtime.world_size}"
            recipe = load_recipe(file, [*overrides, *SPREAD[runtime.world_size], share])
            family = open_family(recipe)
            job = build(recipe, runtime, family, prepare(recipe, family, runtime))
            assert job.split.accumulation == 1
            results.setdefault(Path(file).stem, {})[method] = figures(job, "first and last")
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2:], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
