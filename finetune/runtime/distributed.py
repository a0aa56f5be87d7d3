"""Process groups: start, agreement between ranks, and the mesh.

Every run has a process group, also a single process without torchrun, so there is one code path. Control messages
travel over gloo on the CPU, tensors of the step over the device's own backend.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finetune.runtime.device import Device
from finetune.runtime.errors import LostPeer, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: Device
    control: dist.ProcessGroup  # gloo, for host objects
    local_world_size: int = 1  # processes on this host

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on every rank. Objects are pickled; keep them small."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
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
        report = None if error is None else (isinstance(error, UserError), getattr(error, "problems", repr(error)))
        reports = self.gather(report)
        if error is not None and not isinstance(error, UserError):
            raise error
        problems = []
        for rank, report in enumerate(reports):
            if report is None:
                continue
            is_user_error, detail = report
            if not is_user_error:
                raise LostPeer(f"rank {rank} failed: {detail}", cure="its own traceback is above")
            problems += [problem for problem in detail if problem not in problems]
        if problems:
            raise UserError.of(problems)


def start(timeout_seconds: float) -> Runtime:
    """Join the process group that torchrun describes in the environment, or make one of a single process.

    Args:
        timeout_seconds: how long a collective may wait for a peer before the run ends with an error.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = _pick_device(local_rank)
    backend = "gloo" if device.is_cpu else f"cpu:gloo,{device.kind}:{dist.get_default_backend_for_device(device.kind)}"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    control = dist.group.WORLD if device.is_cpu else dist.new_group(backend="gloo", timeout=timeout)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Runtime(rank, local_rank, world_size, device, control, local_world_size)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mesh(runtime: Runtime, shard_size: int | None = None) -> DeviceMesh:
    """A mesh over all ranks, on the device's type: ("shard",), or ("replicate", "shard") with groups of `shard_size`."""
    if shard_size is None:
        return init_device_mesh(runtime.device.kind, (runtime.world_size,), mesh_dim_names=("shard",))
    sizes = (runtime.world_size // shard_size, shard_size)
    return init_device_mesh(runtime.device.kind, sizes, mesh_dim_names=("replicate", "shard"))


def describe(runtime: Runtime) -> str:
    """One line for the log: processes, hosts and device."""
    hosts = sorted(set(runtime.gather(socket.gethostname())))
    processes = f"{runtime.world_size} process" + ("es" if runtime.world_size > 1 else "")
    return f"{processes} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}, {runtime.device.name}"


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
