"""Every family and variant as a tiny pipeline, and recordings of what diffusers' own pipelines do with it."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models import FAMILIES, family_class, text_mask
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.recipe import Bucket
from finetune.recipe.schema import Data, Model, ObjectiveSettings, Vae

CPU = torch.device("cpu")
PROMPT = "a red ball moves to the left over a dark floor"
GUIDANCE = 4.58  # embedded: in bf16 it is not 1000 x 4.58 that the model is told, rounded or not
SEED = 3

VARIANTS = [(name, variant) for name in FAMILIES for variant in family_class(name).variants or (None,)]
# By default a test that is about no variant runs over the first of each family, and those whose code differs most from it.
OTHERS = [("cogvideox", "1.5-5B"), ("hunyuan_i2v", "token_replace"), ("wan", "2.2-5B"), ("wan_i2v", "2.2-5B")]
FIRST = [each for number, each in enumerate(VARIANTS) if each[0] not in {name for name, _ in VARIANTS[:number]}]
MARKED = [each if each in FIRST + OTHERS else pytest.param(each, marks=pytest.mark.full) for each in VARIANTS]


def variants(*names: str) -> list[tuple[str, str | None]]:
    """All variants of some families, for `pytest.mark.parametrize("model", ..., indirect=True)`."""
    return [each for each in VARIANTS if each[0] in names]


def variant_id(variant: object) -> str:
    return "-".join(filter(None, variant)) if isinstance(variant, tuple) else str(variant)


@dataclass(frozen=True)
class TinyModel:
    """A family opened on the tiny pipeline of one of its variants."""

    folder: Path
    family: Family

    @classmethod
    @cache
    def open(cls, folder: Path, name: str) -> "TinyModel":
        family = family_class(name)(ModelFolder(folder))
        family.select(Model(family=name, path=str(folder)), Data(path=folder, buckets=["17x64x96"]))
        return cls(folder, family)

    @property
    def bucket(self) -> Bucket:
        return Bucket(13 if self.family.name == "mochi" else 17, 64, 96)

    @property
    def small(self) -> Bucket:
        """A shape that is cheap to decode; one of CogVideoX knows a single shape."""
        if self.family.folder.config("transformer").get("use_learned_positional_embeddings"):
            return self.bucket
        if self.family.name == "hunyuan15_i2v":  # whose pipeline makes shapes of about one area
            return self.bucket._replace(frames=5)
        return Bucket({"mochi": 7, "hunyuan": 17, "hunyuan_i2v": 17}.get(self.family.name, 9), 32, 32)

    @property
    def replaces_frame(self) -> bool:
        return self.family.folder.config("transformer").get("image_condition_type") == "token_replace"

    @property
    def drops_frame(self) -> bool:
        """Whether the pipeline generates a latent frame in front, and drops it."""
        return self.family.folder.config("transformer").get("image_condition_type") == "latent_concat"

    @property
    def given_frames(self) -> int:
        """Latent frames that the pipeline is given, and training does not count."""
        has_own_timesteps = self.family.takes_image and self.family.folder.index.get("expand_timesteps")
        return int(self.family.name == "ltx_i2v" or bool(has_own_timesteps) or self.replaces_frame)

    @property
    def cuts_timesteps(self) -> bool:
        """Whether the scheduler cuts timesteps to integers; training tells the model 1000 sigma."""
        return self.family.folder.class_name("scheduler") == "UniPCMultistepScheduler"

    @property
    def clip(self) -> np.ndarray:
        """uint8 (F, H, W, 3)."""
        return scene(0, *self.bucket)[0]

    @property
    def shortest_clip(self) -> np.ndarray:
        """uint8 (F, 32, 32, 3), of two latent frames: for the VAE alone, which takes it though the transformer may not."""
        return scene(0, 1 + self.family.temporal, 32, 32)[0]

    @property
    def pipeline_class(self) -> type[diffusers.DiffusionPipeline]:
        return getattr(diffusers, self.family.pipeline_class)

    def pipeline(self, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
        return _pipeline(self.pipeline_class, self.folder, dtype, self.family.vae_dtype or dtype)

    def text(self, caption: str, dtype: torch.dtype = torch.float32, with_image: bool = True) -> dict[str, Tensor]:
        """A caption as the family encodes it, with the clip's first frame if it sees that."""
        return _text(self, caption, dtype, with_image)


