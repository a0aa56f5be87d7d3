"""Videos from the transformer as it is in training, sharded and checkpointed, inside the family's diffusers pipeline."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from finetune.engine.parts import evaluating
from finetune.engine.step import StepState
from finetune.models.batch import Batch, Tensors
from finetune.models.family import Family
from finetune.recipe.prompts import ResolvedPrompt
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError


@dataclass(frozen=True)
class Request:
    """One video to generate.

    Attributes:
        encoded: what is cached of the prompt and its images, by kind; "text" is as `Family.text_encoder` makes it.
        negative: the negative prompt's text.
        images: uint8 (H, W, 3) each, in their own sizes: none, the first, or the first and the last.
    """

    prompt: ResolvedPrompt
    seed: int
    encoded: Mapping[str, Tensors]
    negative: Tensors
    images: Sequence[np.ndarray] = ()


class Interrupted(Exception):
    """Somebody asked the run to stop while videos were made."""


def generate(
    state: StepState,
    requests: Sequence[Request],
    idle: Batch,
    tiling: bool,
    dtype: torch.dtype,
    done: Callable[[int, np.ndarray], None],
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Generate this rank's videos; ranks may have different numbers of them, or none. Collective.

    A sharded transformer gathers its weights from all ranks whenever it is called. So before each call the ranks vote
    whether anybody still generates, and one that has finished takes part with a batch nobody looks at.

    Args:
        idle: inputs of the family for such calls.
        tiling: decode in overlapping tiles.
        dtype: compute precision, also of the VAE.
        done: is given the request's index and the frames, uint8 (F, H, W, 3), as soon as they are made.
        stop: whether this rank is asked to end the run; then all give up together.
    Returns:
        whether all videos were made, on every rank.
    Raises:
        UserError: what went wrong on any rank, on all of them.
    """
    runtime, device = state.runtime, state.runtime.device
    error: Exception | None = None
    live = LiveTransformer(state.transformer, runtime, dtype, stop)
    try:
        with evaluating(state.parts):
            try:
                _videos(live, state.family, requests, tiling, done)
            except Interrupted:
                raise
            except Exception as caught:
                if live.inside:
                    raise  # the other ranks are in the middle of the same call: there is no going on
                error = caught  # raised below, after their calls
                traceback.clear_frames(error.__traceback__)  # and with them what the failed pipeline held
                device.empty_cache()
            inputs = None
            while live.somebody_generates():
                inputs = inputs or idle.to(device.torch_device).inputs
                state.family.predict(state.transformer, inputs)
    except Interrupted:
        return False
    finally:
        device.empty_cache()
    with runtime.together():
        if error is not None:
            raise error
    return True


def _videos(
    live: "LiveTransformer",
    family: Family,
    requests: Sequence[Request],
    tiling: bool,
    done: Callable[[int, np.ndarray], None],
) -> None:
    if requests:
        pipeline = live_pipeline(live, family, tiling)
    for index, request in enumerate(requests):
        live.runtime.device.reseed(request.seed)  # LTX's VAE draws noise of its own; a step seeds itself
        done(index, video(pipeline, family, request, live.device))


def live_pipeline(live: "LiveTransformer", family: Family, tiling: bool) -> diffusers.DiffusionPipeline:
    """The family's pipeline around the transformer in training; prompts must come encoded."""
    vae = OnDemand(family.load_vae(live.dtype, tiling), live.runtime)
    pipeline = family.pipeline(scheduler=family.load_scheduler(), vae=vae, **{family.trained_component: live})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video(pipeline: diffusers.DiffusionPipeline, family: Family, request: Request, device: torch.device) -> np.ndarray:
    """One video, uint8 (F, H, W, 3); its noise is drawn on the CPU, so a seed means the same on every device.

    Raises:
        UserError: it is not finite, or not of the shape that was asked for.
    """
    arguments = call_arguments(family, request.prompt, request.seed, request.images)
    pipeline.register_modules(**family.encoded_components(request.encoded, device))
    embeddings = {}
    for sign, text in (("", request.encoded["text"]), ("negative_", request.negative)):
        for name, argument in family.text_arguments.items():
            embeddings[sign + argument] = text[name][None].to(device)
    return checked(pipeline(**embeddings, **arguments).frames[0], request.prompt)


def call_arguments(family: Family, prompt: ResolvedPrompt, seed: int, images: Sequence[np.ndarray]) -> dict[str, Any]:
    """Arguments of a pipeline's call, all but the texts."""
    conditions = (family.condition_image(Image.fromarray(image), prompt.shape) for image in images)
    return {
        **family.shape_arguments(prompt.shape),
        "num_inference_steps": prompt.steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
        **dict(zip(("image", "last_image"), conditions, strict=False)),
        **family.sampling_arguments(prompt),
    }


def checked(frames: np.ndarray, prompt: ResolvedPrompt) -> np.ndarray:
    """Frames in [0, 1] as uint8. Raises UserError if they hold NaN or have another shape than was asked for."""
    if frames.shape[:3] != tuple(prompt.shape):
        raise UserError(
            f"the video came out as {'x'.join(map(str, frames.shape[:3]))} instead of {prompt.shape}",
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

    def __init__(self, transformer: nn.Module, runtime: Runtime, dtype: torch.dtype, stop: Callable[[], bool]) -> None:
        super().__init__()
        self._live = (transformer,)
        self.runtime, self.device, self.dtype, self.stop = runtime, runtime.device.torch_device, dtype, stop
        self.inside = False  # whether a call of the transformer has begun and not ended

    @property
    def config(self) -> Any:
        return self._live[0].config

    def cache_context(self, name: str, **keywords: Any) -> Any:
        """No cache is used in training."""
        return nullcontext()

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self._vote(generates=True)
        self.inside = True
        output = self._live[0](*arguments, **keywords)
        self.inside = False
        return output

    def somebody_generates(self) -> bool:
        """Whether another rank is about to call its transformer."""
        return self._vote(generates=False)

    def _vote(self, generates: bool) -> bool:
        anybody, stopping = self.runtime.any(generates, self.stop())
        if stopping:
            raise Interrupted
        return anybody


class OnDemand:
    """A VAE that is on the device only while it encodes or decodes."""

    def __init__(self, vae: Any, runtime: Runtime) -> None:
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
