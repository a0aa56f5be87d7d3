"""Each adapter on each kind of frozen weights, by one process and by two: trained, exported, and read back.

Usage: [torchrun ... ] adapters_worker.py OUT WHICH RECIPE...       WHICH is "all" or "some"; figures go to OUT as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from exports import export_weights
from safetensors.torch import load_file

from finetune.checks.model import open_family
from finetune.checks.settings import check_recipe
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

LORA = ["lora.rank=4", "lora.alpha=8", 'lora.ranks={"to_k" = 3}']  # of which rows do not divide by two
ADAPTERS = {
    "lora": LORA,
    "rslora": [*LORA, "lora.rslora=true"],
    "plus": [*LORA, "lora.plus_ratio=4"],
    "dora": [*LORA, "lora.dora=true"],
    "dora, rslora, plus": [*LORA, "lora.dora=true", "lora.rslora=true", "lora.plus_ratio=4"],
    "partial": ["train.method=partial", "partial.modules=norm,to_k,*.bias"],
}
BASES = {
    "sharded": ["memory.layout=shard"],
    "zero2": ["memory.layout=zero2"],
    "replicated": ["memory.layout=replicate"],
    "offloaded": ["memory.layout=shard", "memory.offload=true"],
    "streamed": ["memory.layout=replicate", "memory.offload=true"],
    "int8": ["memory.layout=shard", "memory.low_bit=int8"],
    "nf4": ["memory.layout=shard", "memory.low_bit=nf4"],
    "nf4, streamed": ["memory.layout=replicate", "memory.low_bit=nf4", "memory.offload=true"],
}
SOME = [
    ("dora, rslora, plus", "sharded"),
    ("dora, rslora, plus", "nf4, streamed"),
    ("partial", "int8"),
    ("partial", "streamed"),
]


def combinations(which: str) -> list[tuple[str, str]]:
    """(adapter, base) of a suite."""
    return SOME if which == "some" else [(adapter, base) for adapter in ADAPTERS for base in BASES]


# A constant that is added to every key changes no attention: this bias' true gradient is zero where no rotary embedding
# follows it, and AdamW's first steps scale what rounding leaves of it.
ROUNDING = "norm_k.bias"


def figures(job: Job, folder: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of four steps, and the length of each exported tensor, by its name's order.

    Left out: a bias of keys whose gradient is rounding alone.
    """
    results = [job.step(number, [job.micro_batches()[number]]) for number in range(4)]
    export_weights(job.state, job.recipe.train.method, folder)
    exported = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    compared = sorted(name for name in exported if not name.endswith(ROUNDING))
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "exported": [float(torch.linalg.vector_norm(exported[name].double())) for name in compared],
    }


def main(recipe_files: list[str], which: str, out: Path, runtime: Runtime) -> None:
    results: dict[str, dict] = {}
    for file in recipe_files:
        for adapter, base in combinations(which):
            share = f"train.micro_batch_size={2 // runtime.world_size}"
            recipe = load_recipe(
                file,
                [
                    *ADAPTERS[adapter],
                    *BASES[base],
                    share,
                    "schedule.warmup_steps=0",
                    "optimizer.lr=1e-3",
                    "optimizer.eps=1e-3",
                ],
            )
            assert not check_recipe(recipe, runtime.world_size), (adapter, base)
            family = open_family(recipe)
            job = build(recipe, runtime, family, prepare(recipe, family, runtime))
            folder = out.parent / f"{Path(file).stem} {adapter} {base} {runtime.world_size}"
            results.setdefault(Path(file).stem, {})[f"{adapter} on {base}"] = figures(job, folder)
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[3:], sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
