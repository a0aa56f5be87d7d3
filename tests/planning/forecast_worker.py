"""The command line on a CPU that calls itself a card, whose steps may run out of memory.

Usage: [torchrun ...] forecast_worker.py CARD FAILS ARGUMENTS...     the arguments are `python -m finetune`'s.

CARD: bytes of its memory; 0 for the plain CPU. FAILS: "RANK:STEP", or "never".

A plan's process is stopped as soon as it is started, and goes on, to its end, in the middle of the second step: so the
first steps cannot wait for it. At the end stdout says whether one was started, and whether the planner was imported.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from finetune.cli import main
from finetune.runtime import distributed
from finetune.runtime.device import Device, PeakMemory
from finetune.runtime.exit import leave

RANK = int(os.environ.get("RANK", 0))
STEPS = [3.0, 5.0, 4.0]  # GiB that steps report; each further rank one more
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nand much else that is of no use"


@dataclass(frozen=True)
class Card(Device):
    """A CPU that says what memory it has, and what its steps took of it."""

    total_memory: int = 0
    available_memory = property(lambda self: self.total_memory - 2**20)  # another process has the rest
    taken: Iterator[float] = field(default_factory=lambda: chain(STEPS, repeat(1.0)))

    def memory(self) -> PeakMemory:
        allocated = int((next(self.taken) + RANK) * 2**30)
        return PeakMemory(allocated, 2 * allocated)

    def snapshot(self, path: Path) -> bool:
        path.write_bytes(b"what was in memory")
        return True


def in_step(step: int, act: Callable[[], None]) -> None:
    """Have something done in the transformer's forward pass of a step, counted from 1."""
    passes = []

    def hook(module: nn.Module, _: object, __: object) -> None:
        if type(module).__name__.endswith("Transformer3DModel") and torch.is_grad_enabled():
            passes.append(module)
            if len(passes) == step:
                act()

    register_module_forward_hook(hook)


def fail() -> None:
    raise torch.OutOfMemoryError(MESSAGE)


def hold_plans() -> list[subprocess.Popen]:
    """Stop each plan's process when it is started; returns them."""
    held, start = [], subprocess.Popen.__init__

    def start_and_stop(process: subprocess.Popen, *arguments: object, **options: object) -> None:
        start(process, *arguments, **options)
        if "plan" in process.args:
            process.send_signal(signal.SIGSTOP)
            held.append(process)

    subprocess.Popen.__init__ = start_and_stop
    return held


def release(processes: list[subprocess.Popen]) -> None:
    """Let stopped processes go on, and wait for their ends."""
    for process in processes:
        process.send_signal(signal.SIGCONT)
        process.wait()


if __name__ == "__main__":
    card, fails, *arguments = sys.argv[1:]
    if int(card):
        distributed._pick_device = lambda _: Card(torch.device("cpu"), int(card))
    if fails != "never":
        rank, step = map(int, fails.split(":"))
        if rank == RANK:
            in_step(step, fail)
    plans = hold_plans()
    in_step(2, lambda: release(plans))
    status = main(arguments)
    print(f"rank {RANK}: {len(plans)} plans, planner imported: {'finetune.planning' in sys.modules}", flush=True)
    leave(status)
