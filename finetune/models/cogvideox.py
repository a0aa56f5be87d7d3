"""CogVideoX (Yang et al. 2024): 2b, 5b and 1.5-5B text-to-video, 5b-I2V and 1.5-5B-I2V image-to-video.

Training follows diffusers' pipelines in reverse: v-prediction on CogVideoX's own schedule at integer timesteps, latents
(B, F, C, H, W) scaled by one factor, T5 embeddings of 226 tokens without a mask. Version 1.5 takes latent frames in
pairs: if their number is odd, a copy of the first frame is put in front, which the pipeline drops after denoising.
Image-to-video concatenates the first frame's latents, zero-padded in time, to the channels.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor
from torch.nn.functional import pad

from finetune.models import tiny
from finetune.models.batch import Tensors
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.objective import VPrediction
from finetune.models.sample import SampleLike, nearest_bucket, posterior_sample
from finetune.models.text_limit import TextLimit
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae


class CogVideoX(Family):
    """CogVideoX 2b, 5b and 1.5-5B, text-to-video."""

    name = "cogvideox"
    title = "CogVideoX"
    pipeline_classes = ("CogVideoXPipeline",)
    transformer_class = "CogVideoXTransformer3DModel"
    text_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "prompt_embeds"}
    weightings: ClassVar[tuple[str, ...]] = ("none", "min_snr")
    variants: ClassVar[tuple[str, ...]] = ("5b", "2b", "1.5-5B")
    _FRAMES_IN_PAIRS = ("1.5-5B", "1.5-5B-I2V")

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae, self.config = folder.config("vae"), self.transformer_config
        self.spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        self.temporal = int(vae["temporal_compression_ratio"])
        self.scaling_factor = vae["scaling_factor"]
        self.inverted = vae.get("invert_scale_latents", False)  # applies to condition images only
        self.patch = self.config["patch_size"]
        self.patch_t = self.config.get("patch_size_t") or 1

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        frames, height, width = self.vae_shape(bucket)
        return frames + frames % self.patch_t, height, width

    def bucket_problem(self, bucket: Bucket) -> str | None:
        # The number of latent frames must be odd: an even number of them is decoded to too many frames.
        frames, side = 2 * self.temporal, self.spatial * self.patch
        needs = f"{frames}k + 1 frames{self._least_frames_reason()} and sides that {side} divides"
        if self.config.get("use_learned_positional_embeddings"):
            needs = "the shape of its learned positions"
        elif self.patch_t > 1:
            needs += ", at most {} high and {} wide".format(*self._trained_sides)
        nearest = self.nearest_bucket(bucket)
        return None if nearest == bucket else f"this checkpoint needs {needs}; the nearest is {nearest}"

    def nearest_bucket(self, bucket: Bucket) -> Bucket:
        if self.config.get("use_learned_positional_embeddings"):
            return Bucket(self.config["sample_frames"], *self._trained_sides)
        frames, side = 2 * self.temporal, self.spatial * self.patch
        nearest = nearest_bucket(bucket._replace(frames=max(bucket.frames, self.least_frames)), frames, side)
        return Bucket(nearest.frames, *map(min, nearest[1:], self._trained_sides)) if self.patch_t > 1 else nearest

    @property
    def _trained_sides(self) -> tuple[int, int]:
        """Height and width of the checkpoint's own samples, in pixels."""
        return self.config["sample_height"] * self.spatial, self.config["sample_width"] * self.spatial

    def unused_keys(self) -> dict[str, str]:
        why = "CogVideoX predicts v on its own schedule of noise levels"
        return super().unused_keys() | {"objective.shift": why}

    def encode_text(self, pipeline: diffusers.DiffusionPipeline, caption: str, device: torch.device) -> Tensors:
        embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, device=device)
        return {"encoder_hidden_states": embeds}

    def text_limits(self) -> tuple[TextLimit, ...]:
        return (TextLimit(226),)  # the default of `encode_prompt`

    def example_text(self, dtype: torch.dtype) -> Tensors:
        length = self.config.get("max_text_seq_length", 226)
        return {"encoder_hidden_states": torch.zeros(length, self.config["text_embed_dim"], dtype=dtype)}

    def latents(self, moments: Tensors, generator: torch.Generator) -> Tensor:
        return self.pad_front(super().latents(moments, generator))

    def normalise(self, z: Tensor) -> Tensor:
        return z * self.scaling_factor

    def pad_front(self, latents: Tensor) -> Tensor:
        """Repeat the first frame of latents (C, F, H, W) if F is odd and version 1.5 needs an even number."""
        return torch.cat([latents[:, : latents.shape[1] % self.patch_t], latents], 1)

    def latent_mask(self, mask: Tensor, bucket: Bucket) -> Tensor:
        return self.pad_front(super().latent_mask(mask, bucket)[None])[0]  # the repeated frame counts as the frame does

    def objective(self, settings: ObjectiveSettings) -> VPrediction:
        return VPrediction(settings, CogVideoXDDIMScheduler.from_config(self.folder.config("scheduler")))

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        rotary = self.config.get("use_rotary_positional_embeddings", False)
        return {
            "hidden_states": noisy.transpose(1, 2).to(text["encoder_hidden_states"].dtype),
            "timestep": level,
            "image_rotary_emb": self.rope(*noisy.shape[2:]) if rotary else None,
            **text,
        }

    def rope(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """RoPE tables (cos, sin) for latents of a size, each float32 (tokens, head size), as the pipeline prepares them."""
        grid = height // self.patch, width // self.patch
        base = self.config["sample_height"] // self.patch, self.config["sample_width"] // self.patch
        head = self.config["attention_head_dim"]
        if self.patch_t > 1:
            return get_3d_rotary_pos_embed(head, None, grid, frames // self.patch_t, grid_type="slice", max_size=base)
        return get_3d_rotary_pos_embed(head, get_resize_crop_region_for_grid(grid, base[1], base[0]), grid, frames)

    def target(self, target: Tensor) -> Tensor:
        return target.transpose(1, 2)

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        tokenizer = tiny.t5_tokenizer(max_length=226)
        text_encoder = tiny.t5_encoder(tokenizer, width=32)
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 16, 16),
            latent_channels=8,
            layers_per_block=1,
            norm_num_groups=4,
            sample_height=96,
            sample_width=160,
            invert_scale_latents=cls.takes_image and variant in cls._FRAMES_IN_PAIRS,
        )
        vae.encoder.conv_out.conv.bias.data[8:] = -10  # low log-variances: trained posteriors are narrow
        tiny.scale_latents(vae, frames=17, size=64)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=16 if cls.takes_image else 8,
            out_channels=8,
            time_embed_dim=32,
            text_embed_dim=32,
            num_layers=2,
            **cls._variant(variant or cls.variants[0]),
        )
        scheduler = CogVideoXDDIMScheduler(
            beta_end=0.012,
            beta_start=0.00085,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0 if variant == "2b" else 1.0,
            timestep_spacing="trailing",
        )
        pipeline = getattr(diffusers, cls.pipeline_classes[0])
        pipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(path)

    @classmethod
    def _variant(cls, name: str) -> dict[str, Any]:
        """Arguments of the tiny transformer that depend on the checkpoint."""
        shape = {"sample_height": 8, "sample_width": 12, "sample_frames": 17}
        if name == "2b":
            return {**shape, "use_rotary_positional_embeddings": False}
        rotary = {"use_rotary_positional_embeddings": True}
        if name in cls._FRAMES_IN_PAIRS:
            pairs = {
                "sample_height": 16,
                "sample_width": 16,
                "sample_frames": 17,
                "patch_size_t": 2,
                "patch_bias": False,
            }
            return {**pairs, **rotary, "ofs_embed_dim": 32 if cls.takes_image else None}
        return {**shape, **rotary, "use_learned_positional_embeddings": cls.takes_image}


