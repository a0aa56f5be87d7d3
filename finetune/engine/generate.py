"""Videos from the transformer as it is in training, sharded and checkpointed, inside the family's diffusers pipeline."""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune.engine.parts import evaluating
from finetune.engine.step import StepState
from finetune.models.adapters.strength import applied
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
        strength: what the trained adapter's contribution is scaled by.
    """

    prompt: ResolvedPrompt
    seed: int
    encoded: Mapping[str, Tensors]
    negative: Tensors
    images: Sequence[np.ndarray] = ()
    strength: float = 1.0


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
    stepped: Callable[[int], None] = lambda index: None,
) -> bool:
    """Generate this rank's videos; ranks may have different numbers of them, or none. Collective.

    A sharded transformer gathers its weights from all ranks whenever it is called. So before each call the ranks vote
    whether anybody still generates, and one that has finished takes part with a batch nobody looks at. With a companion they
    vote which of the two transformers is called next, too.

    Args:
        idle: inputs of the family for such calls.
        tiling: decode in overlapping tiles.
        dtype: compute precision, also of the VAE.
        done: is given the request's index and the frames, uint8 (F, H, W, 3), as soon as they are made.
        stop: whether this rank is asked to end the run; then all give up together.
        stepped: is given the request's index after each of its denoising steps.
    Returns:
        whether all videos were made, on every rank.
    Raises:
        UserError: what went wrong on any rank, on all of them.
    """
    runtime, device = state.runtime, state.runtime.device
    error: Exception | None = None
    turns = Turns(state, idle, stop)
    swapping = state.companion.swapping() if state.companion else nullcontext()
    try:
        with evaluating(state.parts, "samples"), swapping:
            try:
                _videos(turns, requests, tiling, dtype, done, stepped)
            except Interrupted:
                raise
            except Exception as caught:
                if turns.inside:
                    raise  # the other ranks are in the middle of the same call: there is no going on
                error = caught  # raised below, after their calls
                traceback.clear_frames(error.__traceback__)  # and with them what the failed pipeline held
                device.empty_cache()
            turns.finish()
    except Interrupted:
        return False
    finally:
        device.empty_cache()
    with runtime.together():
        if error is not None:
            raise error
    return True


def _videos(
    turns: "Turns",
    requests: Sequence[Request],
    tiling: bool,
    dtype: torch.dtype,
    done: Callable[[int, np.ndarray], None],
    stepped: Callable[[int], None],
) -> None:
    family, device = turns.state.family, turns.state.runtime.device
    if requests:
        pipeline = live_pipeline(turns, tiling, dtype)
    for index, request in enumerate(requests):
        device.reseed(request.seed)  # LTX's VAE draws noise of its own; a step seeds itself
        with applied(turns.transformers.values(), request.strength):
            frames = video(pipeline, family, request, device.torch_device, partial(stepped, index))
        done(index, frames)


def live_pipeline(turns: "Turns", tiling: bool, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    """The family's pipeline around the transformer in training, and its companion; prompts must come encoded."""
    family = turns.state.family
    vae = OnDemand(family.load_vae(dtype, tiling), turns.state.runtime)
    live = {component: LiveTransformer(component, turns, dtype) for component in turns.transformers}
    pipeline = family.pipeline(scheduler=family.load_scheduler(), vae=vae, **live)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told_steps(pipeline: diffusers.DiffusionPipeline, stepped: Callable[[], None]) -> dict[str, Any]:
    """The argument of a pipeline's call with which it calls `stepped` after each denoising step, if it has such an argument."""

    def at_end(pipeline: object, number: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        stepped()
        return tensors

    takes = "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters
    return {"callback_on_step_end": at_end} if takes else {}


def video(
    pipeline: diffusers.DiffusionPipeline,
    family: Family,
    request: Request,
    device: torch.device,
    stepped: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """One video, uint8 (F, H, W, 3); its noise is drawn on the CPU, so a seed means the same on every device.

    Args:
        stepped: is called after each denoising step.
    Raises:
        UserError: it is not finite, or not of the shape that was asked for.
    """
    arguments = call_arguments(family, request.prompt, request.seed, request.images)
    pipeline.register_modules(
        **family.encoded_components(request.encoded, device), **family.prompt_components(request.prompt)
    )
    embeddings = {}
    for sign, text in (("", request.encoded["text"]), ("negative_", request.negative)):
        for name, argument in family.text_arguments.items():
            embeddings[sign + argument] = text[name][None].to(device)
    made = pipeline(**embeddings, **arguments, **told_steps(pipeline, stepped))
    return checked(made.frames[0], request.prompt)


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


class Turns:
    """The calls of the transformers, in an order that all ranks agree on: whenever one of them is called, all ranks call it.

    Attributes:
        transformers: by component: the one in training, and its companion if there is one.
        inside: whether a call, or an exchange of the two, has begun and not ended.
    """

    def __init__(self, state: StepState, idle: Batch, stop: Callable[[], bool]) -> None:
        self.state, self.stop, self.inside = state, stop, False
        self.transformers = {state.family.trained_component: state.transformer}
        if state.companion:
            self.transformers[state.companion.component] = state.companion.transformer
        self._idle = idle
        self._inputs: dict[str, Any] | None = None  # the idle batch's, on the device

    def call(self, component: str, arguments: tuple, keywords: dict[str, Any]) -> Any:
        """Call a transformer when it is its turn. Until then take part in calls of the other."""
        while self._next(component) != component:
            self._take_part()
        with self._going_on():
            return self.transformers[component](*arguments, **keywords)

    def finish(self) -> None:
        """Take part in the calls of the ranks that still generate."""
        while self._next(None):
            self._take_part()

    def _next(self, wanted: str | None) -> str | None:
        """Vote. Returns the component that is called next, which is on the device then; None if all have finished.

        The one on the device is called as long as anybody wants it. So the two are exchanged as rarely as can be.
        """
        *votes, stopping = self.state.runtime.any(*(wanted == name for name in self.transformers), self.stop())
        if stopping:
            raise Interrupted
        asked = [name for name, is_wanted in zip(self.transformers, votes, strict=True) if is_wanted]
        if asked and self._on_device not in asked:
            with self._going_on():
                assert self.state.companion is not None
                self.state.companion.swap()
        return self._on_device if asked else None

    @property
    def _on_device(self) -> str:
        companion = self.state.companion
        return companion.component if companion and companion.is_on_device else self.state.family.trained_component

    def _take_part(self) -> None:
        """Call the transformer on the device with a batch nobody looks at."""
        with self._going_on():
            self._inputs = self._inputs or self._idle.to(self.state.runtime.device.torch_device).inputs
            self.state.family.predict(self.transformers[self._on_device], self._inputs)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False  # not after an error


class LiveTransformer(nn.Module):
    """The transformer in training, or its companion, as a pipeline sees one: it has a device, a dtype and a config, and can be
    called.

    It is not registered as a submodule, so that nothing a pipeline does to its components reaches it.
    """

    def __init__(self, component: str, turns: Turns, dtype: torch.dtype) -> None:
        super().__init__()
        self.component, self.turns, self.dtype = component, turns, dtype
        self.device = turns.state.runtime.device.torch_device

    @property
    def config(self) -> Any:
        return self.turns.transformers[self.component].config

    def cache_context(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """No cache is used in training."""
        return nullcontext()

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.turns.call(self.component, arguments, keywords)


class OnDemand:
    """A VAE that is on the device only while it encodes or decodes."""

    def __init__(self, vae: Any, runtime: Runtime) -> None:
        self._vae, self._device = vae, runtime.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(self._vae.encode, arguments, keywords)

    def decode(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(self._vae.decode, arguments, keywords)

    def _call(self, method: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]) -> Any:
        """Some pipelines move what they encode and decode to where the VAE is between its calls."""
        device = self._device.torch_device
        arguments, keywords = tree_map_only(Tensor, lambda tensor: tensor.to(device), (arguments, keywords))
        with self._on_device():
            return method(*arguments, **keywords)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self._vae.to(self._device.torch_device)
        try:
            yield
        finally:
            self._vae.to("cpu")
            self._device.empty_cache()
