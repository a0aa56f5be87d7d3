"""Whether ranks that hold the same part of the weights hold the same bits of it after some updates.

Usage: torchrun ... replicas_worker.py OUT RECIPE       writes what differs between replicas to OUT as JSON.
"""

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

from finetune.checks.model import open_family
from finetune.engine.gradients import local, part_of
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8")
LAYOUTS = {
    2: ["memory.layout=replicate"],
    4: ["memory.layout=replicate", "memory.layout=hybrid memory.shard_size=2"],
}
IN_BACKWARD = "optimizer.in_backward=true train.max_grad_norm=none"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def differing(job: Job, runtime: Runtime) -> list[str]:
    """Names of the parameters whose replicas differ."""
    transformer = job.state.transformer
    mine = {name: (part_of(p), digest(local(p))) for name, p in transformer.named_parameters() if p.requires_grad}
    found = defaultdict(set)
    for share in runtime.gather(mine):
        for name, (part, bits) in share.items():
            found[name, part].add(bits)
    assert len({part for _, part in found}) == runtime.world_size // distinct(job, runtime)
    return sorted({name for (name, _), bits in found.items() if len(bits) > 1})


def distinct(job: Job, runtime: Runtime) -> int:
    """How many ranks hold the same part."""
    parts = runtime.gather(part_of(job.state.parameters[0]))
    return runtime.world_size // len(set(parts))


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    found = {}
    for layout in LAYOUTS[runtime.world_size]:
        for optimizer in OPTIMIZERS:
            for more in ("", IN_BACKWARD):
                name = f"optimizer.name={optimizer} {layout} {more}".strip()
                settings = ["train.method=full", "train.weights=bf16", "train.precision=bf16", *name.split()]
                recipe = load_recipe(recipe_file, [*settings, "optimizer.lr=1e-3", "train.micro_batch_size=1"])
                family = open_family(recipe)
                job = build(recipe, runtime, family, prepare(recipe, family, runtime))
                batches = iter(job.batches(0))
                for step in range(3):
                    job.step(step, [next(batches) for _ in range(job.split.accumulation)])
                found[name] = differing(job, runtime)
    if runtime.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
