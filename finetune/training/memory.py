"""What a run says of the memory that its steps take: beside a plan, if one is made, and when there is too little.

The loop asks a `MemoryPlan`; `NoPlan` answers where none is made. `finetune.planning.forecast` makes real ones, and is
imported by the train command alone, so that a training without a plan runs without the planner.
"""

import json
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from finetune.models.family import Family
from finetune.recipe import RECIPE_FILE, Bucket, Recipe
from finetune.runtime.device import Device, PeakMemory
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic
from finetune.runtime.logging import say
from finetune.runtime.units import GIB

_RECORDED_STEPS = 2  # of each bucket: in the second there are moments of the optimizer
MEMORY_FILE = "memory.json"
VIEWER = "https://docs.pytorch.org/memory_viz"


class MemoryPlan(Protocol):
    """A plan of a training's memory, made beside it. Rank 0 alone ever knows its figures."""

    def poll(self) -> None:
        """Say what the plan says, once it is there. Called before each step: it waits for nothing, on no rank."""

    @property
    def step_peak(self) -> PeakMemory | None:
        """The most that a step takes by the plan; None on ranks that know none, and until it is there."""

    @property
    def fits(self) -> bool | None:
        """Whether all phases fit by the plan; None like `step_peak`."""

    @property
    def fit_command(self) -> str:
        """The command that finds settings which fit this rank's device."""


StartPlan = Callable[[Recipe, Family, Runtime], AbstractContextManager[MemoryPlan]]
"""Starts a plan of a training; leaving the context ends it, finished or not."""


class NoPlan:
    """For a training that is not planned."""

    step_peak: PeakMemory | None = None
    fits: bool | None = None

    def __init__(self, recipe: Recipe, runtime: Runtime) -> None:
        self._recipe, self._runtime = recipe, runtime

    def poll(self) -> None:
        """There is nothing to say."""

    @property
    def fit_command(self) -> str:
        return fit_command(self._recipe, self._runtime)


def start_no_plan(recipe: Recipe, _: Family, runtime: Runtime) -> AbstractContextManager[MemoryPlan]:
    """A `StartPlan` that plans nothing."""
    return nullcontext(NoPlan(recipe, runtime))


class MemoryHistory:
    """Has allocations recorded in the first steps of each bucket, in which memory runs out if it does, and in no others: a record
    takes host time.
    """

    def __init__(self, device: Device) -> None:
        self.device, self._steps, self._is_on = device, Counter[Bucket](), False

    def before_step(self, bucket: Bucket) -> None:
        """Begin or end the recording before a step of a bucket."""
        wanted = self._steps[bucket] < _RECORDED_STEPS
        if wanted != self._is_on:
            self.device.record_memory(wanted)
        self._is_on = wanted
        self._steps[bucket] += 1


def gpu_arguments(runtime: Runtime, memory: int | None) -> list[str]:
    """Arguments of `plan` that name the GPUs of this run.

    Args:
        memory: bytes of each GPU; None if the device does not know its memory.
    """
    arguments = ["--gpus", str(runtime.world_size)]
    if runtime.local_world_size != min(runtime.world_size, 8):  # the command's default
        arguments += ["--gpus-per-node", str(runtime.local_world_size)]
    return arguments + (["--device-memory", f"{memory}B"] if memory is not None else [])


def fit_command(recipe: Recipe, runtime: Runtime, *more: str) -> str:
    """The command that finds settings which fit this rank's device, from the effective recipe in the run's folder.

    Args:
        more: further arguments of `plan`.
    """
    of_both = recipe.output / RECIPE_FILE  # where experts are trained one after the other
    named = ["--recipe", str(of_both if of_both.exists() else recipe.run_folder / RECIPE_FILE)]
    arguments = [*named, *gpu_arguments(runtime, runtime.device.available_memory), *more]
    return f"python -m finetune plan {shlex.join(arguments)} --fit"


def compare(plan: MemoryPlan, taken: PeakMemory, recipe: Recipe, runtime: Runtime) -> None:
    """Say what the steps took beside what was planned, and write both to the run's memory.json, in bytes. Collective.

    A device that does not know its memory, a CPU, has nothing to say.

    Args:
        taken: the most that this rank's steps took.
    """
    if runtime.device.total_memory is None:
        return
    plan.poll()  # it may have come during the last step
    ranks = runtime.gather(taken)
    measured = PeakMemory(max(rank.allocated for rank in ranks), max(rank.reserved for rank in ranks))
    figures: dict[str, dict[str, float] | None] = {
        "measured": asdict(measured),
        "planned": None,
        "relative_error": None,
    }
    line = f"the steps took {_gib(measured.allocated)} GiB allocated, {_gib(measured.reserved)} reserved"
    if plan.step_peak:
        planned = asdict(plan.step_peak)
        off = {name: planned[name] / taken - 1 for name, taken in asdict(measured).items()}
        figures |= {"planned": planned, "relative_error": off}
        beside = (f"{_gib(planned[name])} ({off[name]:+.1%})" for name in ("allocated", "reserved"))
        line += f"; planned were {' and '.join(beside)}"
    say(line)
    if runtime.is_main:
        try:
            with atomic(recipe.run_folder / MEMORY_FILE) as partial:
                partial.write_text(json.dumps(figures, indent=1) + "\n")
        except UserError as error:  # the trained weights are still to be written
            say(f"warning: {error}")


def out_of_memory(
    error: Exception, step: int, bucket: Bucket, plan: MemoryPlan, recipe: Recipe, runtime: Runtime
) -> UserError:
    """What a step's torch.OutOfMemoryError means for the user, with a snapshot of the memory where the device has one.

    Not collective: the other ranks are in the middle of the step.

    Args:
        step: counted from 1.
    """
    what, cure = str(error).partition("\n")[0], f"settings that fit: {plan.fit_command}"
    if plan.step_peak:
        what += f" (the plan for the steps: {_gib(plan.step_peak.reserved)} GiB reserved)"
        cure += ", with less for --device-memory: by their plan, these fit" if plan.fits else ""
    return UserError(
        what, cure + _snapshot(recipe.run_folder, runtime), f"step {step} of bucket {bucket}, rank {runtime.rank}"
    )


def _snapshot(output: Path, runtime: Runtime) -> str:
    """Write a snapshot of this rank's memory; the words that say where it is, or why it is not.

    Empty if the device has none.
    """
    path = (output / f"memory_rank{runtime.rank}.pickle").absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 has made it on its own host
        written = runtime.device.snapshot(path)
    except OSError as error:  # the memory that ran out is the news, and must not be lost
        return f"\n       (no snapshot of the memory: {error})"
    return f"\n       what was in memory: {path}, to be viewed at {VIEWER}" if written else ""


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
