"""The order of copies and kernels on a GPU, followed on a CPU: what runs at once there is checked as if it ran on streams.

torch's CUDA sanitizer decides (torch/cuda/_sanitizer.py): it keeps a vector clock for each stream, and reports accesses to the
same memory that no wait has put in order. Here it is told what a GPU would be given, while all is computed at once, with real
numbers. There are three streams:

- the computing stream, in which all runs that touches memory of the "device", that is memory which is not on the "host";
- the stream of `Copies`, in which the copies run that are started with it;
- the host's own thread. What it queues on a stream comes after all that it has done, but it does not wait for streams, except when
  it reads a value, copies without `non_blocking`, or synchronises.

Allocating and freeing are writes of the computing stream: CUDA's allocator may hand memory that is freed to the next tensor of that
stream at once, whatever other streams do.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._sanitizer import FACTORY_FUNCTION_REGEX, ArgumentHandler, EventHandler, SynchronizationError
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.runtime.device import Copies, Device

COMPUTING, COPYING, HOST = 0, 1, 2
_STREAMS = {COMPUTING: "the computing stream", COPYING: "the copies' stream", HOST: "the host"}
_PLAIN = (Tensor, torch.nn.Parameter)
_WAITING = torch.Tag.data_dependent_output  # of operations that read a value on the host


class Order:
    """What runs on which stream after what.

    Args:
        without: what is left out, for a check of the check: "wait_stream" or "synchronize", or the function that waits for a copy.
    """

    def __init__(self, without: str | None = None) -> None:
        self.without, self.waited = without, set[str]()
        self.races: list[str] = []
        self.current = COMPUTING
        self._handler, self._events = EventHandler(), 0
        self._host_memory: dict[int, tuple[int, int]] = {}  # storage -> its first byte, the byte after its last
        self._seen: set[int] = set()
        for stream in (COPYING, HOST):
            self._handler._handle_stream_creation(stream)

    @contextmanager
    def followed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The context in which operations are followed. Raises AssertionError at its end if there were races."""
        with monkeypatch.context() as patched:
            patched.setattr(torch.accelerator, "current_stream", lambda _: Stream(self, COMPUTING))
            with _ToDevice(self), _Followed(self):
                yield

    # What streams and devices tell

    def launch(self, stream: int, reads: set[int], writes: set[int], what: str, names: dict[int, list[str]]) -> None:
        """Note an operation on a stream. It comes after all that the host has done."""
        if stream != HOST:
            self.wait_event(stream, self.record_event(HOST))
        names = {key: names.get(key, []) for key in reads | writes}
        for error in self._handler._handle_kernel_launch(stream, reads - writes, writes, set(), what, names):
            self.races.append(_described(error))

    def record_event(self, stream: int) -> int:
        self._events += 1
        self._handler._handle_event_creation(self._events)
        self._handler._handle_event_record(self._events, stream)
        return self._events

    def wait_event(self, stream: int, event: int) -> None:
        self._handler._handle_event_wait(event, stream)

    def synchronize(self, stream: int) -> None:
        """The host waits for a stream."""
        self._handler._handle_stream_synchronization(stream)

    def is_left_out(self, what: str) -> bool:
        self.waited.add(what)
        return what == self.without

    # Memory

    def key(self, tensor: Tensor) -> int:
        """What stands for a tensor's memory; 0 if it has none. Storages within memory of `pinned` are all of it."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return 0
        address = storage.data_ptr()
        for key, (begin, end) in self._host_memory.items():
            if begin <= address < end:
                return key
        self._follow(storage)
        return storage._cdata

    def is_host(self, key: int) -> bool:
        return key in self._host_memory

    def put_on_host(self, tensor: Tensor) -> None:
        """From here on, a tensor's memory is the host's."""
        storage = tensor.untyped_storage()
        self._follow(storage)
        self._host_memory[storage._cdata] = storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, key: int) -> None:
        """Free memory. That of the host must be kept for as long, by the contract of `Copies.start`."""
        self.launch(COMPUTING, set(), {key}, "free", {})
        self._handler._handle_memory_deallocation(key)
        self._seen.discard(key)
        self._host_memory.pop(key, None)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream as `Copies` uses it."""

    order: Order
    number: int
    device: None = None

    def wait_stream(self, other: Stream) -> None:
        if not self.order.is_left_out("wait_stream"):
            self.order.wait_event(self.number, other.record_event())

    def record_event(self) -> int:
        return self.order.record_event(self.number)

    def wait_event(self, event: int) -> None:
        caller = sys._getframe(2).f_code.co_name  # that of Copies.wait
        if not self.order.is_left_out(caller):
            self.order.wait_event(self.number, event)

    def __enter__(self) -> None:
        self.order.current = self.number

    def __exit__(self, *_: object) -> None:
        self.order.current = COMPUTING


