"""How long a training waits for a checkpoint: written behind its steps, and at once. Copies and disk are timed in the same run.

`torchrun --nproc_per_node 2 -m benchmarks.checkpoints [--millions 300] [--rounds 5] [--folder /tmp]`. A sharded model with AdamW
saves its weights and moments (12 bytes a parameter, over all ranks). Each round times, in turn: a copy of this state in memory
that is there already, a checkpoint at once, and one in the background, of which the wait until `begin` returns. Then what
`checkpoint.verify` adds: DCP's writing of the same state alone and the SHA-256 of its files, DCP's reading of it alone and the
verification before. The page cache holds the files in all of these. Printed are medians over the rounds of the slowest rank, and
the ratios.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from finetune.engine.parts import OptimizerState, TrainedWeights
from finetune.engine.weights.checkpoint import Checkpoints
from finetune.engine.weights.integrity import digests
from finetune.engine.weights.staging import HostCopy
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime, data_mesh, mesh
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries, say

WIDTH = 4096


def build(millions: int, runtime: Runtime) -> list[TrainedWeights | OptimizerState]:
    """Weights of that many million parameters, and moments, as a training has them after a step."""
    layers = max(1, round(millions * 1e6 / WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer, mesh=data_mesh(mesh(runtime)))
    fully_shard(model, mesh=data_mesh(mesh(runtime)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return [TrainedWeights(model), OptimizerState(model, optimizer)]


def verification(
    checkpoints: Checkpoints, step: int, parts: list[TrainedWeights | OptimizerState], runtime: Runtime
) -> dict[str, float]:
    """Seconds of this rank for writing, hashing, reading and verifying the state of a checkpoint that is there. Collective."""
    state = {part.name: part.state_dict() for part in parts}
    found: dict[str, float] = {}
    folder = checkpoints.folder / "alone"

    def timed(name: str, call: Callable[[], object]) -> None:
        runtime.any(False)  # all ranks begin together
        start = time.perf_counter()
        call()
        found[name] = time.perf_counter() - start

    timed("writing alone", lambda: dcp.save(state, checkpoint_id=folder, process_group=checkpoints.group))
    own = [file for file in folder.iterdir() if file.name.startswith(f"__{runtime.rank}_")]
    timed("SHA-256 of the files", lambda: digests(folder, own))
    timed("reading alone", lambda: dcp.load(state, checkpoint_id=folder, process_group=checkpoints.group))
    timed("verification", lambda: checkpoints.damage(step))
    runtime.any(False)
    if runtime.is_main:
        shutil.rmtree(folder)
    return found


def main(arguments: argparse.Namespace, runtime: Runtime) -> None:
    parts = build(arguments.millions, runtime)
    folder = Path(runtime.from_main(tempfile.mkdtemp(dir=arguments.folder)))
    kinds = {
        "at once": Checkpoints(folder / "at_once", 1, runtime),
        "in the background": Checkpoints(folder / "background", 1, runtime, background=True),
    }
    copy = HostCopy(runtime.device)
    times: defaultdict[str, list[float]] = defaultdict(list)
    for turn in range(arguments.rounds + 1):
        found = {}
        start = time.perf_counter()
        copy.of({part.name: part.state_dict() for part in parts})
        found["one copy"] = time.perf_counter() - start
        for kind, checkpoints in kinds.items():
            runtime.any(False)  # all ranks begin together
            start = time.perf_counter()
            pending = checkpoints.begin(turn + 1, parts, {}, lambda _: None)
            if kind == "at once":
                checkpoints.finish(pending)
            found[kind] = time.perf_counter() - start
            checkpoints.finish(pending)
            found["until it is written"] = time.perf_counter() - start
        found |= verification(kinds["at once"], turn + 1, parts, runtime)
        slowest = [max(each) for each in zip(*(share.values() for share in runtime.gather(found)), strict=True)]
        if turn:  # in the first round memory is taken
            for name, seconds in zip(found, slowest, strict=True):
                times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    say(
        f"{arguments.millions} million parameters, {runtime.world_size} processes, {arguments.rounds} rounds, {runtime.device.name}"
    )
    for name, seconds in medians.items():
        say(f"{name:20} {seconds:7.3f} s  ({min(times[name]):.3f} to {max(times[name]):.3f})")
    behind = medians["in the background"]
    say(f"in the background, over one copy: {behind / medians['one copy']:.2f}")
    say(f"in the background, over at once: {behind / medians['at once']:.3f}")
    say(f"SHA-256, over writing alone: {medians['SHA-256 of the files'] / medians['writing alone']:.3f}")
    say(f"verification, over reading alone: {medians['verification'] / medians['reading alone']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=300, help="parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; the system's temporary folder if not given")
    quiet_libraries()
    main(parser.parse_args(), distributed.start(600))
    distributed.stop()
    leave(0)
