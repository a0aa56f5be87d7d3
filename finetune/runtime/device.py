"""The only access to an accelerator: memory figures, synchronisation and host reads, with the same calls on a CPU.

The engine names no device and does not call `torch.cuda`. What it needs from a device is a method here.
"""

import mmap
import os
import resource
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DRIVERS = {"NVIDIA GPUs": ("/proc/driver/nvidia/version", "/dev/dxg"), "AMD GPUs": ("/dev/kfd",)}
_RECORDED_EVENTS = 100_000  # allocations and frees; each takes a few hundred bytes


def use_expandable_segments() -> None:
    """Turn on expandable segments in CUDA's caching allocator, unless the environment configures it. Call before using a GPU."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def has_expandable_segments() -> bool:
    """Whether expandable segments were turned on in CUDA's caching allocator, by `use_expandable_segments` or by the user."""
    said = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in each.replace(" ", "").lower() for each in said)


def why_no_accelerator() -> str:
    """Why torch has only the CPU here, in its own words, where it has any."""
    gpus = [name for name, files in _DRIVERS.items() if any(Path(file).exists() for file in files)]
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    if not any(builds.values()):
        there = f", though there is a driver for {gpus[0]}" if gpus else ""
        return f"torch {torch.__version__} is a build without GPUs{there}"
    if torch.version.xpu is None:
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:  # no driver, or too old a one
            return str(error).partition("\n")[0]
    return "torch finds no GPU"


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes since `reset_peak`. On a CPU both figures are the process's peak resident set size since its start."""

    allocated: int
    reserved: int


Arrival = torch.Event | None
"""The event at which a copy is complete; None if it is already."""


@dataclass(frozen=True)
class Copies:
    """Copies on a stream of their own, which overlap with computation. Without a stream, copies are made at once.

    A copy waits for all work that is queued on the computing stream when the copy is started, and for no later work. So
    its source has been computed by then, and the last use of its target is over.
    """

    stream: torch.Stream | None

    def start(self, target: Tensor, source: Tensor) -> Arrival:
        """Start a copy from or to page-locked memory. Both tensors must be kept alive until `wait`."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.accelerator.current_stream(self.stream.device))
        with self.stream:
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, arrival: Arrival) -> None:
        """Make work that is queued from here on wait for a copy. The host does not wait."""
        if arrival is not None and self.stream is not None:
            torch.accelerator.current_stream(self.stream.device).wait_event(arrival)

    def finish(self, arrival: Arrival) -> None:
        """Make the host wait for a copy, whose target it reads or whose source it writes next."""
        if arrival is not None:
            arrival.synchronize()

    def computed(self) -> Arrival:
        """The event at which all work is complete that is queued on the computing stream by now. The host does not wait."""
        return None if self.stream is None else torch.accelerator.current_stream(self.stream.device).record_event()

    def fetch(self, tensor: Tensor, computed: Arrival) -> Tensor:
        """A tensor's copy in host memory; itself, if it is there already. One thread at a time may call it.

        The host waits for `computed`, an event behind the work that computes the tensor, and for the copy, but not for work that
        another thread has queued in the meantime. So the tensor's memory may be reused as soon as this returns.
        """
        if self.stream is None or tensor.device.type == "cpu":
            return tensor.cpu()
        self.finish(computed)
        with self.stream:
            return tensor.cpu()


@dataclass(frozen=True)
class Device:
    """The device that steps run on. `kind` is its type in torch ("cpu", "cuda", ...)."""

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
        """Bytes of the device's memory; None on a CPU."""
        return None if self.is_cpu else torch.accelerator.get_memory_info(self.torch_device)[1]

    @property
    def available_memory(self) -> int | None:
        """Bytes of device memory that torch holds or can allocate: not its context, nor what others hold. None on a CPU."""
        if self.is_cpu:
            return None
        return torch.accelerator.get_memory_info(self.torch_device)[0] + torch.accelerator.memory_reserved(
            self.torch_device
        )

    @property
    def pins(self) -> bool:
        """Whether host memory is page-locked for copies to and from this device."""
        return not self.is_cpu

    @property
    def has_float8(self) -> bool:
        """Whether it can multiply float8 matrices (torch._scaled_mm): compute capability 8.9 and above."""
        return self.capability is not None and self.capability >= (8, 9)

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability; None on other devices."""
        return torch.cuda.get_device_capability(self.torch_device) if self.kind == "cuda" else None

    def synchronize(self) -> None:
        """Wait for the work queued on the device. A CPU queues none."""
        if not self.is_cpu:
            torch.accelerator.synchronize(self.torch_device)

    def read(self, values: Tensor) -> list[float]:
        """Copy a 1-D tensor to the host. This waits for the device, so the engine calls it only once per optimizer step."""
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

    def record_memory(self, wanted: bool = True) -> None:
        """Record allocations for `snapshot` from here on, or no longer: the newest events, and the Python stacks of live memory.

        This takes about 2 microseconds per allocation (torch.cuda.memory._record_memory_history). Devices other than CUDA
        record nothing.
        """
        if self.kind == "cuda":  # "all": all events; "state": stacks of live memory only
            torch.cuda.memory._record_memory_history(
                "all" if wanted else None, "state", stacks="python", max_entries=_RECORDED_EVENTS
            )

    def snapshot(self, path: Path) -> bool:
        """Write what `record_memory` has recorded, as a pickle for torch's memory viewer. Returns False if nothing is recorded.

        Raises:
            OSError: the file cannot be written.
        """
        if self.kind != "cuda":
            return False
        torch.cuda.memory._dump_snapshot(str(path))
        return True

    def empty_cache(self) -> None:
        """Return the allocator's cached blocks to the device. Call it after a model is deleted."""
        if not self.is_cpu:
            torch.accelerator.empty_cache()

    def copies(self) -> "Copies":
        """Copies between host and device that overlap with computation."""
        return Copies(None if self.is_cpu else torch.Stream(self.torch_device))

    def pinned(self, size: int) -> Tensor:
        """Allocate `size` bytes of host memory, uint8, page-locked for asynchronous copies; ordinary memory on a CPU.

        torch's own allocator rounds page-locked memory up to a power of two, up to twice the size of a block's weights.
        """
        if self.is_cpu:
            return torch.empty(size, dtype=torch.uint8)
        if self.kind != "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # pages that hold nothing else
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def make_current(self) -> None:
        """Make it the device of this thread, which begins with the first of the machine."""
        if not self.is_cpu:
            torch.accelerator.set_device_index(self.torch_device)

    def reseed(self, seed: int) -> None:
        """Seed the generators that operations on this device draw from (dropout, stochastic rounding)."""
        # Not torch.manual_seed: it queries every accelerator that torch knows, which costs time in each step.
        torch.default_generator.manual_seed(seed)
        if not self.is_cpu:
            self._module.manual_seed(seed)
