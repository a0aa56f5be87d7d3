"""The hardware of a training."""

from dataclasses import dataclass

from finetune.runtime.gpus import Gpu


@dataclass(frozen=True)
class Hardware:
    """The hardware of a training: `gpus` in all, `per_node` of them in each machine.

    Attributes:
        capacity, host_capacity: bytes of a GPU's memory and of a node's host memory; None for no limit.
        gpu: the GPU whose time is estimated; None for no estimate.
    """

    gpus: int = 1
    per_node: int = 8
    capacity: int | None = None
    host_capacity: int | None = None
    gpu: Gpu | None = None

    @property
    def known_capacity(self) -> int:
        """`capacity`, for those who cannot do without. Raises ValueError if it is None."""
        if self.capacity is None:
            raise ValueError("the memory of a GPU is not known")
        return self.capacity

    @property
    def processes(self) -> int:
        """Processes in each node."""
        return min(self.gpus, self.per_node)
