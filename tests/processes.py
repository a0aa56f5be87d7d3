"""Running the command line as a user does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import forked

ROOT = Path(__file__).parents[1]
OWN_PATHS = [str(ROOT), str(ROOT / "tests")]
FORKED_WITH: dict[str, str] = {}  # the variables with which programs are forked; empty where they are started anew
NO_MATTER = ("PYTEST_", "PYTHONPATH", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")  # torch sets the last one
Finetune = Callable[..., subprocess.CompletedProcess]


def command(arguments: Sequence[object], processes: int, torchrun: Sequence[str] = ()) -> list[str]:
    """The command line of `python -m finetune`, under torchrun if `processes` is not 0; alone on its host if it has no options."""
    head = [sys.executable, "-m"]
    if processes:
        head += ["torch.distributed.run", *(torchrun or ["--standalone"]), "--nproc_per_node", str(processes), "-m"]
    return [*head, "finetune", *map(str, arguments)]


def run_python(
    program: Sequence[object],
    processes: int = 0,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120,
    is_anew: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a script, -m and a module, or -c and code, with arguments, to its end.

    It is a fork of a process that has imported torch (forked.py). It is started anew, if there are `processes` by torchrun,
    in the suite that has the long matrices, where it `is_anew`, and where variables are set that may be read when torch and
    others are imported.
    """
    given = {**os.environ, **(environment or {})}
    if FORKED_WITH and not is_anew and imported_with(given) == FORKED_WITH:
        return forked.run(program, folder, given, seconds, processes)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [sys.executable, *(torchrun if processes else []), *map(str, program)]
    return subprocess.run(start, cwd=folder, env=given, capture_output=True, text=True, timeout=seconds, check=False)


def imported_with(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that may matter to what is imported before a fork."""
    return {name: value for name, value in environment.items() if not name.startswith(NO_MATTER)}


def figures_of(worker: str, processes: int, folder: Path, arguments: list[Path], seconds: float = 290) -> dict:
    """What a worker of tests/engine writes, on one process or several. It imports what lies in tests/, too."""
    out = folder / f"{processes}.json"
    paths = [*OWN_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    program = [ROOT / "tests" / "engine" / worker, out, *arguments]
    done = run_python(
        program, processes if processes > 1 else 0, Path.cwd(), {"PYTHONPATH": os.pathsep.join(paths)}, seconds
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())
