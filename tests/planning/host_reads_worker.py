"""What one optimizer step reads of the simulated device.

Usage: host_reads_worker.py OUT CASES      CASES: {name: [recipe, overrides]} as JSON. Figures go to OUT as JSON.
"""

import json
import sys
from pathlib import Path

from torch import Tensor

from finetune.checks.model import open_family
from finetune.engine.step import run_step
from finetune.planning.device import SimulatedDevice
from finetune.planning.gpus import Hardware
from finetune.planning.simulate import Simulation, example_batch
from finetune.planning.weightless import ZeroWeights
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries, quietly
from finetune.training.job import build_state

STEPS, MICRO_BATCHES = 2, 2


def read_in_steps(recipe: Recipe) -> list[dict]:
    """Calls of `Device.read`, and where else the host would wait for a GPU, in each step."""
    family, reads = open_family(recipe), []
    read = SimulatedDevice.read

    def counted(device: SimulatedDevice, values: Tensor) -> list[float]:
        reads.append(values.numel())
        return read(device, values)

    SimulatedDevice.read = counted  # type: ignore[method-assign]  # counted, and done as it was
    with quietly(), Simulation(recipe, family, Hardware()).running() as simulation:
        state = build_state(recipe, simulation.runtime, family, ZeroWeights(family))
        if state.activations:
            state.activations.smallest = 1  # tiny models save nothing that is worth a copy
        batch = example_batch(recipe, family, recipe.data.buckets[0])
        figures = []
        for step in range(STEPS):
            reads.clear()
            simulation.accelerator.reset_cost()
            run_step(state, step, [batch] * (1 if state.in_backward else MICRO_BATCHES))
            figures.append({"reads": len(reads), "waits": simulation.accelerator.waits})
    SimulatedDevice.read = read  # type: ignore[method-assign]  # as it was
    return figures


def main(out: Path, cases: dict[str, tuple[str, list[str]]]) -> None:
    figures = {name: read_in_steps(load_recipe(recipe, overrides)) for name, (recipe, overrides) in cases.items()}
    out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