@cache
def _pipeline(cls: type, folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    pipeline = cls.from_pretrained(folder, dtype={"default": dtype, "vae": vae_dtype})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def _text(model: TinyModel, caption: str, dtype: torch.dtype, with_image: bool) -> dict[str, Tensor]:
    (encoder,) = (each for each in model.family.encoders(dtype, Vae()) if each.kind == "text")
    sources = {"caption": caption, "first_frame": model.clip[0] if with_image else None}
    return encoder.load(CPU)(*(sources[name] for name in encoder.sources))


@dataclass
class Call:
    """A denoising step of a pipeline: how it calls the transformer, and what that answers."""

    component: str  # which transformer is called
    args: tuple
    kwargs: dict[str, Any]
    latents: Tensor  # float32 (B, C, F, H, W)
    level: Tensor  # (B,) as the family's objective has it
    output: Tensor = field(init=False)


@dataclass
class Generation:
    calls: list[Call]
    frames: Tensor  # latents (1, C, F, H, W), or video (1, F, 3, H, W) in [0, 1]


def adapted(model: TinyModel, dtype: torch.dtype = torch.float32, component: str = "transformer") -> torch.nn.Module:
    """The transformer as training has it, laid out in memory as the pipeline's, which decides the last bits of a product."""
    cls = getattr(diffusers, model.family.transformer_class)
    return model.family.adapt_transformer(cls.from_pretrained(model.folder, subfolder=component, dtype=dtype))


def generator(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(
    model: TinyModel,
    pipeline: diffusers.DiffusionPipeline,
    bucket: Bucket | None = None,
    *,
    prompt: str = PROMPT,
    fps: float = 25.0,
    steps: int = 4,
    output_type: str = "latent",
    answer: Callable[[Call], Tensor] | None = None,
    **arguments: Any,
) -> Generation:
    """Run a pipeline and record it; without classifier-free guidance, on the clip's first frame if it takes an image.

    Latents are those of a bucket as training has it, videos those of a bucket as it is asked for.

    Args:
        answer: what the transformer answers in place of its own output, in the output's layout.
    """
    bucket = bucket or model.bucket
    family, held, calls = model.family, [], []
    transformers = transformers_of(pipeline)

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        index = len(calls)
        latents = held[-1] if held else kwargs["hidden_states"]
        (component,) = (name for name, each in transformers.items() if each is module)
        level = level_of(pipeline.scheduler, index)
        calls.append(Call(component, args, kwargs, unpacked(pipeline, latents, bucket), level))

    def after(module: torch.nn.Module, args: tuple, output: tuple[Tensor]) -> tuple[Tensor] | None:
        calls[-1].output = output[0]
        return None if answer is None else (answer(calls[-1]).to(output[0].dtype),)

    if family.name.startswith("ltx"):
        arguments["frame_rate"] = fps
    if family.takes_image:
        image = family.condition_image(Image.fromarray(scene(0, *bucket)[0][0]), bucket)
        arguments = {"image": image, **arguments}
        if family.pipeline_class == "LTXConditionPipeline":
            arguments["image_cond_noise_scale"] = 0.0
    if family.last_image:
        arguments = {"last_image": Image.fromarray(scene(0, *bucket)[0][-1]), **arguments}
    arguments = {"guidance_scale": GUIDANCE if getattr(family, "guided", False) else 1.0, **arguments}
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if "guidance_scale" not in accepted:
        pipeline.guider = pipeline.guider.new(guidance_scale=arguments.pop("guidance_scale"))
    if "callback_on_step_end" in accepted:  # else the latents are those that the transformer is given
        arguments["callback_on_step_end"] = lambda pipe, index, t, tensors: held.append(tensors["latents"]) or {}
    arguments |= family.shape_arguments(bucket)
    if output_type == "latent":
        arguments["num_frames"] = bucket.frames
    with contextlib.ExitStack() as stack:
        for transformer in transformers.values():
            stack.enter_context(hooks(transformer, before, after))
        frames = pipeline(
            prompt=prompt,
            num_inference_steps=steps,
            **arguments,
            generator=generator(),
            output_type=output_type,
        ).frames
    return Generation(calls, unpacked(pipeline, frames, bucket) if output_type == "latent" else frames)


@cache
def recorded(
    model: TinyModel, dtype: torch.dtype = torch.float32, prompt: str = PROMPT, fps: float = 25.0
) -> Generation:
    """Four steps of the model's pipeline. Copy tensors before changing them."""
    return generate(model, model.pipeline(dtype), prompt=prompt, fps=fps)


def transformers_of(pipeline: diffusers.DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The pipeline's transformers by component: one, or the two experts."""
    named = ((name, pipeline.components.get(name)) for name in ("transformer", "transformer_2"))
    return {name: transformer for name, transformer in named if transformer is not None}


@contextlib.contextmanager
def hooks(module: torch.nn.Module, before: Callable, after: Callable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unpacked(pipeline: diffusers.DiffusionPipeline, latents: Tensor, bucket: Bucket) -> Tensor:
    """Latents as the pipeline holds them, without image channels, as float32 (B, C, F, H, W)."""
    if latents.ndim == 3:
        frames = (bucket.frames - 1) // pipeline.vae_temporal_compression_ratio + 1
        side = pipeline.vae_spatial_compression_ratio
        latents = pipeline._unpack_latents(latents, frames, bucket.height // side, bucket.width // side)
    elif type(pipeline).__name__.startswith("CogVideoX"):
        latents = latents.transpose(1, 2)
    return latents[:, : latent_channels(pipeline)].float()


def latent_channels(pipeline: diffusers.DiffusionPipeline) -> int:
    config = pipeline.vae.config
    return config.get("latent_channels") or config["z_dim"]


def level_of(scheduler: diffusers.SchedulerMixin, index: int) -> Tensor:
    """Noise level of a step of the scheduler's: CogVideoX's timestep, else the share of noise."""
    if isinstance(scheduler, diffusers.CogVideoXDDIMScheduler):
        return scheduler.timesteps[index : index + 1]
    sigma = scheduler.sigmas[index : index + 1]
    return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma


# What training makes of the same latents


@torch.no_grad()
def drawn_image(model: TinyModel, pipeline: diffusers.DiffusionPipeline) -> Tensor:
    """The posterior sample (1, C, 1, H, W) of CogVideoX's condition image: the first of a pipeline's draws."""
    image = Image.fromarray(model.clip[0])
    pixels = pipeline.video_processor.preprocess(image, height=model.bucket.height, width=model.bucket.width)
    pixels = pixels.to(pipeline.vae.dtype)[0][None, :, None]  # by the strides torch chooses the convolution
    return pipeline.vae.encode(pixels).latent_dist.sample(generator())


@torch.no_grad()
def image_mean(model: TinyModel, dtype: torch.dtype) -> Tensor:
    """The mean (C, 1, H, W) of the posterior of HunyuanVideo's condition image."""
    pipeline = model.pipeline(dtype)
    pixels = pipeline.video_processor.preprocess(Image.fromarray(model.clip[0]), *model.bucket[1:]).to(dtype)
    return pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()[0]


@cache
def encoded_clip(model: TinyModel, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The clip whose first frame is the image, by the family's encoders, without its caption."""
    clip = model.clip
    sources = {"video": clip, "first_frame": clip[0], "last_frame": clip[-1]}
    encoders = [each for each in model.family.encoders(dtype, Vae()) if sources.keys() >= set(each.sources)]
    return {each.kind: each.load(CPU)(*(sources[name] for name in each.sources)) for each in encoders}


@dataclass
class Clip:
    """A sample whose noised latents and noise level are those of a step of a generation, and which begins with its image."""

    generation: Generation
    index: int
    text: dict[str, Tensor]
    fps: float = 25.0
    image_dropped: bool = False

    @property
    def call(self) -> Call:
        return self.generation.calls[self.index]


def training_inputs(model: TinyModel, *clips: Clip) -> dict[str, Any]:
    """`Family.inputs` of a batch."""
    samples, conditions = [], []
    noisy = torch.cat([clip.call.latents for clip in clips])
    for clip in clips:
        x0, moments = torch.randn(noisy.shape[1:], generator=generator(clip.index)), {}
        if model.family.name == "cogvideox_i2v":
            z = drawn_image(model, model.pipeline(clip.text["encoder_hidden_states"].dtype))[0].float()
            moments = {"image_mean": z, "image_logvar": torch.full_like(z, -torch.inf)}  # every sample is z
        if model.family.name == "ltx_i2v" and not clip.image_dropped:
            x0[:, 0] = clip.generation.calls[0].latents[0, :, 0]
            noisy[:, :, 0] = 1e3  # training noises the whole clip, and puts the image back
        if model.family.name == "hunyuan_i2v":
            moments = {"image_mean": image_mean(model, clip.text["encoder_hidden_states"].dtype)}
            if model.replaces_frame:
                noisy[:, :, 0] = 1e3
        encoded = {"video": moments}
        if model.family.name in ("hunyuan15_i2v", "wan_i2v"):
            encoded |= encoded_clip(model, clip.text["encoder_hidden_states"].dtype)
            if not clip.image_dropped:
                noisy[:, :, : model.given_frames] = 1e3
        encoded["text"] = clip.text
        sample = Sample(encoded, model.bucket, clip.fps, generator(), image_dropped=clip.image_dropped)
        samples.append(sample)
        conditions.append(model.family.condition(sample, x0, ObjectiveSettings(guidance=GUIDANCE)))
    level = torch.cat([clip.call.level for clip in clips])
    text = text_mask.stacked([clip.text for clip in clips])
    return model.family.inputs(noisy, level, text, stacked(conditions), samples)


def stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def assert_equal(ours: Any, theirs: Any, name: str) -> None:
    """Equal to the last bit, and of the same type and dtype."""
    assert type(ours) is type(theirs), name
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text: f"{name}: {text}")
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs), name
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{name}[{index}]")
    else:
        assert ours == theirs, name
