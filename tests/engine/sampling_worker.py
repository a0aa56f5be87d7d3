"""Trainings with and without validation samples, for any number of processes.

Usage: [torchrun ...] sampling_worker.py OUT RECIPE...     trains each recipe; rank 0 writes what became of it to OUT.
"""

import json
import sys
from pathlib import Path

from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.run import train


def main(out: Path, recipes: list[str], runtime: Runtime) -> None:
    """One line a recipe: what each rank's training ended with, an exit status or an error's text."""
    ends = {}
    for recipe in recipes:
        try:
            end: int | str = train(load_recipe(recipe), runtime)
        except UserError as error:
            end = str(error)
        ends[Path(recipe).stem] = runtime.gather(end)
    if runtime.is_main:
        out.write_text(json.dumps(ends, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2:], distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
