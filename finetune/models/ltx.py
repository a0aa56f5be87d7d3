"""LTX-Video (HaCohen et al. 2024): checkpoints saved in the form of LTXPipeline, text-to-video.

Training inverts diffusers' LTXPipeline: a video becomes normalised VAE latents, packed to one token per latent pixel;
the transformer is asked for the velocity noise - x0 at timestep 1000 sigma; RoPE is given in seconds and pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor

from finetune.models import tiny
from finetune.models.family import Family, SampleLike, Tensors
from finetune.models.folder import ModelFolder
from finetune.models.objective import FlowMatching, constant_shift, scheduler_shift
from finetune.recipe import Bucket
from finetune.recipe.schema import Objective, Vae


class LTXVideo(Family):
    name = "ltx"
    pipeline_class = "LTXPipeline"
    transformer_class = "LTXVideoTransformer3DModel"

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae = folder.config("vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        self.spatial = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
        self.temporal = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
        self.scaling_factor = vae["scaling_factor"]
        self.mean = folder.tensor("vae", "latents_mean").float().view(-1, 1, 1, 1)
        self.std = folder.tensor("vae", "latents_std").float().view(-1, 1, 1, 1)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Latent frames, height and width of a bucket."""
        return (bucket.frames - 1) // self.temporal + 1, bucket.height // self.spatial, bucket.width // self.spatial

    def tokens(self, bucket: Bucket) -> int:
        frames, height, width = self.latent_shape(bucket)
        return frames * height * width

    def bucket_problem(self, bucket: Bucket) -> str | None:
        nearest = Bucket(
            round((bucket.frames - 1) / self.temporal) * self.temporal + 1,
            max(1, round(bucket.height / self.spatial)) * self.spatial,
            max(1, round(bucket.width / self.spatial)) * self.spatial,
        )
        if nearest == bucket:
            return None
        return f"LTX-Video needs {self.temporal}k + 1 frames and sides that {self.spatial} divides; the nearest is {nearest}"

    def text_encoder(self, device: torch.device, dtype: torch.dtype) -> Callable[[str], Tensors]:
        from transformers import AutoTokenizer, T5EncoderModel

        encoder = T5EncoderModel.from_pretrained(self.folder.path / "text_encoder", dtype=dtype).to(device)
        tokenizer = AutoTokenizer.from_pretrained(self.folder.path / "tokenizer")
        pipeline = LTXPipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)

        @torch.no_grad()
        def encode(caption: str) -> Tensors:
            embeds, mask, _, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, device=device)
            return {"encoder_hidden_states": embeds[0], "encoder_attention_mask": mask[0]}

        return encode

    def video_encoder(self, device: torch.device, dtype: torch.dtype, vae: Vae) -> Callable[[np.ndarray], Tensors]:
        model = AutoencoderKLLTXVideo.from_pretrained(self.folder.path, subfolder="vae", dtype=dtype).to(device)
        if vae.slicing:
            model.enable_slicing()
        if vae.tiling:
            model.enable_tiling()

        @torch.no_grad()
        def encode(frames: np.ndarray) -> Tensors:
            video = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None]  # (1, 3, F, H, W) uint8
            posterior = model.encode((video.float() / 127.5 - 1).to(dtype)).latent_dist
            return {"mean": posterior.mean[0], "logvar": posterior.logvar[0]}

        return encode

    def latents(self, moments: Tensors, generator: torch.Generator) -> Tensor:
        mean, logvar = moments["mean"].float(), moments["logvar"].float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        return (z - self.mean) * self.scaling_factor / self.std

    def objective(self, settings: Objective) -> FlowMatching:
        scheduler = self.folder.config("scheduler")
        shift = scheduler_shift(scheduler) if settings.shift == "scheduler" else constant_shift(settings.shift)
        return FlowMatching(settings, shift)

    def inputs(self, noisy: Tensor, sigma: Tensor, text: Tensors, samples: Sequence[SampleLike]) -> dict[str, Any]:
        frames, height, width = noisy.shape[2:]
        seconds = torch.tensor([self.temporal / sample.fps for sample in samples]).view(
            -1, 1, 1, 1, 1
        )  # of a latent frame
        return {
            "hidden_states": pack(noisy).to(text["encoder_hidden_states"].dtype),
            "timestep": sigma * 1000,
            **text,
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (seconds, self.spatial, self.spatial),
        }

    def target(self, target: Tensor) -> Tensor:
        return pack(target)

    def sampling_arguments(self, fps: float) -> dict[str, Any]:
        if self.folder.config("vae")["timestep_conditioning"]:  # from 0.9.1; values of the model's card
            return {"frame_rate": fps, "decode_timestep": 0.05, "decode_noise_scale": 0.025}
        return {"frame_rate": fps}

    @classmethod
    def tiny(cls, path: Path, seed: int = 0) -> None:
        torch.manual_seed(seed)
        tokenizer = tiny.t5_tokenizer(max_length=128)
        text_encoder = tiny.t5_encoder(tokenizer, width=32)
        vae = AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(16, 32, 32, 32),
            decoder_block_out_channels=(16, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
        vae.encoder.conv_out.conv.bias.data[-1] = -10  # the log-variance channel: a trained VAE's posterior is narrow
        tiny.normalise_latents(vae, frames=17, size=64)
        transformer = LTXVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=32,
            num_layers=2,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        )
        LTXPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(path)


def pack(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, F H W, C): one token a latent pixel (the released models' patch size is 1)."""
    return latents.flatten(2).transpose(1, 2)
