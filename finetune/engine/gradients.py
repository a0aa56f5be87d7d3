"""Gradients over all ranks: the part a rank holds, their global norm, and clipping by it."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def grad_norm(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Global L2 norm of the gradients over all ranks, in float32, also of bf16 ones; gradients are scaled in place to
    `limit` if it is exceeded.
    """
    norms = torch.stack(list(local_norms(parameters).values()))
    norm = global_norm(norms / replicas(parameters[0]) ** 0.5)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def local_norms(parameters: Sequence[nn.Parameter]) -> dict[Tensor, Tensor]:
    """L2 norm of this rank's part of each gradient that is there, 0-D float32, by parameter and in their order."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm([local(parameter.grad) for parameter in trained], dtype=torch.float32)  # type: ignore[arg-type]
    return dict(zip(trained, norms, strict=True))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicas(tensor: Tensor) -> int:
    """How many ranks hold the same part of a tensor: its replicas, and the other ranks of their contexts, which its mesh does
    not name.
    """
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    parts = math.prod(size for size, placement in sizes if not placement.is_replicate())
    return dist.get_world_size() // parts


def part_of(tensor: Tensor) -> tuple[int, ...]:
    """Which part of a tensor this rank holds: its coordinates in the dimensions of the mesh that divide it. Equal for replicas."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None  # a rank is in the mesh of its own parameters
    placed = zip(coordinates, tensor.placements, strict=True)
    return tuple(coordinate for coordinate, placement in placed if not placement.is_replicate())


class Norms:
    """Collects the norms of gradients that are dropped before the last one is there."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._norms: dict[Tensor, Tensor] = {}
        self.taken: dict[Tensor, Tensor] = {}  # of this rank's parts, by parameter, when `take` was last called

    def add(self, parameter: Tensor) -> bool:
        """Note the norm of a parameter's gradient. Returns whether it is the first of this step."""
        assert parameter.grad is not None  # it is called from a hook on the gradient
        self._norms[parameter] = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
        return len(self._norms) == 1

    def take(self) -> Tensor:
        """Global L2 norm of the gradients since it was last asked for, over all ranks: 0-D float32. There must have been one."""
        norms, self._norms = self._norms, {}
        self.taken = norms
        in_order = [norms[parameter] for parameter in self._parameters if parameter in norms]
        # Summed in the order in which `grad_norm` does.
        return global_norm(torch.stack(in_order) / replicas(self._parameters[0]) ** 0.5)


def global_norm(norms: Tensor) -> Tensor:
    """Global L2 norm from those of this rank's shards, 1-D float32, each divided by the square root of its number of replicas."""
    norm = torch.linalg.vector_norm(norms)
    if dist.get_world_size() == 1:
        return norm
    squares = norm.square()
    dist.all_reduce(squares)
    return squares.sqrt()
