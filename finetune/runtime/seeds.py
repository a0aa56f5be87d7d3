"""Random numbers as a pure function of their purpose (step, sample, ...), so that no generator state has to be saved."""

import hashlib

import torch
from torch import Tensor


def derive(*keys: int | str) -> int:
    """A 63-bit seed from a sequence of integers and strings: the same on every machine and Python version."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive(*keys)`."""
    return torch.Generator().manual_seed(derive(*keys))


def permutation(n: int, *keys: int | str) -> Tensor:
    """A permutation of 0..n-1, int64 of shape (n,), seeded by `derive(*keys)`."""
    return torch.randperm(n, generator=generator(*keys))
