"""GPUs by name, with their peak rates."""

from dataclasses import dataclass

from finetune.runtime.units import GIB

GB = 10**9
CONTEXT = GIB // 2  # bytes that a CUDA context takes, about
HOST_MEMORY_RATE = (
    50 * GB
)  # bytes a second between CPU and memory: two channels of DDR4 or DDR5; servers have several times that


@dataclass(frozen=True)
class Gpu:
    """A GPU: its dense peak rates as its maker states them, and its memory as torch counts it.

    Attributes:
        architecture: CUDA's number, as in sm_90: ten times the compute capability.
        flops: FLOP/s in bf16 with float32 accumulation.
        float32_flops: FLOP/s in float32 without tensor cores.
        memory_rate, host_rate, peer_rate: bytes a second from its own memory, from the host (PCIe, one direction) and from
            other GPUs.
        memory: bytes, `CONTEXT` included.
    """

    name: str
    architecture: int
    flops: float
    float32_flops: float
    memory_rate: float
    host_rate: float
    peer_rate: float
    memory: int

    @property
    def is_hopper(self) -> bool:
        return self.architecture == 90

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA's compute capability."""
        return self.architecture // 10, self.architecture % 10

    @property
    def has_float8(self) -> bool:
        return self.architecture >= 89


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 3060", 86, 25.5e12, 12.7e12, 360 * GB, 32 * GB, 32 * GB, int(11.6 * GIB)),
        Gpu("RTX 4060 Ti 16GB", 89, 44e12, 22e12, 288 * GB, 16 * GB, 16 * GB, int(15.6 * GIB)),
        Gpu("RTX 4070", 89, 58e12, 29e12, 504 * GB, 32 * GB, 32 * GB, int(11.6 * GIB)),
        Gpu("RTX 4080", 89, 97e12, 48.7e12, 717 * GB, 32 * GB, 32 * GB, int(15.6 * GIB)),
        Gpu("RTX 3090", 86, 71e12, 35.6e12, 936 * GB, 32 * GB, 32 * GB, int(23.6 * GIB)),
        Gpu("RTX 4090", 89, 165e12, 82.6e12, 1008 * GB, 32 * GB, 32 * GB, int(23.5 * GIB)),
        Gpu("RTX 5090", 120, 209e12, 104.8e12, 1792 * GB, 64 * GB, 64 * GB, int(31.3 * GIB)),
        Gpu("A6000", 86, 155e12, 38.7e12, 768 * GB, 32 * GB, 56 * GB, int(47.4 * GIB)),
        Gpu("L40S", 89, 362e12, 91.6e12, 864 * GB, 32 * GB, 32 * GB, int(44.4 * GIB)),
        Gpu("A100", 80, 312e12, 19.5e12, 2039 * GB, 32 * GB, 300 * GB, int(79.1 * GIB)),
        Gpu("H100", 90, 989e12, 67e12, 3350 * GB, 64 * GB, 450 * GB, int(79.1 * GIB)),
        Gpu("H200", 90, 989e12, 67e12, 4800 * GB, 64 * GB, 450 * GB, int(139.7 * GIB)),
    )
}


def known_gpu(device: str) -> Gpu | None:
    """The GPU that a device's name, such as "NVIDIA H100 80GB HBM3", is of; None if it is not among `GPUS`."""
    names = [name for name in GPUS if name in device]
    return GPUS[max(names, key=len)] if names else None
