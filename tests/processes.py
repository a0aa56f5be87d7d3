"""Running the command line as a user does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
Finetune = Callable[..., subprocess.CompletedProcess]


def command(arguments: Sequence[object], processes: int, torchrun: Sequence[str] = ()) -> list[str]:
    """The command line of `python -m finetune`, under torchrun if `processes` is not 0; alone on its host if it has no options."""
    head = [sys.executable, "-m"]
    if processes:
        head += ["torch.distributed.run", *(torchrun or ["--standalone"]), "--nproc_per_node", str(processes), "-m"]
    return [*head, "finetune", *map(str, arguments)]


def figures_of(worker: str, processes: int, folder: Path, arguments: list[Path], seconds: float = 290) -> dict:
    """What a worker of tests/engine writes, started plainly or under torchrun. It imports what lies in tests/, too."""
    out = folder / f"{processes}.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [sys.executable, *(torchrun if processes > 1 else [])]
    start += [ROOT / "tests" / "engine" / worker, out, *arguments]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())
