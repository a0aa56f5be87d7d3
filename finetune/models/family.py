"""The contract of a model family: everything a model needs to be trained, and nothing about how.

A family is one file that reads like the model's paper: encode, noise, predict, target. The engine, the data path and
the commands know families only through this class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune.models.folder import ModelFolder
from finetune.models.objective import FlowMatching
from finetune.recipe import Bucket
from finetune.recipe.schema import Objective, Vae

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        inputs: the transformer's keyword arguments; tensors have the batch first, in the dtype the model expects.
        target: float32, shaped like the model's output.
        weight: loss weight per sample, float32 (B,).
    """

    inputs: dict[str, Any]
    target: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copies overlap with computation if its memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The loader's hook: page-locked copies, for asynchronous transfer."""
        return self._map(Tensor.pin_memory)

    def contiguous(self) -> "Batch":
        """Every tensor laid out in order: how a tensor lies in memory decides the last bits of a sum over it."""
        return self._map(Tensor.contiguous)

    def __reduce__(self) -> tuple:
        """Sent to another process by value: torch's own way takes a file descriptor and shared memory for each tensor,
        which costs the receiver half a millisecond and of which containers have little.
        """
        return _unpickle, tree_map_only(Tensor, _Bytes.of, (self.inputs, self.target, self.weight))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*tree_map_only(Tensor, function, (self.inputs, self.target, self.weight)))


@dataclass(frozen=True)
class _Bytes:
    """A contiguous CPU tensor as numpy carries it (numpy has no bfloat16)."""

    data: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "_Bytes":
        return cls(tensor.flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.data).clone().view(self.dtype).view(self.shape)  # torch aligns its own memory


def _unpickle(*parts: Any) -> Batch:
    return Batch(*tree_map_only(_Bytes, _Bytes.tensor, parts))


class SampleLike(Protocol):
    """What a family is given of one clip; see `finetune.data.loader.Sample`."""

    moments: Tensors
    text: Tensors
    bucket: Bucket
    fps: float
    generator: torch.Generator


class Family(ABC):
    """A model family, opened on one checkpoint. Only configs and a few small tensors are read at construction."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]  # the diffusers class that generates with it
    transformer_class: ClassVar[str]  # the diffusers class of the transformer
    components: ClassVar[tuple[str, ...]] = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
    text_components: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)  # checkpointed, compiled and sharded by the block
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder

    @abstractmethod
    def bucket_problem(self, bucket: Bucket) -> str | None:
        """Why the model cannot be trained at a shape, naming the nearest one that works; None if it can."""

    @abstractmethod
    def text_encoder(self, device: torch.device, dtype: torch.dtype) -> Callable[[str], Tensors]:
        """Load the text encoders; returns caption -> tensors without a batch dimension, as the model is given them."""

    @abstractmethod
    def video_encoder(self, device: torch.device, dtype: torch.dtype, vae: Vae) -> Callable[[np.ndarray], Tensors]:
        """Load the VAE; returns uint8 frames (F, H, W, 3) -> moments: mean and logvar, each (C, F', H', W')."""

    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """The pretrained transformer, on the CPU."""
        return self._transformer_class.from_pretrained(self.folder.path, subfolder="transformer", dtype=dtype)

    def empty_transformer(self) -> nn.Module:
        """The transformer without weights, on the meta device."""
        with torch.device("meta"):
            return self._transformer_class.from_config(self.folder.config("transformer"))

    @property
    def _transformer_class(self) -> type[diffusers.ModelMixin]:
        return getattr(diffusers, self.transformer_class)

    @abstractmethod
    def latents(self, moments: Tensors, generator: torch.Generator) -> Tensor:
        """A posterior sample in the transformer's normalisation, float32 (C, F', H', W')."""

    @abstractmethod
    def tokens(self, bucket: Bucket) -> int:
        """Number of video tokens the transformer attends over."""

    @abstractmethod
    def objective(self, settings: Objective) -> FlowMatching:
        """The training objective for a recipe's [objective]."""

    @abstractmethod
    def inputs(self, noisy: Tensor, sigma: Tensor, text: Tensors, samples: Sequence[SampleLike]) -> dict[str, Any]:
        """The transformer's keyword arguments for noised latents (B, C, F', H', W') at noise levels (B,)."""

    def target(self, target: Tensor) -> Tensor:
        """The target (B, C, F', H', W') in the layout of the model's output."""
        return target

    def predict(self, transformer: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The model's output for a batch's inputs."""
        return transformer(**inputs, return_dict=False)[0]

    def sampling_arguments(self, fps: float) -> dict[str, Any]:
        """Arguments of the pipeline's call that only this family has."""
        return {}

    def batch(self, samples: Sequence[SampleLike], objective: FlowMatching, u: Tensor | None = None) -> Batch:
        """Draw posterior, noise and noise level of samples of one bucket, and assemble the model's inputs.

        Args:
            u: where on the distribution of noise levels each sample lies, float32 (B,) in (0, 1); drawn if None.
        """
        x0, noise, drawn = [], [], []
        for sample in samples:
            x0.append(self.latents(sample.moments, sample.generator))
            noise.append(torch.randn(x0[-1].shape, generator=sample.generator))
            drawn.append(torch.rand((), generator=sample.generator).clamp(1e-6, 1 - 1e-6))
        sigma = objective.sigma(torch.stack(drawn) if u is None else u, self.tokens(samples[0].bucket))
        noisy, target = objective.noised(torch.stack(x0), torch.stack(noise), sigma)
        text = {name: torch.stack([sample.text[name] for sample in samples]) for name in samples[0].text}
        batch = Batch(self.inputs(noisy, sigma, text, samples), self.target(target), objective.weight(sigma))
        return batch.contiguous()

    @classmethod
    @abstractmethod
    def tiny(cls, path: Path, seed: int = 0) -> None:
        """Save a complete random-weight pipeline of a few MB, real tokenizer and VAE included, at `path`."""
