"""The other transformer of a model that generates with two, of which one at a time is on the device.

Wan 2.2 A14B denoises with one expert at high noise levels and with another at low ones; one of them is trained. Its companion
lies in host memory, each rank's shards as the trained one's are laid out, and takes its place on the device in samples.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.engine.parallel import parallelize
from finetune.engine.parts import TrainedWeights, reshard
from finetune.engine.precision import DTYPES
from finetune.engine.savers.streaming import Streamed
from finetune.engine.weights.loading import load_weights
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.recipe.schema import Memory, Train
from finetune.recipe.table import Table
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime

_ALIGNMENT = 256  # bytes, like CUDA's allocations


@dataclass(eq=False)
class _Held:
    """One storage on the device.

    Attributes:
        memory: all of its bytes, uint8.
        is_constant: whether it has nothing but frozen parameters, which are copied to the host only once.
        is_scratch: whether what it has need not be kept: blocks are streamed into it.
    """

    memory: Tensor
    is_constant: bool
    is_scratch: bool

    @property
    def storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()


class Movable:
    """A transformer whose device memory can go to the host and come back, whatever lies there: shards, buffers that several
    weights share, codes of few bits, adapters, tables.

    Storages are emptied and filled again. So parameters stay the same objects, and all views of them stay valid, those of FSDP
    and of the optimizer too. What is in host memory anyway is left alone. On a CPU, the host is the device, and all is copied
    within its memory. Nothing of it is collective. Gradients must be gone.
    """

    def __init__(self, transformer: nn.Module, device: Device) -> None:
        self.transformer, self.device = transformer, device
        self._away: list[_Held] | None = None  # what is emptied, while it is
        # What was emptied last, with its copies. The storages are not kept alive: FSDP replaces shards that it must pad.
        self._known: list[weakref.ref[torch.UntypedStorage]] = []
        self.host: list[Tensor] = []

    @property
    def is_on_device(self) -> bool:
        return self._away is None

    def offload(self) -> None:
        """Copy what is on the device to host memory, and free it there."""
        if self._away is not None:
            return
        reshard(self.transformer)
        for streamer in {each.streamer for each in self._streamed()}:
            streamer.forget()
        away = self._on_device()
        is_known = [ref() for ref in self._known] == [held.storage for held in away]
        if not is_known:
            self.device.synchronize()  # with what may still be copied from the old copies, which are freed first
            self._known, self.host = [], []
            self.host = self._host_memory(away)
            self._known = [weakref.ref(held.storage) for held in away]
        for held, host in zip(away, self.host, strict=True):
            if not held.is_scratch and not (held.is_constant and is_known):
                host.copy_(held.memory, non_blocking=True)
            held.storage.resize_(0)  # the device's allocator gives it away once the copy is over
        self._away = away
        self.device.empty_cache()  # what comes next may be of other sizes

    def onload(self) -> None:
        """Allocate the memory on the device again, and copy back what was in it."""
        if self._away is None:
            return
        try:
            for held, host in zip(self._away, self.host, strict=True):
                held.storage.resize_(held.memory.nbytes)
                if not held.is_scratch:
                    held.memory.copy_(host, non_blocking=True)
        except Exception:  # out of memory: leave what there is to the one that was there before
            for held in self._away:
                held.storage.resize_(0)
            raise
        self._away = None

    def _streamed(self) -> list[Streamed]:
        return [module for module in self.transformer.modules() if isinstance(module, Streamed)]

    def _on_device(self) -> list[_Held]:
        """Each storage on the device, once."""
        slots = [slot.memory for each in self._streamed() for slot in each.streamer.slots]
        scratch = {slot.untyped_storage()._cdata for slot in slots}
        found: dict[int, _Held] = {}
        for tensor in chain(self.transformer.parameters(), self.transformer.buffers()):
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if local.device.type != self.device.kind or not storage.nbytes() or not storage.resizable():
                continue  # what numpy has seen cannot be resized, and is on the host
            is_constant = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if held := found.get(storage._cdata):
                held.is_constant = held.is_constant and is_constant
            else:
                found[storage._cdata] = _Held(_bytes(local), is_constant, storage._cdata in scratch)
        return list(found.values())

    def _host_memory(self, away: list[_Held]) -> list[Tensor]:
        """A piece of one page-locked buffer for each storage: to lock many small ones takes long."""
        sizes = [0 if held.is_scratch else held.memory.nbytes for held in away]
        aligned = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        pieces = self.device.pinned(sum(aligned)).split(aligned)
        return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage, uint8 (n,)."""
    first = tensor.detach().as_strided((1,), (1,), 0).view(torch.uint8)
    return first.as_strided((tensor.untyped_storage().nbytes(),), (1,), 0)


class Companion:
    """The transformer that is not trained, and its exchange with the one that is.

    Attributes:
        component: its name in the model's folder and in the pipeline.
        swaps: how often the two have changed places.
    """

    def __init__(self, component: str, transformer: nn.Module, trained: Movable) -> None:
        self.component, self.transformer, self.swaps = component, transformer, 0
        self._own, self._trained = Movable(transformer, trained.device), trained
        self._own.offload()
        self._trained.onload()

    @property
    def is_on_device(self) -> bool:
        """Whether it is there, in the place of the trained one."""
        return self._own.is_on_device

    @property
    def host(self) -> list[Tensor]:
        """The copies in host memory, of both."""
        return [*self._own.host, *self._trained.host]

    def swap(self) -> None:
        """Exchange the two."""
        leaves, comes = (self._own, self._trained) if self.is_on_device else (self._trained, self._own)
        leaves.offload()
        comes.onload()
        self.swaps += 1

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Surrounds samples; afterwards the trained one is on the device, however they end."""
        try:
            yield
        finally:
            if self.is_on_device:
                self.swap()
            self._trained.onload()  # also if a swap was broken off in its middle


def build_companion(
    trained: nn.Module,
    family: Family,
    weights: Weights,
    train: Train,
    adapter: Table | None,
    memory: Memory,
    runtime: Runtime,
    take_up: Callable[[TrainedWeights], None] | None = None,
) -> Companion:
    """Build the other transformer as the trained one is, with its adapter, and frozen. Collective.

    It is made on the device while the trained one is in host memory; if that fails, the trained one stays there.

    Args:
        trained: as `parallelize` returns it, with its weights.
        family: opened so that its trained component is the other one.
        weights: the other's pretrained ones.
        take_up: fills what has been trained of the other so far, `lambda weights: checkpoints.load(step, [weights])` say.
    Raises:
        UserError: weights cannot be read, or `take_up` raised it.
    """
    movable = Movable(trained, runtime.device)
    movable.offload()
    # Nothing of it is updated, so whole weights are held as they are computed with.
    train = train.model_copy(update={"weights": train.precision}) if train.method == "full" else train
    transformer = family.build_transformer(DTYPES[train.precision])
    transformer = parallelize(transformer, family, train, adapter, memory, runtime)
    with runtime.together():
        load_weights(transformer, weights, runtime.device.torch_device)
    if take_up:
        take_up(TrainedWeights(transformer))
    transformer.requires_grad_(False).eval()
    return Companion(family.trained_component, transformer, movable)
