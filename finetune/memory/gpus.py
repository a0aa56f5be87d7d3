"""GPUs by name: what their makers' data sheets state."""

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """A GPU and its dense peak rates.

    Attributes:
        architecture: of CUDA, as in sm_90: ten times the compute capability.
        flops: bf16 operations a second, with float32 accumulation.
        memory_rate, host_rate, peer_rate: bytes a second from its memory, from the host one way (PCIe x16), and from other GPUs.
        memory: bytes.
    """

    name: str
    architecture: int
    flops: float
    memory_rate: float
    host_rate: float
    peer_rate: float
    memory: int

    @property
    def is_hopper(self) -> bool:
        return self.architecture == 90

    @property
    def has_float8(self) -> bool:
        return self.architecture >= 89


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 3090", 86, 71e12, 936 * GB, 32 * GB, 32 * GB, 24 * 2**30),
        Gpu("RTX 4090", 89, 165e12, 1008 * GB, 32 * GB, 32 * GB, 24 * 2**30),
        Gpu("RTX 5090", 120, 209e12, 1792 * GB, 64 * GB, 64 * GB, 32 * 2**30),
        Gpu("A6000", 86, 155e12, 768 * GB, 32 * GB, 56 * GB, 48 * 2**30),
        Gpu("L40S", 89, 362e12, 864 * GB, 32 * GB, 32 * GB, 48 * 2**30),
        Gpu("A100", 80, 312e12, 2039 * GB, 32 * GB, 300 * GB, 80 * 2**30),
        Gpu("H100", 90, 989e12, 3350 * GB, 64 * GB, 450 * GB, 80 * 2**30),
        Gpu("H200", 90, 989e12, 4800 * GB, 64 * GB, 450 * GB, 141 * 10**9),
    )
}
