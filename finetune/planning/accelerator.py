"""A simulated accelerator: the CPU is real, the accelerator is fake.

Operations on the device run on fake tensors, which have shapes and no data, and every storage that is allocated or freed there
is traced. All other operations run for real. Small tensors keep their values, so that schedulers, indices and `.item()` work.

torch has tools for the same question in `torch.distributed._tools`; they were tried on a tiny LTX-Video with fake tensors
(torch 2.13) and do not answer it. `RuntimeEstimator` wants the GPU itself: its roofline asks CUDA for the card's capability,
its other mode runs kernels, and `FSDPMemTracker` on fake CUDA tensors fails without a CUDA build. On fake CPU tensors a LoRA
cannot be built at all, because peft's `Module.to` fails under `FakeTensorMode`. Full finetuning is tracked there, but as the
bytes of live tensors: without the allocator's segments, which decide what fits, without what kernels allocate for themselves,
and for one forward pass, since the second micro-batch of a step is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune.planning import host_waits, kernels
from finetune.planning.cost import Cost
from finetune.planning.dispatch_cache import DispatchCache
from finetune.planning.kernels import KIND
from finetune.planning.trace import Trace

UPDATE = "update"  # what runs while an optimizer makes its updates
_SMALL = 4096  # elements up to which a tensor keeps its values
_OF_TRANSFORMERS = ("frozen weights", "trained weights", "load")  # the last of buffers, which nobody names
_VALUES = "known_values"  # our attribute of fake tensors
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


class Accelerator(TorchDispatchMode):
    """Runs operations on the simulated device with fake tensors, and traces the storages there and in host memory.

    Host memory that holds offloaded weights is fake, too.
    """

    def __init__(self, trace: Trace, host: Trace, temporaries: bool = True, workspace: int = kernels.WORKSPACE) -> None:
        """
        Args:
            temporaries: whether to count what kernels allocate beside their results.
            workspace: bytes of cuBLAS' workspace, which is one of them.
        """
        super().__init__()
        self.trace, self.host, self.temporaries = trace, host, temporaries
        self._workspace = workspace if temporaries else 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._cache = DispatchCache(self.fake)
        self.reset_cost()
        self._known: dict[int, tuple[Trace, int]] = {}  # storage -> (where, bytes)
        self._emptied: dict[int, str] = {}  # storage without bytes now -> its category before

    def __enter__(self) -> Accelerator:
        resize = torch.UntypedStorage.resize_

        def traced(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._known:
                self._resized(storage._cdata, size)
            return result

        self._resize = resize
        torch.UntypedStorage.resize_ = traced  # type: ignore[method-assign, assignment]  # torch has no hook for it
        # Dispatch modes do not see the tensor that `torch.tensor(..., device=...)` makes, unless it is made on the CPU first.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]  # as it was
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        if function is torch.ops.prim.device.default and type(arguments[0]) is FakeTensor:
            return arguments[0].fake_device  # the most frequent call, from autograd and FSDP: answered first
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return function(*arguments, **(keywords or {}))  # DTensor infers shapes; nothing is allocated
        for kind in types:
            if kind not in _PLAIN and issubclass(kind, Tensor):
                return NotImplemented  # DTensors and quantised moments dispatch again, with the tensors they consist of
        keywords = keywords or {}
        tensors = _tensors(arguments)
        if keywords:
            tensors += _tensors(tuple(keywords.values()))
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not is_fake and (device := keywords.get("device")) is not None:
            is_fake = torch.device(device).type == KIND
        if not is_fake and not _is_fake_host_memory(function, arguments, keywords):
            return function(*arguments, **keywords)
        if host_waits.waits(function, arguments, keywords, tensors):
            self.waits.append(host_waits.described(function))
        values = self._values(function, arguments, keywords, tensors)
        if values is not None and torch.Tag.data_dependent_output in function.tags:
            return values  # numbers of the host
        if function is torch.ops.aten._local_scalar_dense.default and self.trace.running == UPDATE:
            # Adafactor and Prodigy read norms, which only scale what they write; False is "nothing unusual".
            return False if tensors[0].dtype is torch.bool else 1.0
        is_kernel = any(_is_on_device(tensor) for tensor in tensors)
        temporaries = self._temporaries_before(function, arguments) if self.temporaries and is_kernel else []
        result = self._run_fake(function, arguments, keywords, tensors, values)
        if is_kernel or any(_is_on_device(leaf) for leaf in tree_leaves(result)):
            self.cost.add(function, arguments, keywords, tensors, result)
        else:
            self.cost.add_on_host(function, tensors, result)
        if isinstance(result, FakeTensor):
            self._trace_storage(result)
            if function is torch.ops.aten._to_copy.default:
                self._copy_category(tensors[0], result)
            if function._schema.is_mutable:
                _set_values(result, None)  # the old values are gone; the new ones may be known
            if values is not None:
                self._keep_values(result, values)
            return result
        known = tree_leaves(values) if values is not None else None
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, FakeTensor):
                self._trace_storage(leaf)
                if known:
                    self._keep_values(leaf, known[place])
        if self.temporaries and is_kernel:
            temporaries += self._allocate_all(kernels.made_after(function, arguments))
        return result

    def _temporaries_before(self, function: Any, arguments: tuple) -> list[FakeTensor]:
        """What a kernel allocates before its results, and frees when it ends."""
        if self._workspace and function in kernels.MATRIX_PRODUCTS:
            self._kept, self._workspace = self._allocate((self._workspace,), torch.uint8), 0
            self.name([self._kept], "workspace")
        return self._allocate_all(kernels.made_before(function, arguments))

    def _allocate_all(self, pieces: list[kernels.Piece]) -> list[FakeTensor]:
        return [self._allocate(shape, dtype) for shape, dtype in pieces]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = KIND) -> FakeTensor:
        with self.fake:
            tensor = cast(FakeTensor, torch.empty(shape, dtype=dtype, device=device))
        self._trace_storage(tensor)
        return tensor

    def _run_fake(self, function: Any, arguments: tuple, keywords: dict, tensors: list[Tensor], values: Any) -> Any:
        """The result as fake tensors.

        Args:
            values: the result's values, where they are known.
        """
        if values is not None and torch.Tag.dynamic_output_shape in function.tags:
            device = tensors[0].device
            return tree_map_only(
                Tensor, lambda known: self._allocate(known.shape, known.dtype, device), values
            )  # nonzero
        key = self._cache.key(function, arguments, keywords)
        if key is not None:
            result = self._cache.get(key, tensors)
            if result is not DispatchCache.MISS:
                return result
        if any(not isinstance(tensor, FakeTensor) for tensor in tensors):
            arguments, keywords = tree_map_only(Tensor, self._as_fake, (arguments, keywords))
        try:
            with self.fake:
                result = function(*arguments, **keywords)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise host_waits.unknown(function) from error
        if key is not None:
            self._cache.put(key, tensors, result)
        return result

    def _copy_category(self, source: Tensor, copy: FakeTensor) -> None:
        """A copy between host and device gets the category of its source."""
        if not isinstance(source, FakeTensor) or source.fake_device.type == copy.fake_device.type:
            return
        key = source.untyped_storage()._cdata
        known = self._known.get(key)
        if known is not None and key in known[0].live:
            self.name([copy], known[0].live[key].category)

    def _keep_values(self, tensor: FakeTensor, values: Tensor) -> None:
        if values.numel() <= _SMALL and getattr(tensor, _VALUES, None) is None:
            _set_values(tensor, values)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _values(self, function: Any, arguments: tuple, keywords: dict, tensors: list[Tensor]) -> Any:
        """The result's values, if all inputs are small and their values known; None if not."""
        if function in kernels.UNINITIALISED or _reads_beyond(function, arguments):
            return None
        if function is torch.ops.aten.copy_.default and _values_of(arguments[0]) is None:  # they are overwritten
            source = _values_of(arguments[1])
            return None if source is None else source.expand(arguments[0].shape).to(arguments[0].dtype)
        if not tensors and _size(arguments) > _SMALL:
            return None
        if any(_values_of(tensor) is None for tensor in tensors):
            return None
        arguments, keywords = tree_map_only(Tensor, _values_of, (arguments, keywords))
        if "device" in keywords:
            keywords = keywords | {"device": torch.device("cpu")}
        return function(*arguments, **keywords)

    def _trace_storage(self, tensor: FakeTensor) -> None:
        if tensor.device.type not in (KIND, "cpu"):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            weakref.finalize(storage, self._drop, key)
            self._known[key] = self.trace if tensor.device.type == KIND else self.host, 0
        if self._known[key][1] != storage.nbytes():
            self._set(key, storage.nbytes())

    def reset_cost(self) -> None:
        """Begin to count in `cost` again, and to list in `waits` where the host waits for the device."""
        self.cost = Cost.none()
        self.waits: list[str] = []

    def running(self, what: str) -> None:
        """Set what runs from here on: the category of storages that are allocated then, until they are named."""
        self.trace.running = self.host.running = what
        self.trace.module = ""

    def module_called(self, name: str) -> None:
        """Set the module that runs from here on; a peak names it."""
        self.trace.module = name

    def name(self, tensors: Iterable[Tensor], category: str) -> None:
        """Set the category of tensors on the device or the host; of a DTensor, of this rank's shard."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            parts = [getattr(local, part) for part in getattr(local, "tensor_attrs", ())] or [local]
            for part in parts:
                self.trace.name(part.untyped_storage()._cdata, category)
                self.host.name(part.untyped_storage()._cdata, category)
                if part.untyped_storage()._cdata in self._emptied:
                    self._emptied[part.untyped_storage()._cdata] = category

    def _resized(self, key: int, size: int) -> None:
        """FSDP2 frees what it gathered by resizing. So does a transformer that leaves the device: what comes back is what left."""
        live = self._known[key][0].live
        if not size and key in live:
            self._emptied[key] = live[key].category
        self._set(key, size)
        if size:
            before = self._emptied.pop(key, None)
            self.trace.name(key, before if before in _OF_TRANSFORMERS else "gathered weights")

    def _set(self, key: int, size: int) -> None:
        trace, _ = self._known[key]
        self._known[key] = trace, size
        trace.resize(key, size)

    def _drop(self, key: int) -> None:
        if key in self._known:
            trace, _ = self._known.pop(key)
            self._emptied.pop(key, None)
            trace.resize(key, 0)


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """All tensors among an operation's arguments, and in lists among them."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found


def _is_on_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == KIND


def _values_of(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, _VALUES, None)
    return tensor if tensor.numel() <= _SMALL else None


def _set_values(tensor: FakeTensor, values: Tensor | None) -> None:
    setattr(tensor, _VALUES, values)


def _reads_beyond(function: Any, arguments: tuple) -> bool:
    """Whether a view is of memory outside of the tensor that it is made from, whose values are not known."""
    if function is not torch.ops.aten.as_strided.default:
        return False
    tensor, shape, strides, *offset = arguments
    begin = offset[0] if offset and offset[0] is not None else tensor.storage_offset()
    end = begin + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return begin < tensor.storage_offset() or end > tensor.storage_offset() + tensor.numel()


def _is_fake_host_memory(function: Any, arguments: tuple, keywords: dict) -> bool:
    """Whether host memory is allocated like something on meta: offloaded weights, and what the simulated device pins."""
    is_like = function is torch.ops.aten.empty_like.default
    return is_like and keywords.get("device") is not None and arguments[0].is_meta


def _size(arguments: tuple) -> int:
    """Elements that a factory function is asked for."""
    shape = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else arguments[:1]
    count = 1
    for length in shape:
        count *= length if isinstance(length, int) else 1
    return count
