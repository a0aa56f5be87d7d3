"""Videos from the transformer as it is in training, sharded and checkpointed, inside the family's diffusers pipeline."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule

from finetune.engine.step import StepState
from finetune.models.family import Batch, Family, Tensors
from finetune.recipe import Bucket
from finetune.recipe.schema import Prompt, Vae
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError


@dataclass(frozen=True)
class Request:
    """One video to generate. `text` and `negative` are as `Family.text_encoder` makes them; image uint8 (H, W, 3)."""

    prompt: Prompt
    seed: int
    bucket: Bucket
    text: Tensors
    negative: Tensors
    image: np.ndarray | None


def generate(
    state: StepState,
    requests: Sequence[Request],
    idle: Callable[[], Batch],
    vae: Vae,
    dtype: torch.dtype,
    done: Callable[[int, np.ndarray], None],
) -> None:
    """Generate this rank's videos; ranks may have different numbers of them, or none. Collective.

    A sharded transformer gathers its weights from all ranks whenever it is called. So before each call the ranks ask
    whether anybody still generates, and one that has finished takes part with a batch nobody looks at.

    Args:
        idle: makes a batch of the family's inputs for such calls.
        dtype: compute precision, also of the VAE.
        done: is given the request's index and the frames, uint8 (F, H, W, 3), as soon as they are made.
    Raises:
        UserError: what went wrong on any rank, on all of them.
    """
    runtime, device = state.runtime, state.runtime.device.torch_device
    error: Exception | None = None
    with evaluating(state.transformer):
        try:
            if requests:
                pipeline = live_pipeline(state, vae, dtype)
                for index, request in enumerate(requests):
                    done(index, video(pipeline, state.family, request, device))
                del pipeline
        except Exception as caught:
            error = caught  # raised below, after the other ranks' calls
        inputs: dict[str, Any] | None = None
        while runtime.any(False):
            inputs = inputs or idle().to(device).inputs
            state.family.predict(state.transformer, inputs)
    state.runtime.device.empty_cache()
    with runtime.together():
        if error is not None:
            raise error


@contextmanager
def evaluating(transformer: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards the transformer is as a training step leaves it."""
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train()
        if isinstance(transformer, FSDPModule):
            transformer.reshard()  # a backward pass would have done it


def live_pipeline(state: StepState, vae: Vae, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    """The family's pipeline around the transformer in training; prompts must come encoded."""
    family, device = state.family, state.runtime.device.torch_device
    pipeline = family.pipeline(
        scheduler=family.load_scheduler(),
        vae=OnDemand(family.load_vae(dtype, vae), state.runtime),
        transformer=LiveTransformer(state.transformer, state.runtime, device, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video(pipeline: diffusers.DiffusionPipeline, family: Family, request: Request, device: torch.device) -> np.ndarray:
    """One video, uint8 (F, H, W, 3); its noise is drawn on the CPU, so a seed means the same on every device.

    Raises:
        UserError: it is not finite, or not of the shape that was asked for.
    """
    arguments = call_arguments(family, request.prompt, request.bucket, request.seed, request.image)
    embeddings = {}
    for sign, text in (("", request.text), ("negative_", request.negative)):
        for name, argument in family.text_arguments.items():
            embeddings[sign + argument] = text[name][None].to(device)
    return checked(pipeline(**embeddings, **arguments).frames[0], request.prompt, request.bucket)


def call_arguments(
    family: Family, prompt: Prompt, bucket: Bucket, seed: int, image: np.ndarray | None
) -> dict[str, Any]:
    """Arguments of a pipeline's call, all but the texts."""
    condition = {} if image is None else {"image": Image.fromarray(image)}
    return {
        "num_frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        "num_inference_steps": prompt.steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
        **condition,
        **family.sampling_arguments(prompt),
    }


def checked(frames: np.ndarray, prompt: Prompt, bucket: Bucket) -> np.ndarray:
    """Frames in [0, 1] as uint8. Raises UserError if they hold NaN or have another shape than was asked for."""
    if frames.shape[:3] != tuple(bucket):
        raise UserError(
            f"the video came out as {'x'.join(map(str, frames.shape[:3]))} instead of {bucket}",
            "the VAE's tiles do not fit this shape: set validation.tiling = false",
            prompt.text,
        )
    if not np.isfinite(frames).all():
        raise UserError(
            "the video holds NaN", 'set train.precision = "float32", or use weights that are sound', prompt.text
        )
    return (frames * 255).round().astype(np.uint8)


class LiveTransformer(nn.Module):
    """The transformer in training as a pipeline sees one: it has a device, a dtype and a config, and can be called.

    It is not registered as a submodule, so that nothing a pipeline does to its components reaches it.
    """

    def __init__(self, transformer: nn.Module, runtime: Runtime, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._live = (transformer,)
        self.runtime, self.device, self.dtype = runtime, device, dtype

    @property
    def config(self) -> Any:
        return self._live[0].config

    def cache_context(self, name: str) -> Any:
        return self._live[0].cache_context(name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.runtime.any(True)
        return self._live[0](*arguments, **keywords)


class OnDemand:
    """A VAE that is on the device only while it encodes or decodes."""

    def __init__(self, vae: nn.Module, runtime: Runtime) -> None:
        self._vae, self._device = vae, runtime.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, *arguments: Any, **keywords: Any) -> Any:
        with self._on_device():
            return self._vae.encode(*arguments, **keywords)

    def decode(self, *arguments: Any, **keywords: Any) -> Any:
        with self._on_device():
            return self._vae.decode(*arguments, **keywords)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self._vae.to(self._device.torch_device)
        try:
            yield
        finally:
            self._vae.to("cpu")
            self._device.empty_cache()
