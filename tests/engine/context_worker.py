"""A training whose processes all share their samples, as the ranks of one context.

Usage: [torchrun ... ] context_worker.py OUT RECIPE       writes the figures of each rank, by rank, to OUT as JSON.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_leaves

from finetune.checks.model import open_family
from finetune.models.family import Batch
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build
from finetune.training.samples import validation_samples


def digest(batch: Batch) -> str:
    tensors = [leaf for leaf in tree_leaves((batch.inputs, batch.terms)) if isinstance(leaf, Tensor)]
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    recipe = load_recipe(recipe_file, [f"output={out.parent / f'run-{runtime.world_size}'}"])
    family = open_family(recipe)
    job = build(recipe, runtime, family, prepare(recipe, family, runtime))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    job.state.transformer.register_forward_pre_hook(count)
    batches = job.micro_batches()
    accumulation = job.split.accumulation
    first = [batches[turn] for turn in range(accumulation)]
    steps = [job.step(0, first)]
    steps += [job.step(step, [batches[step * accumulation + turn] for turn in range(accumulation)]) for step in (1, 2)]
    before = calls
    heldout = job.heldout_loss()
    after_heldout = calls
    samples = validation_samples(job, 3)
    figures = {
        "batches": [digest(batch) for batch in first],
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "heldout": [heldout.loss, heldout.zero_loss] if heldout else [],
        "heldout calls": after_heldout - before,
        "sampling calls": calls - after_heldout,
        "videos": [path.name for _, path in samples.videos] if samples else [],
        "sheet": str(samples.sheet) if samples else "",
    }
    job.save(3)
    resumed = build(recipe, runtime, family, job.prepared)
    figures["resumed"] = resumed.resume()
    figures["resumed heldout"] = [resumed.heldout_loss() == heldout]
    everybody = runtime.gather(figures)
    if runtime.is_main:
        out.write_text(json.dumps(everybody, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    started = distributed.start(timeout_seconds=60)
    main(sys.argv[2], Path(sys.argv[1]), replace(started, context_size=started.world_size))
    distributed.stop()
    leave(0)
