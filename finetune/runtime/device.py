"""The one door to an accelerator: memory figures, synchronisation and host reads, the same on a GPU and on a CPU.

The engine names no device and calls no `torch.cuda`; whatever it needs of one is a method here.
"""

import mmap
import os
import resource
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_RECORDED = 100_000  # allocations and frees, some hundred bytes each


def use_expandable_segments() -> None:
    """Have CUDA's caching allocator grow its segments; before anything is on a GPU. What the environment says of it stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def has_expandable_segments() -> bool:
    """Whether CUDA's caching allocator was told to grow its segments, by `use_expandable_segments` or by the user."""
    said = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in each.replace(" ", "").lower() for each in said)


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes since `reset_peak`. On a CPU both figures are the process's peak resident set."""

    allocated: int
    reserved: int


Arrival = torch.Event | None
"""When a copy is made; None if it is made already."""


@dataclass(frozen=True)
class Copies:
    """Copies that run beside what is computed, on a stream of their own; at once if there is none.

    Each waits for all that has been queued on the computing stream when it is started, and for no more: so its source is
    computed, and its target's last use is over.
    """

    stream: torch.Stream | None

    def start(self, target: Tensor, source: Tensor) -> Arrival:
        """Copy, from or to page-locked memory. Both tensors must stay until `wait`."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.accelerator.current_stream(self.stream.device))
        with self.stream:
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, arrival: Arrival) -> None:
        """Have what is computed from here on wait for a copy; the host does not."""
        if arrival is not None:
            torch.accelerator.current_stream(self.stream.device).wait_event(arrival)


@dataclass(frozen=True)
class Device:
    """Where the step runs. `kind` is the device's type as torch spells it ("cpu", "cuda", ...)."""

    torch_device: torch.device

    @property
    def kind(self) -> str:
        return self.torch_device.type

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    @property
    def _module(self):
        return torch.get_device_module(self.torch_device)

    @property
    def name(self) -> str:
        return "CPU" if self.is_cpu else self._module.get_device_name(self.torch_device)

    @property
    def total_memory(self) -> int | None:
        """Bytes of the device's memory; None on a CPU, where nothing is divided by it."""
        return None if self.is_cpu else torch.accelerator.get_memory_info(self.torch_device)[1]

    @property
    def available_memory(self) -> int | None:
        """Bytes of the device's memory that torch has or can get: not its context, nor what others hold. None on a CPU."""
        if self.is_cpu:
            return None
        return torch.accelerator.get_memory_info(self.torch_device)[0] + torch.accelerator.memory_reserved(
            self.torch_device
        )

    @property
    def pins(self) -> bool:
        """Whether host memory is page-locked for copies to and from it."""
        return not self.is_cpu

    @property
    def has_float8(self) -> bool:
        """Whether it multiplies float8 matrices (torch._scaled_mm): compute capability 8.9 and above."""
        return self.kind == "cuda" and torch.cuda.get_device_capability(self.torch_device) >= (8, 9)

    def synchronize(self) -> None:
        """Wait for the work queued on the device; nothing to wait for on a CPU."""
        if not self.is_cpu:
            torch.accelerator.synchronize(self.torch_device)

    def read(self, values: Tensor) -> list[float]:
        """The host copy of a 1-D tensor. This waits for the device: the engine calls it once per optimizer step."""
        return values.tolist()

    def memory(self) -> PeakMemory:
        """Peak device memory, in bytes."""
        if self.is_cpu:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return PeakMemory(peak, peak)
        return PeakMemory(
            torch.accelerator.max_memory_allocated(self.torch_device),
            torch.accelerator.max_memory_reserved(self.torch_device),
        )

    def reset_peak(self) -> None:
        if not self.is_cpu:
            torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def record_memory(self) -> None:
        """Note from here on who allocates what, for `snapshot`: the newest events, and the Python stacks of what is live.

        It takes about 2 microseconds an allocation (torch.cuda.memory._record_memory_history). Only CUDA can do it.
        """
        if self.kind == "cuda":  # "all" keeps events, and "state" their stacks only while memory is held
            torch.cuda.memory._record_memory_history("all", "state", stacks="python", max_entries=_RECORDED)

    def snapshot(self, path: Path) -> bool:
        """Write what `record_memory` has noted, as a pickle for torch's viewer; returns whether there is any.

        Raises:
            OSError: it cannot be written.
        """
        if self.kind != "cuda":
            return False
        torch.cuda.memory._dump_snapshot(str(path))
        return True

    def empty_cache(self) -> None:
        """Give cached blocks back to the device, after a model was dropped."""
        if not self.is_cpu:
            torch.accelerator.empty_cache()

    def copies(self) -> "Copies":
        """Copies between host and device, beside what is computed."""
        return Copies(None if self.is_cpu else torch.Stream(self.torch_device))

    def pinned(self, size: int) -> Tensor:
        """`size` bytes of host memory, uint8, page-locked for asynchronous copies; plain memory on a CPU.

        torch's own pinned memory comes in powers of two, which for a block of weights can be twice its size.
        """
        if self.is_cpu:
            return torch.empty(size, dtype=torch.uint8)
        if self.kind != "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # pages of its own
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def reseed(self, seed: int) -> None:
        """Seed the generators that operations on this device draw from (dropout, stochastic rounding)."""
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed asks every accelerator that torch knows, each step
        if not self.is_cpu:
            self._module.manual_seed(seed)
