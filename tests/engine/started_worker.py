"""Trainings that continue an adapter on top of a frozen one, with weights held in several ways, by one process or by two.

Usage: [torchrun ... ] started_worker.py OUT WHICH RECIPE...       WHICH is "all" ways or "some"; figures go to OUT as JSON.
"""

import json
import sys
from pathlib import Path

from given_adapters import ENDS, write_adapter
from parity_worker import figures

from finetune.checks.model import open_family
from finetune.checks.settings import check_recipe
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build

WAYS = {
    "plain": ["memory.layout=shard"],
    "replicated": ["memory.layout=replicate"],
    "streamed": ["memory.layout=replicate", "memory.offload=true"],
    "offloaded": ["memory.layout=shard", "memory.offload=true"],
    "int8": ["memory.low_bit=int8"],
    "nf4": ["memory.low_bit=nf4"],
    "bf16": ["train.precision=bf16"],
}
OFTEN = {name: WAYS[name] for name in ("plain", "streamed", "nf4")}


def given(recipe_file: str, folder: Path) -> list[str]:
    """Overrides that name the two adapters, which are made here: of rank 2, where 4 are trained, and on other layers, too."""
    family = open_family(load_recipe(recipe_file))
    started = write_adapter(folder / f"{family.name}_started.safetensors", family, rank=2)
    frozen = write_adapter(folder / f"{family.name}_frozen.safetensors", family, 3, 2, (*ENDS, "net.2"))
    return [f"lora.start_from={started}", f'lora.frozen=[{{path = "{frozen}", strength = 0.5}}]']


def main(which: str, recipe_files: list[str], out: Path, runtime: Runtime) -> None:
    results: dict[str, dict] = {}
    for file in recipe_files:
        folder = out.parent / str(runtime.rank)
        folder.mkdir(exist_ok=True)
        overrides = [*given(file, folder), "lora.rank=4", "lora.alpha=8", "train.steps=2", "schedule.warmup_steps=1"]
        prepared = None
        for way, settings in WAYS.items() if which == "all" else OFTEN.items():
            share = f"train.micro_batch_size={2 // runtime.world_size}"
            recipe = load_recipe(file, [*overrides, *settings, share])
            assert not check_recipe(recipe, runtime.world_size), way
            family = open_family(recipe)
            prepared = prepared if prepared and way != "bf16" else prepare(recipe, family, runtime)
            results.setdefault(Path(file).stem, {})[way] = figures(
                build(recipe, runtime, family, prepared), "first and last"
            )
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], sys.argv[3:], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
