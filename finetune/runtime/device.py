"""The one door to an accelerator: memory figures, synchronisation and host reads, the same on a GPU and on a CPU.

The engine names no device and calls no `torch.cuda`; whatever it needs of one is a method here.
"""

import resource
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Peak bytes since `reset_peak`. On a CPU both figures are the process's peak resident set."""

    allocated: int
    reserved: int


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

    def memory(self) -> Memory:
        """Peak device memory, in bytes."""
        if self.is_cpu:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return Memory(peak, peak)
        return Memory(
            torch.accelerator.max_memory_allocated(self.torch_device),
            torch.accelerator.max_memory_reserved(self.torch_device),
        )

    def reset_peak(self) -> None:
        if not self.is_cpu:
            torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def empty_cache(self) -> None:
        """Give cached blocks back to the device, after a model was dropped."""
        if not self.is_cpu:
            torch.accelerator.empty_cache()

    def pinned(self, size: int) -> Tensor:
        """`size` bytes of host memory, uint8, page-locked for asynchronous copies; plain memory on a CPU.

        torch's own pinned memory comes in powers of two, which for a block of weights can be twice its size.
        """
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=not self.is_cpu and self.kind != "cuda")
        if self.kind == "cuda":
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
