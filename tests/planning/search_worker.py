"""What the search expects of settings, and what the whole model takes by its own simulation.

Usage: search_worker.py OUT DEEP SHALLOW     two recipes, of a model of 8 blocks and of one of 4. Figures go to OUT as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from finetune.checks.model import open_family
from finetune.engine.precision import DTYPES
from finetune.engine.savers.lowbit import quantize_blocks
from finetune.models.family import Family
from finetune.planning import search
from finetune.planning.gpus import Hardware
from finetune.planning.plan import Plan
from finetune.planning.simulate import simulate, simulate_all
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.exit import leave
from finetune.runtime.gpus import GPUS
from finetune.runtime.logging import quiet_libraries

GPU = GPUS["A100"]
ROOM = 4.5  # blocks that a GPU has room for, of 8


def block_bytes(recipe: Recipe, family: Family) -> int:
    """Bytes of a block's frozen weights as they are stored."""
    storage = DTYPES[recipe.train.precision]
    transformer = family.build_transformer(storage).requires_grad_(False)
    lists = [getattr(transformer, name) for name in family.block_lists]
    quantize_blocks(lists, recipe.memory.low_bit, family.high_precision, storage)
    return max(sum(p.nbytes for p in block.parameters()) for blocks in lists for block in blocks)


def figures_of(recipe: Recipe, family: Family, changes: search.Changes) -> dict[str, Any]:
    """What a whole model takes."""
    load, step = simulate(search._changed(recipe, changes), family, recipe.data.buckets, Hardware(gpu=GPU)).phases
    memory = max(load.device.allocated, step.device.allocated)
    return {"memory": memory, "host": max(load.host.requested, step.host.requested), "seconds": step.seconds}


def streamed(recipe: Recipe, family: Family) -> dict[str, Any]:
    """The blocks that the search has stay on a GPU with room for some, and what the whole model takes with them."""
    changes = search._PLAIN | {"memory.offload": True, "memory.low_bit": "nf4"}
    block = block_bytes(search._changed(recipe, changes), family)
    capacity = int(figures_of(recipe, family, changes)["memory"] + ROOM * block)
    found = search._probe(recipe, family, recipe.data.buckets[0], Hardware(capacity=capacity, gpu=GPU), changes)
    expected = {"memory": found.memory, "host": found.host, "seconds": found.seconds}
    resident = found.changes["memory.resident_blocks"]
    taken = figures_of(recipe, family, found.changes)
    return {"block": block, "capacity": capacity, "resident": resident, "expected": expected, "taken": taken}


def samples(recipe: Recipe, family: Family) -> dict[str, Any]:
    """What becomes of samples that do not fit: where a resident block can be given up for them, and where none can."""
    changes = search._PLAIN | {"memory.offload": True, "memory.expandable_segments": True}
    two, none = changes | {"memory.resident_blocks": 2}, changes
    plan = simulate_all(search._changed(recipe, two), family, recipe.data.buckets, Hardware(gpu=GPU))
    block = block_bytes(recipe, family)
    most = plan.of_kind("validation")[0].device.allocated
    between = (plan.step_peak.reserved + most - 2 * block) // 2  # what steps take with two blocks, and samples without
    return {
        "resident": whole(recipe, family, two, most - block // 4),
        "none resident": whole(recipe, family, none, between),
    }


def whole(recipe: Recipe, family: Family, changes: search.Changes, capacity: int) -> dict[str, Any]:
    """What the search makes of settings on a GPU."""
    found = search._whole(recipe, changes, family, Hardware(capacity=capacity, gpu=GPU))
    return {
        "capacity": capacity,
        "reserved": reserved(found.plan),
        "fits": found.fits,
        "changes": found.changes,
        "prompts": len(found.recipe.validation.prompts),
        "notes": found.plan.notes,
    }


def reserved(plan: Plan) -> dict[str, int]:
    """Bytes by kind of phase."""
    return {phase.kind: phase.device.reserved for phase in plan.phases}


def main(out: Path, deep: str, shallow: str) -> None:
    figures = {}
    for part, file in ((streamed, deep), (samples, shallow)):
        recipe = load_recipe(file)
        figures[part.__name__] = part(recipe, open_family(recipe, with_weights=False))
    out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    leave(0)
