"""The same training in every way it can be spread: started once with one process and once with two, for the session.

Usage: [torchrun ... ] parity_worker.py OUT RECIPE        writes the figures of every configuration to OUT as JSON.
"""

import json
import sys
from pathlib import Path

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

LORA = ["train.method=lora", "lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2"]
FULL = ["train.method=full", "optimizer.lr=1e-3"]
UNCHECKPOINTED = ["memory.activation_checkpointing=none"]
DROPOUT = ["lora.dropout=0.2"]
GUIDED = ["objective.guidance_target=3", "objective.loss=huber", "objective.sigma_table=[1, 3, 2]"]

# name: (accumulation steps, when the held-out loss is measured, overrides)
CONFIGURATIONS = {
    "lora": (1, "first and last", LORA),
    "lora, accumulated": (2, "first and last", LORA),
    "lora, not checkpointed": (1, "never", LORA + UNCHECKPOINTED),
    "lora, guided": (2, "first and last", LORA + GUIDED),
    "lora, dropout": (1, "never", LORA + DROPOUT),
    "lora, dropout, validated": (1, "now and then", LORA + DROPOUT),
    "lora, dropout, not checkpointed": (1, "never", LORA + DROPOUT + UNCHECKPOINTED),
    "full": (1, "first and last", FULL),
    "full, accumulated": (2, "first and last", FULL),
    "full, not checkpointed": (1, "never", FULL + UNCHECKPOINTED),
}


def figures(job: Job, validate: str) -> dict[str, list[float]]:
    """Train to the recipe's last step: loss and gradient norm of each step, and the held-out losses."""
    total = job.recipe.train.steps
    measured = {"never": (), "first and last": (0, total), "now and then": range(0, total + 1, 3)}[validate]
    batches = iter(job.batches(0))
    steps, heldout = [], []
    for step in range(total + 1):
        if step in measured:
            heldout.append(job.heldout_loss())
        if step < total:
            steps.append(job.step(step, [next(batches) for _ in range(job.split.accumulation)]))
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "heldout": [figure.loss for figure in heldout],
        "heldout_zero": [figure.zero_loss for figure in heldout],
    }


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    results = {}
    for name, (accumulation, validate, overrides) in CONFIGURATIONS.items():
        micro = load_recipe(recipe_file).train.global_batch_size // (runtime.world_size * accumulation)
        recipe = load_recipe(recipe_file, [*overrides, f"train.micro_batch_size={micro}"])
        family = open_family(recipe)
        job = build(recipe, runtime, family, prepare(recipe, family, runtime))
        assert job.split.accumulation == accumulation
        results[name] = figures(job, validate)
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
