"""A step waits for the device once, where it reads loss and norm."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.first.bench import Bench, Failed, Skipped
from benchmarks.gpu.first.tiny import FULL, UNCLIPPED, batches_of, build, recipe_of, tiny_family
from finetune.engine.step import run_step
from finetune.runtime.device import Device

FAMILIES = ("ltx", "cogvideox", "hunyuan", "mochi")
WARM_UP = 2  # steps before: libraries take their memory, and kernels are compiled
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "streamed, activations offloaded": {"memory.offload": True, "memory.offload_activations": True},
    "the same, NF4": {"memory.offload": True, "memory.offload_activations": True, "memory.low_bit": "nf4"},
    "full": FULL,
    "full, bf16 weights, 8 bits": FULL | {"train.weights": "bf16", "optimizer.name": "adamw_8bit"},
    "the same, in backward": FULL
    | UNCLIPPED
    | {"train.weights": "bf16", "optimizer.name": "adamw_8bit", "optimizer.in_backward": True},
}
MANY = "ltx"  # the family with which all cases are tried; the others with the first three


@dataclass(frozen=True)
class Reading(Device):
    """A device that may be waited for where it is read, and counts how often it is."""

    reads: list[int] = field(default_factory=list)

    def read(self, values: Tensor) -> list[float]:
        self.reads.append(len(values))
        before = "default" if self.is_cpu else _mode()
        with waiting(self, "default", before):
            return super().read(values)


def _mode() -> str:
    return ("default", "warn", "error")[torch.cuda.get_sync_debug_mode()]


@contextmanager
def waiting(device: Device, mode: str, after: str) -> Iterator[None]:
    """CUDA's sync_debug_mode inside the block, and `after` it."""
    if device.kind != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(after)


def syncs(bench: Bench) -> str:
    """One step of each family with the savers, in which only `Device.read` may wait."""
    if bench.device.kind not in ("cpu", "cuda"):
        raise Skipped(f"{bench.device.kind} has no sync_debug_mode")
    device = Reading(bench.device.torch_device)
    bench.__dict__["runtime"] = replace(bench.runtime, device=device)
    wrong, tried = [], 0
    for name in FAMILIES:
        family = tiny_family(bench, name)
        for case, settings in CASES.items():
            if name != MANY and list(CASES).index(case) > 2:
                continue
            recipe = recipe_of(family, settings | ({} if bench.smoke else {"train.precision": "bf16"}))
            state = build(bench, family, recipe)
            steps = [batches_of(family, recipe, step)[0] for step in range(WARM_UP + 1)]
            steps = [batch.pin_memory() for batch in steps] if device.pins else steps  # as the loader does
            for step in range(WARM_UP):
                run_step(state, step, [steps[step]])
            device.synchronize()
            device.reads.clear()
            tried += 1
            try:
                with waiting(device, "error", "default"):
                    run_step(state, WARM_UP, [steps[WARM_UP]])
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                wrong.append(f"{name}, {case}")
                bench.notes.append(f"{name}, {case}: waits at {_place(error)}")
            else:
                if len(device.reads) != 1:
                    raise Failed(f"{name}, {case}: a step reads {len(device.reads)} times")
    if wrong:
        raise Failed(f"{len(wrong)} of {tried} steps wait elsewhere: {'; '.join(wrong)}")
    if device.is_cpu:
        raise Skipped(f"a CPU queues no work; Device.read is called once in each of {tried} steps")
    return f"only Device.read waits, in {tried} steps, after {WARM_UP} others"


def _place(error: BaseException) -> str:
    """The innermost calls of Python that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}" for frame in reversed(frames))
