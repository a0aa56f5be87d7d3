"""What a family sees of a sample, and what families do with samples and their shapes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from finetune.models.batch import Tensors
from finetune.recipe import Bucket


class SampleLike(Protocol):
    """One sample as a family sees it. `finetune.data.loader.Sample` implements it and documents its fields."""

    @property
    def encoded(self) -> Mapping[str, Tensors]: ...
    @property
    def moments(self) -> Tensors: ...
    @property
    def text(self) -> Tensors: ...
    @property
    def bucket(self) -> Bucket: ...
    @property
    def fps(self) -> float: ...
    @property
    def generator(self) -> torch.Generator: ...
    @property
    def stratum(self) -> tuple[int, int]: ...
    @property
    def image_dropped(self) -> bool: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def blank(self) -> Tensors | None: ...


def posterior_sample(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """Draw mean + exp(logvar / 2) noise from the VAE's posterior: float32, in the shape of `mean`."""
    mean, logvar = mean.float(), logvar.float()
    return mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)


def nearest_bucket(bucket: Bucket, frames: int, side: int) -> Bucket:
    """The nearest bucket with k x `frames` + 1 frames and with sides that are multiples of `side` pixels."""
    return Bucket(
        round((bucket.frames - 1) / frames) * frames + 1,
        max(1, round(bucket.height / side)) * side,
        max(1, round(bucket.width / side)) * side,
    )


def stacked(parts: Sequence[Tensors]) -> Tensors:
    """Tensors of several samples, by name, with the batch first."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
