"""Running the command line as a user does."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
Finetune = Callable[..., subprocess.CompletedProcess]


def command(arguments: Sequence[object], processes: int) -> list[str]:
    """The command line of `python -m finetune`, under torchrun if `processes` is not 0."""
    head = [sys.executable, "-m"]
    if processes:
        head += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [*head, "finetune", *map(str, arguments)]
