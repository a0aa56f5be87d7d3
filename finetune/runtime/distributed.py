"""Process groups: start, agreement between ranks, and the mesh.

Every run has a process group, also a single process without torchrun, so there is one code path. Control messages
travel over gloo on the CPU, tensors of the step over the device's own backend.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finetune.runtime.device import Device
from finetune.runtime.errors import LostPeer, Problem, UserError
from finetune.runtime.watch import Watch

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A rank's place along a dimension of the mesh: number `rank` of `size`."""

    rank: int
    size: int


@dataclass(frozen=True)
class Runtime:
    """This process among its peers.

    The ranks of one context work on the same samples, and are neighbours: ranks 0 and 1 of 8, if `context_size` is 2. What
    divides clips, batches or samples asks for `data`. Work that only has to be shared out (inspecting and encoding files)
    may go by `rank` and `world_size`. Nothing divides the tokens of a sample yet, so `start` makes contexts of one rank.
    """

    rank: int
    local_rank: int
    world_size: int
    device: Device
    control: dist.ProcessGroup | None  # gloo, for host objects; None is the default group
    local_world_size: int = 1  # processes on this host
    context_size: int = 1  # ranks that share each sample
    watch: Watch | None = None  # what the ranks do, if this process has peers
    store: dist.Store | None = None  # what the process group was made with; each restart has its own

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data(self) -> Place:
        """Which share of the data is this rank's. All ranks of a context have the same one."""
        return Place(self.rank // self.context_size, self.world_size // self.context_size)

    @property
    def local_data_size(self) -> int:
        """How many shares of the data this host has."""
        return self.local_world_size // self.context_size

    @property
    def context(self) -> Place:
        """This rank's place among those that share its samples."""
        return Place(self.rank % self.context_size, self.context_size)

    def doing(self, what: str, is_limited: bool = False) -> None:
        """Note what this rank does from here on, for a message if it is waited for in vain; see `Watch.doing`."""
        if self.watch:
            self.watch.doing(what, is_limited)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on every rank. Objects are pickled; keep them small."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_data(self, value: T) -> list[T]:
        """One value for each data rank, taken from the first rank of its context, on every rank."""
        return self.gather(value)[:: self.context_size]

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.from_rank(0, value)

    def from_rank(self, rank: int, value: T) -> T:
        """One rank's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=rank, group=self.control)
        return box[0]

    def any(self, *votes: bool) -> list[bool]:
        """For each question whether any rank votes yes, on every rank."""
        if self.world_size == 1:
            return list(votes)
        counted = torch.tensor(votes, dtype=torch.int32)
        dist.all_reduce(counted, dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in counted]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block with one outcome: if it raised on any rank, it raises on all.

        The block itself must contain no collective that a failing rank would miss. A `UserError` of one rank is
        raised on all with its text; any other exception keeps its type and traceback where it happened, and the
        other ranks get a `LostPeer` that names the rank. KeyboardInterrupt is left alone: it ends the process.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        report: tuple[bool, Any] | None = None
        if error is not None:
            report = isinstance(error, UserError), getattr(error, "problems", repr(error))
        reports = self.gather(report)
        if error is not None and not isinstance(error, UserError):
            raise error
        problems: list[Problem] = []
        for rank, report in enumerate(reports):
            if report is None:
                continue
            is_user_error, detail = report
            if not is_user_error:
                raise LostPeer(f"rank {rank} failed: {detail}", cure="its own traceback is above")
            problems += [problem for problem in detail if problem not in problems]
        if problems:
            raise UserError.of(problems)


@contextmanager
def host_threads(runtime: Runtime, used: bool = True) -> Iterator[None]:
    """Compute on the CPU, beside GPUs, with this process's share of the node's cores: torchrun gives each of several processes one
    thread. A training on CPUs, and a number of threads that the user has set, stay as they are.

    Args:
        used: whether anything is computed on the CPU inside the block.
    """
    before = torch.get_num_threads()
    share = len(os.sched_getaffinity(0)) // runtime.local_world_size
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if not used or runtime.device.is_cpu or not by_torchrun or share <= before:
        yield
        return
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(timeout_seconds: float, on_cpu: bool = False) -> Runtime:
    """Join the process group that torchrun describes in the environment, or make one of a single process.

    Args:
        timeout_seconds: how long a collective may wait for a peer before the run ends with an error.
        on_cpu: leave GPUs alone.
    Raises:
        UserError: the environment names a rank among several, and not where they meet.
    """
    has_peers = {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # one of them alone is left from something else
    if has_peers and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        what = f"RANK and WORLD_SIZE are set in the environment, and {' and '.join(missing)} not"
        raise UserError(what, "start it with torchrun, or unset RANK and WORLD_SIZE", "environment")
    of_torchrun: Mapping[str, str] = os.environ if has_peers else {}
    rank, world_size = int(of_torchrun.get("RANK", 0)), int(of_torchrun.get("WORLD_SIZE", 1))
    local_rank = int(of_torchrun.get("LOCAL_RANK", 0))
    local_world_size = int(of_torchrun.get("LOCAL_WORLD_SIZE", 1))
    device = Device(torch.device("cpu")) if on_cpu else _pick_device(local_rank)
    backend = "gloo" if device.is_cpu else f"cpu:gloo,{device.kind}:{dist.get_default_backend_for_device(device.kind)}"
    timeout = timedelta(seconds=timeout_seconds)
    if not has_peers:
        store: dist.Store = dist.HashStore()
        dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
    else:
        # torchrun's store outlives a restart (--max_restarts), with the addresses of processes that are gone.
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"finetune_{restarts()}_{world_size}", store)
        bound = None if device.is_cpu else device.torch_device
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, store=store, timeout=timeout, device_id=bound
        )
    control = dist.group.WORLD if device.is_cpu else dist.new_group(backend="gloo", timeout=timeout)
    if not device.is_cpu and world_size > 1:
        # NCCL takes its memory with the first collective: before what is free is read.
        dist.all_reduce(torch.zeros((), device=device.torch_device))
    watch = Watch(rank, world_size, str(restarts()), timeout_seconds) if world_size > 1 else None
    return Runtime(rank, local_rank, world_size, device, control, local_world_size, watch=watch, store=store)


def restarts() -> int:
    """How often torchrun has restarted the run's processes (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mesh(runtime: Runtime, shard_size: int | None = None) -> DeviceMesh:
    """The mesh over all ranks, on the device's type. Its dimensions are "replicate", "shard" and "context", in this order.

    "replicate" is there if a `shard_size` is given, and "context" if ranks share samples.

    Args:
        shard_size: data ranks that hold one copy of the weights between them; None for all.
    """
    data = runtime.data.size
    sizes = {"shard": data} if shard_size is None else {"replicate": data // shard_size, "shard": shard_size}
    if runtime.context_size > 1:
        sizes["context"] = runtime.context_size
    return init_device_mesh(runtime.device.kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def data_mesh(whole: DeviceMesh) -> DeviceMesh:
    """The part of a mesh that weights are sharded and replicated over: this rank's ("replicate", "shard"), or ("shard",)."""
    names = whole.mesh_dim_names or ()
    return whole["replicate", "shard"] if "replicate" in names else whole["shard"]


def _pick_device(local_rank: int) -> Device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return Device(torch.device("cpu"))
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this host has no {accelerator.type} device of its own ({count} found)",
            cure=f"start torchrun with --nproc_per_node {count}",
        )
    torch.accelerator.set_device_index(local_rank)
    return Device(torch.device(accelerator.type, local_rank))
