"""The memory of samples with two transformers, and with one of the same size, on the simulated accelerator.

Usage: experts_worker.py OUT RECIPE MODELS CASES      CASES: overrides by name, and GPUs, as JSON. Figures go to OUT as JSON.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experts import other_family

from finetune.checks.model import open_family
from finetune.planning.gpus import Hardware
from finetune.planning.simulate import Simulation
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.prompts import validation_prompts
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries, quietly


def simulated(recipe: Recipe, gpus: int, two: bool) -> dict[str, Any]:
    family = open_family(recipe)
    prompts = validation_prompts(recipe.validation, recipe.data.buckets[0])
    with quietly(), Simulation(recipe, family, Hardware(gpus=gpus), temporaries=False).running() as simulation:
        state = simulation.training(recipe.data.buckets[:1], other_family(family) if two else None)
        simulation.validation(state, prompts)
        simulation.export(state)
    swaps = state.companion.swaps if state.companion else 0
    return {"swaps": swaps} | {
        phase.kind: {"device": asdict(phase.device), "host": asdict(phase.host)} for phase in simulation.phases
    }


def main(out: Path, recipe_file: str, models: Path, cases: dict[str, tuple[list[str], int]]) -> None:
    figures: dict[str, Any] = {}
    for name, (overrides, gpus) in cases.items():
        for model in ("one", "two"):
            recipe = load_recipe(recipe_file, [*overrides, f"model.path={models / model}"])
            figures.setdefault(name, {})[model] = simulated(recipe, gpus, model == "two")
    out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
    leave(0)
