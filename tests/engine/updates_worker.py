"""Weights after clipped, accumulated updates: made on the device, and in host memory.

Usage: [torchrun ... ] updates_worker.py OUT RECIPE       writes norms to OUT as JSON, and weights beside it.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build

METHODS = {
    "lora": ["lora.rank=4", "lora.alpha=64", "optimizer.lr=1e-3"],
    "full": ["train.method=full", "optimizer.lr=1e-3"],
}
CLIPPED = ["train.max_grad_norm=0.05", "train.global_batch_size=4", "train.micro_batch_size=1", "train.steps=3"]


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    norms = {}
    for method, overrides in METHODS.items():
        for offload in ("false", "true"):
            recipe = load_recipe(recipe_file, [*overrides, *CLIPPED, f"memory.offload={offload}"])
            family = open_family(recipe)
            job = build(recipe, runtime, family, prepare(recipe, family, runtime))
            assert job.split.accumulation == 4 // runtime.world_size
            batches = iter(job.batches(0))
            name = f"{method} {'offloaded' if offload == 'true' else 'plain'}"
            norms[name] = [
                job.step(step, [next(batches) for _ in range(job.split.accumulation)]).grad_norm
                for step in range(recipe.train.steps)
            ]
            options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
            weights = get_model_state_dict(job.state.transformer, options=options)
            if runtime.is_main:
                file = out.with_name(f"{name} {runtime.world_size}.safetensors")
                save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, file)
    if runtime.is_main:
        out.write_text(json.dumps(norms))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