@dataclasses.dataclass(frozen=True)
class FollowedDevice(Device):
    """A CPU that has the streams and the page-locked memory of a GPU, as far as their order goes."""

    order: Order = dataclasses.field(default_factory=Order)

    pins = True

    def copies(self) -> Copies:
        return Copies(Stream(self.order, COPYING))  # type: ignore[arg-type]  # it has the methods of torch.Stream

    def pinned(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        self.order.put_on_host(memory)
        return memory

    def read(self, values: Tensor) -> list[float]:
        self.order.launch(COMPUTING, {self.order.key(values)}, set(), "read", {})
        self.order.synchronize(COMPUTING)
        return super().read(values)

    def synchronize(self) -> None:
        if not self.order.is_left_out("synchronize"):
            self.order.synchronize(COMPUTING)
            self.order.synchronize(COPYING)


class _ToDevice(TorchFunctionMode):
    """Copies host memory to the device in `.to(..., non_blocking=True)`, in the current stream."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function is Tensor.to and keywords.get("non_blocking") and self.order.is_host(self.order.key(arguments[0])):
            source = arguments[0]
            return torch.empty(source.shape, dtype=source.dtype).copy_(source, non_blocking=True)
        if function is Tensor.pin_memory:
            pinned = arguments[0].clone()
            self.order.put_on_host(pinned)
            return pinned
        return function(*arguments, **keywords)


class _Followed(TorchDispatchMode):
    """Notes what each operation reads and writes, by its schema."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return function(*arguments, **(keywords or {}))  # DTensor infers shapes; there is no memory
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # DTensors and low-bit moments dispatch again, with the tensors they consist of
        keywords, order = keywords or {}, self.order
        is_pinned = bool(keywords.get("pin_memory"))
        accesses, schema = _Accesses(order), function._schema
        accesses.parse_inputs(schema, arguments, keywords, is_factory=bool(FACTORY_FUNCTION_REGEX.match(schema.name)))
        touched = set(accesses.tensor_aliases)
        result = function(*arguments, **(keywords | {"pin_memory": False} if is_pinned else keywords))
        places = {order.is_host(key) for key in touched}
        on_host = is_pinned or places == {True}
        if on_host:
            for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
                order.put_on_host(tensor)
        accesses.parse_outputs(
            schema, result, is_factory=False
        )  # made on the device, memory may be another tensor's of before
        if is_pinned:
            return result  # the host's allocator waits for copies from and to what is freed
        stream = HOST if on_host else order.current
        order.launch(stream, accesses.dataptrs_read, accesses.dataptrs_written, schema.name, accesses.tensor_aliases)
        if stream != HOST and (
            _WAITING in function.tags or (len(places) == 2 and not _non_blocking(arguments, keywords))
        ):
            order.synchronize(stream)
        return result


class _Accesses(ArgumentHandler):
    """torch's own, by storage: a block's weights are views of one slot."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def _handle_argument(
        self, value: Any, is_write: bool, metadata_only: bool, name: str | None = None, is_output: bool = False
    ) -> None:
        if not isinstance(value, Tensor) or not (key := self.order.key(value)):
            return
        self.tensor_aliases.setdefault(key, []).extend([name] if name else [])
        if is_write:
            self.dataptrs_written.add(key)
        elif not metadata_only:
            self.dataptrs_read.add(key)


def _non_blocking(arguments: tuple, keywords: dict) -> bool:
    return bool(keywords.get("non_blocking")) or any(value is True for value in arguments[2:])


def _described(error: SynchronizationError) -> str:
    def access(of: Any) -> str:
        ours = [frame for frame in of.stack_trace if "/finetune/" in frame.filename]
        where = f" in {ours[-1].name}" if ours else ""
        return f"{_STREAMS[of.stream]} {of.type} memory{where} ({of.operator})"

    return f"{access(error.current_access)}, not ordered after {access(error.previous_access)}"
