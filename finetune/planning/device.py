"""The simulated device as torch and the engine see it.

It is a Python backend for torch's PrivateUse1 device type, so autograd, checkpointing, peft and FSDP2 run on it unmodified.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.planning import kernels
from finetune.planning.gpus import Hardware
from finetune.planning.kernels import KIND
from finetune.planning.trace import Trace
from finetune.runtime.device import Copies, Device, PeakMemory
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError

VERSION: str = torch.__version__
OLDEST, NEWEST = (2, 11), (2, 15)  # versions of torch that it is tested with; pyproject.toml says the same


class _Event:
    """Does nothing: operations run in the order in which they are called, whatever their streams and events."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    wait = synchronize = record

    def query(self) -> bool:
        return True


class _Stream(_Event):
    stream_id = device_index = device_type = 0  # FSDP2 of torch 2.15 passes them to an operation that does nothing

    def wait_stream(self, _: Any) -> None: ...

    wait_event = wait_stream

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Copies(Copies):
    """Copies that are made at once, for which the host does not wait."""

    def start(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)


class _Backend:
    """The functions of torch's module for a device (like torch.cuda), as far as the trainer's libraries call them."""

    Stream, Event = _Stream, _Event

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    set_device = manual_seed_all

    def current_stream(self, _: Any = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    def stream(self, _: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    device = stream

    def synchronize(self, _: Any = None) -> None: ...

    empty_cache = synchronize

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]


@contextlib.contextmanager
def works_with_this_torch() -> Iterator[None]:
    """The context for all that uses the device, which depends on parts of torch that change from version to version.

    What fails elsewhere, in the code of a family say, is raised as it is.

    Raises:
        UserError: this version is not among the tested ones, or calls what the device does not have.
    """
    cure = f"it is tested with torch {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    if not OLDEST <= tuple(int(part) for part in VERSION.split(".")[:2]) <= NEWEST:
        raise UserError(f"the simulated device does not know torch {VERSION}", cure)
    try:
        yield
    except (AttributeError, ImportError, NotImplementedError, TypeError) as error:
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not any(where.is_relative_to(Path(file).parent) for file in (torch.__file__, __file__)):
            raise
        line = str(error).partition("\n")[0]
        what = f"the simulated device fails on torch {VERSION} ({type(error).__name__}: {line})"
        raise UserError(what, cure) from error


def register() -> torch.device:
    """Register the device with torch, once a process. From then on torch takes it for the machine's accelerator."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if not hasattr(torch, KIND):
        _setup_privateuseone_for_python_backend(KIND, _Backend())
        kernels.register()
    return torch.device(KIND, 0)


@dataclass(frozen=True)
class SimulatedDevice(Device):
    """The simulated accelerator as a `Device`. `read` gives zeros: losses and a norm that are finite, and no vote to stop."""

    trace: Trace
    capacity: int | None = None
    float8: bool = True

    name = "simulated GPU"
    pins = False

    @property
    def total_memory(self) -> int | None:
        return self.capacity

    @property
    def has_float8(self) -> bool:
        return self.float8

    def synchronize(self) -> None: ...

    def read(self, values: Tensor) -> list[float]:
        return [0.0] * values.numel()

    def memory(self) -> PeakMemory:
        return PeakMemory(self.trace.allocator.peak_allocated, self.trace.allocator.peak_reserved)

    def reset_peak(self) -> None:
        self.trace.allocator.reset_peak()

    def empty_cache(self) -> None:
        self.trace.allocator.empty_cache()

    def copies(self) -> Copies:
        return _Copies(None)

    def pinned(self, size: int) -> Tensor:
        size_alone = torch.empty(size, dtype=torch.uint8, device="meta")
        return torch.empty_like(size_alone, device="cpu")  # fake: see `Accelerator`

    def reseed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


def simulated_runtime(hardware: Hardware, trace: Trace, float8: bool) -> Runtime:
    """Rank 0 of one process a GPU, the others of which do not exist: collectives do nothing, and take no time."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device = SimulatedDevice(register(), trace, hardware.capacity, float8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=hardware.gpus)
    return Runtime(0, 0, hardware.gpus, device, dist.group.WORLD, hardware.processes)
