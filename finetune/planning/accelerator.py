"""A simulated accelerator: the CPU is real, the accelerator is fake.

What touches the device runs on fake tensors, shapes without numbers, and every storage that comes or goes there is noted;
everything else runs for real. Small tensors carry their numbers along, so schedulers, indices and `.item()` work.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune.planning import kernels
from finetune.planning.kernels import KIND
from finetune.planning.memo import Memo
from finetune.planning.trace import Trace
from finetune.planning.work import Work

_NUMBERS = 4096  # elements up to which a tensor carries its numbers
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
_LARGE = 2**20  # bytes from which a piece of host memory is fake


class Accelerator(TorchDispatchMode):
    """Runs what touches the simulated device on fake tensors, and tells traces of its storages and the host's.

    Host memory that offloaded weights wait in is fake, too.
    """

    def __init__(self, trace: Trace, host: Trace, inside: bool = True, workspace: int = kernels.WORKSPACE) -> None:
        """
        Args:
            inside: whether to count what kernels allocate beside their results.
            workspace: bytes that cuBLAS keeps, with `inside`.
        """
        super().__init__()
        self.trace, self.host, self.inside = trace, host, inside
        self._workspace = workspace if inside else 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._memo = Memo(self.fake)
        self.begin_work()
        self._known: dict[int, tuple[Trace, int]] = {}  # storage -> (where, bytes)

    def __enter__(self) -> Accelerator:
        resize = torch.UntypedStorage.resize_

        def traced(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees what it gathered by resizing
            result = resize(storage, size)
            if storage._cdata in self._known:
                self._set(storage._cdata, size)
                self.trace.name(storage._cdata, "gathered weights")
            return result

        self._resize, torch.UntypedStorage.resize_ = resize, traced
        # `torch.tensor(..., device=...)` makes its tensor where modes do not see it, unless it is told to begin on the CPU.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch.UntypedStorage.resize_ = self._resize
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        if function is torch.ops.prim.device.default and type(arguments[0]) is FakeTensor:
            return arguments[0].fake_device  # most of all calls, from autograd and FSDP
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return function(*arguments, **(keywords or {}))  # DTensors ask for shapes: nothing of that is allocated
        for kind in types:
            if kind not in _PLAIN and issubclass(kind, Tensor):
                return NotImplemented  # DTensors and quantised moments: they ask again for the tensors they are made of
        keywords = keywords or {}
        tensors = _tensors(arguments)
        if keywords:
            tensors += _tensors(tuple(keywords.values()))
        here = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not here and (device := keywords.get("device")) is not None:
            here = torch.device(device).type == KIND
        if not here and not _waits_on_the_host(function, arguments, keywords):
            return function(*arguments, **keywords)
        numbers = self._numbers(function, arguments, keywords, tensors)
        if function is torch.ops.aten._local_scalar_dense.default and numbers is not None:
            return numbers
        is_kernel = any(_is_on_device(tensor) for tensor in tensors)
        temporaries = self._inside(function, arguments) if self.inside and is_kernel else []
        result = self._shapes(function, arguments, keywords, tensors, numbers)
        if is_kernel or any(_is_on_device(leaf) for leaf in tree_leaves(result)):
            self.work.add(function, arguments, keywords, tensors, result)
        if isinstance(result, FakeTensor):
            self._note(result)
            if function is torch.ops.aten._to_copy.default:
                self._same_category(tensors[0], result)
            if function._schema.is_mutable:
                result.numbers = None  # what was known of it is no more, unless it is known anew
            if numbers is not None:
                self._keep(result, numbers)
            return result
        known = tree_leaves(numbers) if numbers is not None else None
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, FakeTensor):
                self._note(leaf)
                if known:
                    self._keep(leaf, known[place])
        if self.inside and is_kernel:
            temporaries += self._allocated(kernels.made_after(function, arguments))
        return result

    def _inside(self, function: Any, arguments: tuple) -> list[FakeTensor]:
        """What a kernel allocates first, beside its results."""
        if self._workspace and function in kernels.MATRIX_PRODUCTS:
            self._kept, self._workspace = self._allocate((self._workspace,), torch.uint8), 0
            self.name([self._kept], "workspace")
        return self._allocated(kernels.made_before(function, arguments))

    def _allocated(self, pieces: list[kernels.Piece]) -> list[FakeTensor]:
        return [self._allocate(shape, dtype) for shape, dtype in pieces]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = KIND) -> FakeTensor:
        with self.fake:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        self._note(tensor)
        return tensor

    def _shapes(self, function: Any, arguments: tuple, keywords: dict, tensors: list[Tensor], known: Any) -> Any:
        """The result in shapes."""
        if known is not None and torch.Tag.dynamic_output_shape in function.tags:
            return self._allocate(known.shape, known.dtype, tensors[0].device)  # nonzero and the like, of known numbers
        key = self._memo.key(function, arguments, keywords)
        if key is not None:
            result = self._memo.recall(key, tensors)
            if result is not Memo.UNKNOWN:
                return result
        if any(not isinstance(tensor, FakeTensor) for tensor in tensors):
            arguments, keywords = tree_map_only(Tensor, self._faked, (arguments, keywords))
        with self.fake:
            result = function(*arguments, **keywords)
        if key is not None:
            self._memo.remember(key, tensors, result)
        return result

    def _same_category(self, source: Tensor, copy: Any) -> None:
        """What is moved between host and device stays what it is."""
        known = self._known.get(source.untyped_storage()._cdata) if isinstance(source, FakeTensor) else None
        if known is not None and source.fake_device.type != copy.fake_device.type:
            here = known[0].live.get(source.untyped_storage()._cdata)
            if here is not None:
                self.name([copy], here.category)

    def _keep(self, tensor: FakeTensor, numbers: Tensor) -> None:
        if numbers.numel() <= _NUMBERS and getattr(tensor, "numbers", None) is None:
            tensor.numbers = numbers

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _numbers(self, function: Any, arguments: tuple, keywords: dict, tensors: list[Tensor]) -> Any:
        """The result in numbers, if all that it depends on is small and known; None if not."""
        if function in kernels.UNINITIALISED:
            return None
        if function is torch.ops.aten.copy_.default and _numbers_of(arguments[0]) is None:  # whatever was there before
            source = _numbers_of(arguments[1])
            return None if source is None else source.expand(arguments[0].shape).to(arguments[0].dtype)
        if not tensors and _size(arguments) > _NUMBERS:
            return None
        if any(_numbers_of(tensor) is None for tensor in tensors):
            return None
        arguments, keywords = tree_map_only(Tensor, _numbers_of, (arguments, keywords))
        if "device" in keywords:
            keywords = keywords | {"device": torch.device("cpu")}
        return function(*arguments, **keywords)

    def _note(self, tensor: FakeTensor) -> None:
        if tensor.device.type not in (KIND, "cpu"):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            weakref.finalize(storage, self._drop, key)
            self._known[key] = self.trace if tensor.device.type == KIND else self.host, 0
        if self._known[key][1] != storage.nbytes():
            self._set(key, storage.nbytes())

    def begin_work(self) -> None:
        """Count what is computed from here on; `work` says it."""
        self.work = Work.none()

    def running(self, what: str) -> None:
        """Say what comes from here on."""
        self.trace.running = self.host.running = what
        self.trace.module = ""

    def inside_module(self, name: str) -> None:
        """Say which module is called."""
        self.trace.module = name

    def name(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors on the device, or their shards of this rank, are."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            parts = [getattr(local, part) for part in getattr(local, "tensor_attrs", ())] or [local]
            for part in parts:
                self.trace.name(part.untyped_storage()._cdata, category)
                self.host.name(part.untyped_storage()._cdata, category)

    def _set(self, key: int, size: int) -> None:
        trace, _ = self._known[key]
        self._known[key] = trace, size
        trace.resize(key, size)

    def _drop(self, key: int) -> None:
        if key in self._known:
            trace, _ = self._known.pop(key)
            trace.resize(key, 0)


def _tensors(arguments: tuple) -> list[Tensor]:
    """The tensors of an operation's arguments, which lie in lists at most."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found


def _is_on_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == KIND


def _numbers_of(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "numbers", None)
    return tensor if tensor.numel() <= _NUMBERS else None


def _waits_on_the_host(function: Any, arguments: tuple, keywords: dict) -> bool:
    """Whether host memory is asked for in the place of weights that are on meta, or in large pieces of bytes."""
    if function is torch.ops.aten.empty_like.default:
        return keywords.get("device") is not None and arguments[0].is_meta
    is_bytes = function is torch.ops.aten.empty.memory_format and keywords.get("dtype") is torch.uint8
    return is_bytes and _size(arguments) >= _LARGE


def _size(arguments: tuple) -> int:
    """Elements that a factory function is asked for."""
    shape = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else arguments[:1]
    count = 1
    for length in shape:
        count *= length if isinstance(length, int) else 1
    return count
