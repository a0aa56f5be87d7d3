"""The time from the command to the end of the first step, with a warm cache and a tiny model: 1 process, and 2 with torchrun.

`python -m benchmarks.startup [--rounds N]`. The command is that of a user, with the recipe's defaults. Its phases end when
certain lines appear. In turn with it, a bare interpreter imports what every trainer of a diffusers model needs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.paired import print_table
from finetune.commands.demo import make_demo

RECIPE = """
output = "{folder}/run"
[model]
family = "ltx"
path = "{folder}/model"
[data]
path = "{folder}/clips"
buckets = ["17x64x96"]
cache = "{folder}/cache"
[train]
steps = 1
global_batch_size = 2
precision = "float32"
"""
BARE = "import torch, peft; from diffusers import LTXPipeline, LTXVideoTransformer3DModel, AutoencoderKLLTXVideo"
PHASES = {  # each phase, with a part of the line that ends it
    "imports, process group, checks": "finetune: ",
    "dataset and cache": " clips, ",
    "model, FSDP, optimizer": "starting: ",
    "loader and first step": "step 1/1",
}


def phase_ends(command: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Run a command to its end. Returns the seconds from its start until each text appeared, in order."""
    ends: list[float] = []
    lines: list[str] = []
    start = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun and the quickstart set it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stderr:
            lines.append(line)
            if len(ends) < len(texts) and texts[len(ends)] in line:
                ends.append(time.perf_counter() - start)
    if process.returncode or len(ends) < len(texts):
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{''.join(lines)}")
    return ends


def durations(ends: Sequence[float]) -> dict[str, float]:
    """Seconds of each phase, and of all together."""
    starts = [0.0, *ends[:-1]]
    return {name: end - start for name, start, end in zip(PHASES, starts, ends, strict=True)} | {"all": ends[-1]}


def measure(folder: Path, rounds: int) -> Mapping[str, list[dict[str, float]]]:
    """The durations of each command in each round. A first round fills the cache and is not counted."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    commands = {"1 process": python, "torchrun, 2 processes": torchrun}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*commands, "bare imports")}
    for turn in range(rounds + 1):
        for name, head in commands.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            seconds = durations(phase_ends([*head, "finetune", "--recipe", str(recipe)], list(PHASES.values())))
            if turn:
                found[name].append(seconds)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", BARE], check=True, capture_output=True)
        if turn:
            found["bare imports"].append({"all": time.perf_counter() - start})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        make_demo(Path(folder), "ltx")
        found = measure(Path(folder), rounds)
    rows = []
    for phase in (*PHASES, "all"):
        texts = []
        for runs in found.values():
            seconds = [run[phase] for run in runs if phase in run]
            texts.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f})" if seconds else "")
        rows.append([phase, *texts])
    over = [a["all"] / b["all"] for a, b in zip(found["1 process"], found["bare imports"], strict=True)]
    print(f"\nseconds, median of {rounds} rounds (and the least)\n")
    print_table(["until the first step", *found], rows)
    print(f"\none process over bare imports: {statistics.median(over):.2f}x (paired, median)")


if __name__ == "__main__":
    main()
