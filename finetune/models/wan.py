"""Wan 2.1 and 2.2 (Wan team 2025): text-to-video, image-to-video, first and last frame, TI2V-5B, and A14B with its two experts.

Training follows diffusers' pipelines in reverse: flow matching on normalised VAE latents, UMT5 embeddings of 512 tokens whose
padding is zeros. The float timestep 1000 sigma is what the pipelines' integers are cut from.

Image-to-video of 2.1 and A14B concatenates the noised latents' channels with a mask and with latents of the video [image, grey
...]; 2.1 attends to the image's CLIP embeddings besides. In TI2V-5B each token has a timestep of its own: the first latent frame is
the image's, clean, at timestep 0 and out of the loss. A14B has two transformers, of which one denoises above the boundary of
model_index.json and the other below.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from finetune.models import original_names, tiny
from finetune.models.batch import Tensors
from finetune.models.components import Expert
from finetune.models.encoder import EncodedImage, Encoder, FileHash
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.sample import SampleLike
from finetune.models.text_limit import TextLimit
from finetune.recipe import Bucket
from finetune.recipe.schema import Data, ExpertName, Model, ObjectiveSettings, Vae
from finetune.runtime.errors import Problem

TEXT_LENGTH = 512  # tokens; with fewer, 2.1 image-to-video would take image tokens for text
_CLIP = ("image_encoder", "image_processor")
_SPATIAL, _TEMPORAL = 8, 4  # compression of VAEs whose configs do not say it


class Wan(Family):
    """Wan 2.1 and 2.2, text-to-video."""

    name = "wan"
    title = "Wan"
    pipeline_classes = ("WanPipeline",)
    transformer_class = "WanTransformer3DModel"
    optional_components: ClassVar[tuple[str, ...]] = ("transformer_2",)
    text_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "prompt_embeds"}
    variants: ClassVar[tuple[str, ...]] = ("2.1", "2.2-5B", "2.2-A14B")
    vae_dtype = torch.float32
    block_lists = ("blocks",)
    original_layers = original_names.WAN

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae = folder.config("vae")
        self.spatial = vae.get("scale_factor_spatial") or _SPATIAL
        self.temporal = vae.get("scale_factor_temporal") or _TEMPORAL
        self.patch_t, self.patch, _ = self.transformer_config["patch_size"]
        self.mean = torch.tensor(vae["latents_mean"]).view(-1, 1, 1, 1)
        self.scale = 1 / torch.tensor(vae["latents_std"]).view(-1, 1, 1, 1)
        self.timestep_of_tokens = _is_5b(folder)

    @classmethod
    def refusal(cls, folder: ModelFolder) -> str | None:
        is_wan = folder.pipeline_class in ("WanPipeline", "WanImageToVideoPipeline")
        return None if is_wan and _is_5b(folder) else super().refusal(folder)  # one folder of 5B is for both pipelines

    @classmethod
    def recipe_for(cls, folder: ModelFolder) -> str | None:
        if _boundary(folder):
            return "wan2.2_a14b"
        if _is_5b(folder):
            return "wan2.2_5b"
        return "wan_1.3b" if folder.config("transformer")["num_layers"] <= 30 else "wan_14b"

    @property
    def experts(self) -> dict[ExpertName, Expert]:
        boundary = _boundary(self.folder)
        if boundary is None:
            return {}
        return {"high": Expert("transformer", (boundary, 1.0)), "low": Expert("transformer_2", (0.0, boundary))}

    def problems(self, model: Model, data: Data) -> list[Problem]:
        where, boundary, has_two = str(self.folder.path), _boundary(self.folder), self.folder.has("transformer_2")
        if boundary is None and has_two:  # then it has experts, though it is not seen to
            what = "it has a transformer_2, and model_index.json does not say from which noise on it denoises"
            cure = 'put "boundary_ratio" back: 0.875 for text-to-video, 0.9 for image-to-video'
            return [Problem(what, where, cure)]
        is_number = isinstance(boundary, float | int) and not isinstance(boundary, bool)
        if boundary is not None and not (is_number and 0 < boundary < 1):
            what = f"the boundary between its experts is no noise level between 0 and 1: boundary_ratio = {boundary!r}"
            return [
                Problem(what, f"{where}/model_index.json", "set it: 0.875 for text-to-video, 0.9 for image-to-video")
            ]
        found = super().problems(model, data)
        if boundary is not None and not has_two:
            what = f"it has a boundary between two experts ({boundary}) and no transformer_2"
            found.append(Problem(what, where, "download the whole folder: the expert for low noise is missing"))
        return found

    def encode_text(self, pipeline: diffusers.DiffusionPipeline, caption: str, device: torch.device) -> Tensors:
        embeds, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, device=device
        )
        return {"encoder_hidden_states": embeds}

    def text_limits(self) -> tuple[TextLimit, ...]:
        return (TextLimit(TEXT_LENGTH, content=_cleaned),)

    def example_text(self, dtype: torch.dtype) -> Tensors:
        return {"encoder_hidden_states": torch.zeros(TEXT_LENGTH, self.transformer_config["text_dim"], dtype=dtype)}

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.mean) * self.scale

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        timestep = level * 1000
        if self.timestep_of_tokens:
            timestep = timestep[:, None].expand(-1, self.tokens(samples[0].bucket))
        return {"hidden_states": noisy.to(text["encoder_hidden_states"].dtype), "timestep": timestep, **text}

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        variant = variant or cls.variants[0]
        tokenizer = tiny.t5_tokenizer(max_length=TEXT_LENGTH)
        vae = _tiny_vae(is_5b=variant == "2.2-5B")
        channels = vae.config["z_dim"]
        concatenates = cls.takes_image and variant != "2.2-5B"
        with_clip = concatenates and variant != "2.2-A14B"

        def transformer() -> WanTransformer3DModel:
            return WanTransformer3DModel(
                num_attention_heads=4 if variant == "2.2-5B" else 2,
                attention_head_dim=24,
                in_channels=2 * channels + 4 if concatenates else channels,
                out_channels=channels,
                text_dim=32,
                freq_dim=32,
                ffn_dim=64,
                num_layers=2,
                image_dim=32 if with_clip else None,
                added_kv_proj_dim=48 if with_clip else None,
                pos_embed_seq_len=2 * tiny.CLIP_TOKENS if variant == "2.1-FLF2V" else None,
            )

        shift = 5.0 if variant == "2.2-5B" else 3.0
        components = {
            "tokenizer": tokenizer,
            "text_encoder": tiny.umt5_encoder(tokenizer, width=32),
            "vae": vae,
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            ),
            "transformer": transformer(),
        }
        if variant == "2.2-A14B":
            components |= {"transformer_2": transformer(), "boundary_ratio": 0.9 if cls.takes_image else 0.875}
        if with_clip:
            components |= {"image_encoder": tiny.clip_image_encoder(32), "image_processor": tiny.clip_image_processor()}
        pipeline = getattr(diffusers, "WanPipeline" if variant == "2.2-5B" else cls.pipeline_classes[0])
        pipeline(**components, expand_timesteps=variant == "2.2-5B").save_pretrained(path)


class WanImageToVideo(Wan):
    """Wan 2.1 and 2.2, image-to-video, and video between a first and a last image."""

    name = "wan_i2v"
    title = "Wan image-to-video"
    pipeline_classes = ("WanImageToVideoPipeline",)
    optional_components = ("transformer_2", *_CLIP)
    variants = ("2.1", "2.1-FLF2V", "2.2-A14B", "2.2-5B")
    takes_image = True

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        config = self.transformer_config
        self.sees_clip = config.get("image_dim") is not None
        # Of 2.1, a checkpoint is for one image or for two; A14B takes either.
        self.is_for_two = config.get("pos_embed_seq_len") is not None
        self.last_image = self.is_for_two

    @classmethod
    def recipe_for(cls, folder: ModelFolder) -> str | None:
        if _boundary(folder):
            return "wan2.2_a14b_i2v"
        if _is_5b(folder):
            return "wan2.2_5b_i2v"
        is_for_two = folder.config("transformer").get("pos_embed_seq_len") is not None
        return "wan_14b_flf2v" if is_for_two else "wan_14b_i2v"

    def problems(self, model: Model, data: Data) -> list[Problem]:
        found = super().problems(model, data)
        if self.sees_clip and not all(map(self.folder.has, _CLIP)):
            what = (
                "its transformer attends to CLIP's image embeddings, and it has no image_encoder or no image_processor"
            )
            found.append(Problem(what, str(self.folder.path), "download the whole folder"))
        return found

    def last_image_problem(self, wanted: bool) -> str | None:
        if self.is_for_two and not wanted:
            return "this checkpoint is made for a first and a last image"
        if wanted and not self.is_for_two and (self.sees_clip or self.timestep_of_tokens):
            return "this checkpoint takes no last image: Wan 2.1 FLF2V and Wan 2.2 A14B do"
        return None

    def unused_keys(self) -> dict[str, str]:
        return super().unused_keys() | {"vae.image_noise": "Wan's condition images have no noise"}

    @property
    def least_frames(self) -> int:
        """In TI2V-5B, which is for text alone, too, a single frame is trained as one without an image."""
        return 1 if self.timestep_of_tokens else self.temporal + 1

    # Encoding

    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        encoders = super().encoders(dtype, settings)
        if not self.timestep_of_tokens:
            load = partial(self.condition_encoder, dtype=dtype, settings=settings)
            facts = partial(self._video_fingerprint, settings)
            encoders += (Encoder("condition", ("video",), ["mode", self.last_image], facts, load),)
        if self.sees_clip:
            sources = ("first_frame", "last_frame") if self.last_image else ("first_frame",)
            load = partial(self.image_encoder, dtype=dtype)
            encoders += (Encoder("image_embeds", sources, "hidden_states[-2]", self._image_fingerprint, load),)
        return encoders

    def condition_encoder(
        self, device: torch.device, dtype: torch.dtype, settings: Vae
    ) -> Callable[[np.ndarray], Tensors]:
        """Load the VAE. Returns a function from uint8 frames (F, H, W, 3) to the mode, (C, F', H', W'), of what is given of them:
        the first and perhaps the last one, with grey ones in between, which are zeros.
        """
        vae = self.load_vae(dtype, settings.tiling).to(device)

        @torch.no_grad()
        def encode(frames: np.ndarray) -> Tensors:
            pixels = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            pixels[:, :, 1 : -1 if self.last_image else None] = 0
            return {"mean": vae.encode(pixels.to(vae.dtype)).latent_dist.mode()[0]}

        return encode

    def image_encoder(self, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensors]:
        """Load CLIP. Returns a function from one or two images, uint8 (H, W, 3), to their embeddings (images, tokens, D)."""
        pipeline = self.pipeline(**{name: self.transformers_component(name, device, dtype) for name in _CLIP})

        @torch.no_grad()
        def encode(*images: np.ndarray) -> Tensors:
            return {"embeds": pipeline.encode_image([Image.fromarray(image) for image in images], device)}

        return encode

    def _image_fingerprint(self, file_hash: FileHash) -> list[Any]:
        return [self.folder.fingerprint(name, file_hash) for name in _CLIP]

    def example(self, bucket: Bucket, dtype: torch.dtype) -> dict[str, Tensors]:
        example = super().example(bucket, dtype)
        if not self.timestep_of_tokens:
            example["condition"] = {"mean": torch.zeros_like(example["video"]["mean"])}
        if self.sees_clip:
            clip = self.folder.config("image_encoder")
            tokens = (clip["image_size"] // clip["patch_size"]) ** 2 + 1
            shape = 1 + self.last_image, tokens, self.transformer_config["image_dim"]
            example["image_embeds"] = {"embeds": torch.zeros(shape, dtype=dtype)}
        return example

    # Training

    @property
    def given_frames(self) -> int:
        return 1 if self.timestep_of_tokens else 0

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        kept = 0.0 if sample.image_dropped else 1.0  # without its image, a sample is text-to-video: nothing is given
        if self.timestep_of_tokens:
            given = torch.zeros(x0.shape[1:])
            given[0] = kept if x0.shape[1] > 1 else 0.0  # a single frame is an image to be made
            return {"given": given, "image": self.normalise(sample.moments["mean"][:, :1].float())}
        frames = x0.shape[1]
        mask = torch.zeros(self.temporal, *x0.shape[1:])  # a channel for each video frame of a latent one
        mask[:, 0] = kept
        if self.last_image:
            mask[-1, frames - 1] = kept
        image = self.normalise(sample.encoded["condition"]["mean"].float()) * kept
        condition = {"channels": torch.cat([mask, image])}
        if self.sees_clip:
            condition["embeds"] = sample.encoded["image_embeds"]["embeds"] * kept
        return condition

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        if self.timestep_of_tokens:
            given = condition["given"]  # (B, F, H, W)
            noisy = torch.where(given[:, None].bool(), condition["image"], noisy)
            inputs = super().inputs(noisy, level, text, {}, samples)
            free = 1 - given[:, :, :: self.patch, :: self.patch].flatten(1)
            return inputs | {"timestep": inputs["timestep"] * free, "encoder_hidden_states_image": None}
        inputs = super().inputs(torch.cat([noisy, condition["channels"]], 1), level, text, {}, samples)
        embeds = condition["embeds"].flatten(0, 1) if self.sees_clip else None  # (B x images, tokens, D)
        return inputs | {"encoder_hidden_states_image": embeds}

    def counted(self, condition: Tensors, target: Tensor) -> Tensor | None:
        return 1 - condition["given"][:, None] if self.timestep_of_tokens else None

    # Generating

    def encoded_components(self, encoded: Mapping[str, Tensors], device: torch.device) -> dict[str, Any]:
        if not self.sees_clip:
            return {}
        embeds = encoded["image_embeds"]["embeds"].to(device)
        processor = self.transformers_component("image_processor", device, embeds.dtype)
        return {"image_processor": processor, "image_encoder": EncodedImage(embeds)}


def _cleaned(caption: str) -> str:
    """A caption as the pipelines tokenize it."""
    from diffusers.pipelines.wan.pipeline_wan import (
        prompt_clean,
    )  # with the text encoder's code, which training needs not

    return prompt_clean(caption)


def _is_5b(folder: ModelFolder) -> bool:
    """Whether each token has its own timestep, as in TI2V-5B."""
    return bool(folder.index.get("expand_timesteps", False))


def _boundary(folder: ModelFolder) -> float | None:
    """The sigma from which on the expert for high noise denoises; None if there is one transformer."""
    return folder.index.get("boundary_ratio")


def _tiny_vae(is_5b: bool) -> AutoencoderKLWan:
    """A VAE of random weights whose latents have about unit variance."""
    arguments: dict[str, Any] = {"z_dim": 4, "dim_mult": [1, 1, 2, 2]}
    if is_5b:
        arguments = {"z_dim": 8, "dim_mult": [1, 2, 2, 2], "decoder_base_dim": 4, "is_residual": True, "patch_size": 2}
        arguments |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    channels = arguments["z_dim"]
    vae = AutoencoderKLWan(
        base_dim=4, num_res_blocks=1, latents_mean=[0.0] * channels, latents_std=[1.0] * channels, **arguments
    )
    vae.quant_conv.bias.data[channels:] = -10  # low log-variances: trained posteriors are narrow
    z = tiny.latents(vae, frames=17, size=64)
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())
    return vae
