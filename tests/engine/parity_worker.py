"""The same training in every way it can be spread: started once with one process and once with two, for the session.

Usage: [torchrun ... ] parity_worker.py RECIPE OUT        writes the figures of every configuration to OUT as JSON.
"""

import json
import sys
from pathlib import Path

from finetune.check import open_family
from finetune.job import Job, build
from finetune.prepare import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.logging import quiet_libraries

LORA = ["train.method=lora", "lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2"]
FULL = ["train.method=full", "optimizer.lr=1e-3"]
UNCHECKPOINTED = ["memory.activation_checkpointing=none"]
DROPOUT = ["lora.dropout=0.2"]

# name: (accumulation steps, measure the held-out loss between steps, overrides)
CONFIGURATIONS = {
    "lora": (1, False, LORA),
    "lora, accumulated": (2, False, LORA),
    "lora, not checkpointed": (1, False, LORA + UNCHECKPOINTED),
    "lora, dropout": (1, False, LORA + DROPOUT),
    "lora, dropout, validated": (1, True, LORA + DROPOUT),
    "lora, dropout, not checkpointed": (1, False, LORA + DROPOUT + UNCHECKPOINTED),
    "full": (1, False, FULL),
    "full, accumulated": (2, False, FULL),
    "full, not checkpointed": (1, False, FULL + UNCHECKPOINTED),
}


def figures(job: Job, validate: bool) -> dict[str, list[float]]:
    """Train to the recipe's last step; loss and gradient norm of each, held-out loss before and after."""
    batches = iter(job.batches(0))
    before = job.heldout_loss()
    steps = []
    for step in range(job.recipe.train.steps):
        steps.append(job.step(step, [next(batches) for _ in range(job.layout.accumulation)]))
        if validate:
            job.heldout_loss()
    after = job.heldout_loss()
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "heldout": [before.loss, after.loss],
        "heldout_zero": [before.zero_loss, after.zero_loss],
    }


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    results = {}
    for name, (accumulation, validate, overrides) in CONFIGURATIONS.items():
        micro = load_recipe(recipe_file).train.global_batch_size // (runtime.world_size * accumulation)
        recipe = load_recipe(recipe_file, [*overrides, f"train.micro_batch_size={micro}"])
        family = open_family(recipe)
        job = build(recipe, runtime, family, prepare(recipe, family, runtime))
        assert job.layout.accumulation == accumulation
        results[name] = figures(job, validate)
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[1], Path(sys.argv[2]), distributed.start(timeout_seconds=60))
    distributed.stop()