class CogVideoXImageToVideo(CogVideoX):
    """CogVideoX 5b-I2V and 1.5-5B-I2V, image-to-video."""

    name = "cogvideox_i2v"
    title = "CogVideoX image-to-video"
    pipeline_classes = ("CogVideoXImageToVideoPipeline",)
    variants = ("5b-I2V", "1.5-5B-I2V")
    takes_image = True
    moments = ("mean", "logvar", "image_mean", "image_logvar")

    @property
    def least_frames(self) -> int:
        return 2 * self.temporal + 1

    def encode_video(self, vae: diffusers.ModelMixin, video: Tensor, settings: Vae) -> Tensors:
        image = video[:, :, :1]
        if settings.image_noise:
            image = image + noise_of(image)
        posterior = vae.encode(image.to(vae.dtype)).latent_dist
        first = {"image_mean": posterior.mean[0], "image_logvar": posterior.logvar[0]}
        return super().encode_video(vae, video, settings) | first

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        moments = sample.moments
        z = posterior_sample(moments["image_mean"], moments["image_logvar"], sample.generator)  # (C, 1, H, W)
        if sample.image_dropped:
            z = torch.zeros_like(z)
        image = z * (1 / self.scaling_factor if self.inverted else self.scaling_factor)
        return {"image": pad(image, (0, 0, 0, 0, 0, x0.shape[1] - 1))}  # in 1.5, frame 0 is the repeated one

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        inputs = super().inputs(noisy, level, text, {}, samples)
        latents = inputs["hidden_states"]
        image = condition["image"].transpose(1, 2).to(latents.dtype)
        inputs["hidden_states"] = torch.cat([latents, image], 2)
        inputs["ofs"] = None if self.config.get("ofs_embed_dim") is None else latents.new_full((1,), 2.0)
        return inputs


def noise_of(image: Tensor) -> Tensor:
    """Noise exp(N(-3, 0.5)) N(0, 1) in the shape of a float32 image in [-1, 1], seeded by the image's content.

    As in diffusers' train_cogvideox_image_to_video_lora.py.
    """
    content = hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(content))
    strength = torch.exp(-3 + 0.5 * torch.randn((), generator=generator))
    return (strength * torch.randn(image.shape, generator=generator)).to(image.device)
