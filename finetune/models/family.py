"""The contract of a model family: everything that differs from model to model in training.

A family is one file that reads like the model's paper: encode, noise, predict, target. The engine, the data path and
the commands know families only through this class. It implements what most of diffusers' video pipelines have in
common; subclasses implement what depends on a model's own configs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.models import guidance, loss_mask, text_mask
from finetune.models.batch import Batch, Tensors, Term
from finetune.models.components import Components
from finetune.models.element_error import ElementError
from finetune.models.encoder import Encoder, FileHash
from finetune.models.noise_range import restricted
from finetune.models.objective import LEAST_U, FlowMatching, Objective, quarters_of, recipe_shift
from finetune.models.original_names import Layers
from finetune.models.sample import SampleLike, nearest_bucket, posterior_sample, stacked
from finetune.models.text_limit import TextLimit
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae
from finetune.recipe.validation import Prompt
from finetune.runtime.errors import UserError

MAIN = "video"  # name of the loss term in families that have only one


class Family(Components, ABC):
    """A model family, opened on one checkpoint. The constructor reads only configs and a few small tensors.

    Subclasses set `spatial` and `temporal`, the compression factors of the VAE. They also set `patch` and `patch_t`, the
    latent pixels per side and the latent frames of a video token, where these differ from 1.
    """

    # The transformer's argument -> the pipeline's, for each text tensor. Those of negative prompts have the prefix "negative_".
    text_arguments: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    variants: ClassVar[tuple[str, ...]] = ()  # checkpoints that differ in more than size; `tiny` builds the first
    columns: ClassVar[tuple[str, ...]] = ()  # the manifest's columns that batches are made of, besides what is encoded
    takes_image: ClassVar[bool] = False  # whether the pipeline takes a condition image
    least_sampling_steps: ClassVar[int] = 1  # that the pipeline's schedule can be made of
    takes_true_guidance: ClassVar[bool] = False  # whether it takes classifier-free besides embedded guidance
    moments: ClassVar[tuple[str, ...]] = ("mean", "logvar")  # names of the tensors cached of a video
    attention_masks: ClassVar[text_mask.Masks] = "never"  # when attention in the blocks has a mask
    weightings: ClassVar[tuple[str, ...]] = ("none", "sigma_sqrt", "cosmap")  # those of `objective`
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)  # checkpointed, compiled, sharded per block
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers",)  # the config's keys of those lists' lengths
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    high_precision: ClassVar[str] = "norm"  # regular expression of layers in a block that are never quantised
    # Names of layers in the model's own repository, where they are not diffusers'; none if ComfyUI has not this model.
    original_layers: ClassVar[Layers] = {}
    # Parts of such names as other repositories have them -> as above; and parts as above -> as a LoRA is to be written, where
    # other tools know only that.
    original_spellings: ClassVar[Mapping[str, str]] = {}
    lora_spellings: ClassVar[Mapping[str, str]] = {}
    spatial: int
    temporal: int
    patch: int = 1
    patch_t: int = 1

    # Shapes

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents, under either of the names that diffusers' VAEs have for it in their configs."""
        config = self.folder.config("vae")
        for key in ("latent_channels", "z_dim"):
            if key in config:
                return config[key]
        raise UserError(
            "the VAE's config does not say how many channels its latents have", "define `latent_channels`", self.name
        )

    def vae_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """(frames, height, width) of the latents that the VAE makes of a bucket."""
        return (bucket.frames - 1) // self.temporal + 1, bucket.height // self.spatial, bucket.width // self.spatial

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """(frames, height, width) of the latents that the transformer takes for a bucket."""
        return self.vae_shape(bucket)

    def tokens(self, bucket: Bucket) -> int:
        """Number of video tokens that the transformer attends over for a bucket."""
        frames, height, width = self.latent_shape(bucket)
        return frames // self.patch_t * (height // self.patch) * (width // self.patch)

    @property
    def least_frames(self) -> int:
        """The fewest frames that it can be trained at. Families whose first frame is given in full may need more than one."""
        return 1

    def bucket_problem(self, bucket: Bucket) -> str | None:
        """Why the model cannot be trained at a bucket, with the nearest bucket that works; None if it can."""
        nearest = self.nearest_bucket(bucket)
        if nearest == bucket:
            return None
        frames, side = self.temporal, self.spatial * self.patch
        needed = f"{frames}k + 1 frames{self._least_frames_reason()} and sides that {side} divides"
        return f"{self.title} needs {needed}; the nearest is {nearest}"

    def nearest_bucket(self, bucket: Bucket) -> Bucket:
        """The bucket that the model can be trained at whose frames, height and width are nearest, each by itself."""
        long_enough = bucket._replace(frames=max(bucket.frames, self.least_frames))
        return nearest_bucket(long_enough, self.temporal, self.spatial * self.patch)

    def _least_frames_reason(self) -> str:
        return f", at least {self.least_frames} because those of its images are given," if self.least_frames > 1 else ""

    def unused_keys(self) -> dict[str, str]:
        """Recipe keys that have no effect with this checkpoint, each with the reason."""
        keys = {"objective.guidance": f"{self.title} takes no guidance embedding"}
        if not self.takes_image:
            keys["data.image_dropout"] = keys["vae.image_noise"] = f"{self.title} takes no condition image"
        return keys

    # Encoding

    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        """The encoders of a clip, one for each kind of cached item, in the order in which they run.

        Every family has the kinds "text", of the caption and perhaps frames, and "video"; "image" is the kind of prompts' images.
        The kind "mask", of loss masks, comes on top, unless an encoder here takes the source "mask".
        The key of a cached item has an outside family's name and the code of `code_of` in it, but not of what that imports.

        Args:
            dtype: compute precision of the encoders.
        """
        text = partial(self.text_encoder, dtype=dtype)
        video = partial(self.video_encoder, dtype=dtype, settings=settings)
        return (
            # The pipeline's class is part of the key, because pipelines differ in `encode_prompt`.
            Encoder("text", ("caption",), self.pipeline_class, self._text_fingerprint, text),
            Encoder("video", ("video",), self.moments, partial(self._video_fingerprint, settings), video),
        )

    def _text_fingerprint(self, file_hash: FileHash) -> list[Any]:
        return [[self.folder.fingerprint(name, file_hash) for name in self.text_components], self.pipeline_options]

    def _video_fingerprint(self, settings: Vae, file_hash: FileHash) -> list[Any]:
        return [[self.folder.fingerprint("vae", file_hash), settings.tiling, settings.image_noise]]

    def text_encoder(self, device: torch.device, dtype: torch.dtype) -> Callable[[str], Tensors]:
        """Load the text encoders. Returns a function from a caption to the transformer's text tensors, without batch dimension."""
        pipeline = self.pipeline(
            **{name: self.transformers_component(name, device, dtype) for name in self.text_components}
        )

        @torch.no_grad()
        def encode(caption: str) -> Tensors:
            return {name: tensor[0] for name, tensor in self.encode_text(pipeline, caption, device).items()}

        return encode

    def encode_text(self, pipeline: diffusers.DiffusionPipeline, caption: str, device: torch.device) -> Tensors:
        """Encode one caption with the pipeline's `encode_prompt`: tensors (1, ...) by the names of the transformer's arguments."""
        embeds, mask, _, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, device=device)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def text_limits(self) -> tuple[TextLimit, ...]:
        """How much of a caption each text encoder reads; none if that is not known."""
        return ()

    def video_encoder(self, device: torch.device, dtype: torch.dtype, settings: Vae) -> Callable[[np.ndarray], Tensors]:
        """Load the VAE. Returns a function from uint8 frames (F, H, W, 3) to the posterior's moments, each (C, F', H', W').

        That function raises UserError if tiling gives latents of a wrong shape.
        """
        vae = self.load_vae(dtype, settings.tiling).to(device)

        @torch.no_grad()
        def encode(frames: np.ndarray) -> Tensors:
            pixels = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None]  # (1, 3, F, H, W) uint8
            moments = self.encode_video(vae, pixels.float() / 127.5 - 1, settings)
            if moments["mean"].shape[1:] != self.vae_shape(Bucket(*frames.shape[:3])):
                shape = "x".join(map(str, frames.shape[:3]))
                raise UserError(
                    f"the VAE's tiles do not fit {shape}: the latents come out wrong",
                    "set vae.tiling = false",
                    "vae.tiling",
                )
            return moments

        return encode

    def encode_video(self, vae: diffusers.ModelMixin, video: Tensor, settings: Vae) -> Tensors:
        """The posterior's mean and logvar, each (C, F', H', W'), of a video, float32 (1, 3, F, H, W) in [-1, 1]."""
        posterior = vae.encode(video.to(vae.dtype)).latent_dist
        return {"mean": posterior.mean[0], "logvar": posterior.logvar[0]}

    def latents(self, moments: Tensors, generator: torch.Generator) -> Tensor:
        """A sample of the posterior, normalised for the transformer: float32 (C, F', H', W')."""
        return self.normalise(posterior_sample(moments["mean"], moments["logvar"], generator))

    @abstractmethod
    def normalise(self, z: Tensor) -> Tensor:
        """Normalise VAE latents (C, F', H', W') for the transformer: the inverse of what the pipeline does before decoding."""

    # Training

    def objective(self, settings: ObjectiveSettings) -> Objective:
        """The objective over all noise levels, with the settings in the recipe's [objective]."""
        return FlowMatching(settings, recipe_shift(settings, self.folder.config("scheduler")))

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """The sigma, [low, high), that the trained component is for: the range of a training whose recipe names none. None: all."""
        return None if self.expert is None else self.experts[self.expert].noise_range

    def training_objective(self, settings: ObjectiveSettings) -> Objective:
        """The objective that is trained: `objective` in the recipe's range of noise levels, or else in the checkpoint's."""
        return restricted(self.objective(settings), settings.sigma_range or self.noise_range)

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        """The transformer's further inputs for one sample, besides noised latents and text: images, controls, guidance.

        Args:
            x0: the sample's clean latents, float32 (C, F', H', W').
        Returns:
            tensors without a batch dimension; `inputs` and `counted` take them stacked.
        """
        return {}

    @abstractmethod
    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        """The transformer's keyword arguments for noised latents (B, C, F', H', W') at noise levels (B,)."""

    def target(self, target: Tensor) -> Tensor:
        """The objective's target (B, C, F', H', W') in the layout and sign of the model's output."""
        return target

    def counted(self, condition: Tensors, target: Tensor) -> Tensor | None:
        """Which elements of the target enter the loss, float32 0 or 1, broadcastable to it; None if all do. Masks come on top."""
        return None

    @property
    def given_frames(self) -> int:
        """Latent frames at a clip's start that the model is given as a condition, and that `counted` leaves out of the loss."""
        return 0

    def latent_mask(self, mask: Tensor, bucket: Bucket) -> Tensor:
        """The weight of each latent pixel in the loss, float32 (F', H', W') in `latent_shape`: the mean of a mask over its frames
        and pixels, of which the VAE encodes the first frame alone and then `temporal` frames together.

        Args:
            mask: uint8 (F, H, W), or (1, H, W) for a mask that holds for all frames.
        """
        return loss_mask.averaged(mask, self.vae_shape(bucket), self.temporal)

    def target_mask(self, mask: Tensor) -> Tensor:
        """Weights of latent pixels, float32 (B, 1, F', H', W'), in the layout of the target, so that they broadcast to it."""
        return self.target(mask).abs()  # `target` moves elements, and may negate them

    def predict(self, transformer: nn.Module, inputs: dict[str, Any]) -> Tensors:
        """The transformer's outputs for `Batch.inputs`, by the names of the batch's loss terms."""
        return {MAIN: text_mask.call(transformer, inputs)}

    def batch(self, samples: Sequence[SampleLike], objective: Objective, u: Tensor | None = None) -> Batch:
        """Make a batch of samples of one bucket: draw latents, noise and a noise level for each, and assemble the inputs.

        Args:
            u: each sample's quantile of the distribution of noise levels, float32 (B,) in (0, 1); random if None.
        """
        x0, noise, drawn, conditions = [], [], [], []
        for sample in samples:
            x0.append(self.latents(sample.moments, sample.generator))
            noise.append(torch.randn(x0[-1].shape, generator=sample.generator))
            drawn.append(torch.rand((), generator=sample.generator))
            if objective.settings.stratified:
                position, count = sample.stratum
                drawn[-1] = (position + drawn[-1]) / count
            conditions.append(self.condition(sample, x0[-1], objective.settings))
        if u is None:
            u = torch.stack(drawn).clamp(LEAST_U, 1 - LEAST_U)
        tokens = self.tokens(samples[0].bucket)
        level = objective.level(u, tokens)
        noisy, target = objective.noised(torch.stack(x0), torch.stack(noise), level)
        text, condition = text_mask.stacked([sample.text for sample in samples]), stacked(conditions)
        target = self.target(target)
        inputs = self.inputs(noisy, level, text, condition, samples)
        counted = self.counted(condition, target)
        if (mask := loss_mask.stacked(samples, x0[0].shape[1:])) is not None:
            counted = loss_mask.combined(self.target_mask(mask), counted)
        settings, quarters = objective.settings, quarters_of(level, objective, tokens)
        terms = {MAIN: Term(target, objective.weight(level), counted, ElementError.of(settings))}
        if settings.guidance_target is None:
            return Batch(inputs, terms, quarters=quarters).contiguous()
        blanks = guidance.blanks(samples)
        others = self.inputs(noisy, level, text_mask.stacked(blanks), condition, samples)
        scales = guidance.scales(samples, blanks, settings.guidance_target)
        return Batch(inputs, terms, guidance.differing(others, inputs), scales, quarters).contiguous()

    def example(self, bucket: Bucket, dtype: torch.dtype) -> dict[str, Tensors]:
        """Zeros in the shapes and dtypes of the tensors that are cached of a clip, by kind."""
        channels, shape = self.latent_channels, self.vae_shape(bucket)
        moments = {}
        for name in self.moments:
            frames = 1 if name.startswith("image_") else shape[0]
            moments[name] = torch.zeros(channels, frames, *shape[1:], dtype=self.vae_dtype or dtype)
        return {"video": moments, "text": self.example_text(dtype)}

    @abstractmethod
    def example_text(self, dtype: torch.dtype) -> Tensors:
        """Zeros in the shapes and dtypes of an encoded caption, without a batch dimension, derived from configs alone."""

    # Generating

    def shape_arguments(self, shape: Bucket) -> dict[str, int]:
        """Arguments of the pipeline's call for a video of this shape."""
        return {"num_frames": shape.frames, "height": shape.height, "width": shape.width}

    def condition_image(self, image: Image.Image, shape: Bucket) -> Image.Image:
        """A condition image as the pipeline is given it for a video of this shape, which resizes it itself."""
        return image

    def encoded_components(self, encoded: Mapping[str, Tensors], device: torch.device) -> dict[str, Any]:
        """Components of the pipeline that stand for what is cached of a prompt, by kind, and need no weights."""
        return {}

    def sampling_arguments(self, prompt: Prompt) -> dict[str, Any]:
        """Arguments of the pipeline's call for a prompt that depend on the family."""
        scales = {"guidance_scale": prompt.guidance, "guidance_scale_2": prompt.guidance_2}
        return {name: scale for name, scale in scales.items() if scale is not None}

    def prompt_components(self, prompt: Prompt) -> dict[str, Any]:
        """Components of the pipeline that hold what it takes of a prompt in other ways than as arguments of its call."""
        return {}

    def prompt_problem(self, prompt: Prompt) -> str | None:
        """Why the pipeline cannot generate a prompt; None if it can."""
        if self.takes_image and prompt.image is None:
            return f"{self.title} needs a condition image: set `image` to a file, an http(s) address or a training clip"
        if prompt.images and not self.takes_image:
            return f"{self.title} takes no condition image: remove `image`"
        if self.takes_image and self.least_frames == 1 and prompt.shape is not None and prompt.shape.frames == 1:
            return "one frame would be the condition image itself: set `shape` to one with more frames"
        if prompt.steps < self.least_sampling_steps:
            return f"{self.title}'s pipeline needs at least {self.least_sampling_steps} denoising steps: set `steps` so"
        if bool(prompt.last_image) != self.last_image:
            if self.last_image:
                return f"set `last_image`, which {self.title} takes here"
            could = self.takes_image and self.last_image_problem(True) is None
            return "remove `last_image`" + (", or set data.last_image = true" if could else "")
        if prompt.guidance_2 is not None and not self.experts:
            return f"{self.title} has no second expert here: remove `guidance_2`"
        if prompt.true_guidance is not None and not self.takes_true_guidance:
            return f"{self.title} takes no `true_guidance`: use `guidance`"
        return None

    @classmethod
    @abstractmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        """Save a complete pipeline with random weights at `path`: a few MB, with a real tokenizer and VAE.

        Args:
            variant: one of `variants`; the first if None.
        """
