"""LTX-Video (HaCohen et al. 2024), 0.9.0 to 0.9.8, text-to-video and image-to-video.

Training follows diffusers' pipelines in reverse: a video becomes normalised VAE latents, packed to one token per latent
pixel. The transformer predicts the velocity noise - x0 at timestep 1000 sigma. RoPE positions are in seconds and pixels.

There are two forms of the model. 0.9.0 and 0.9.1 use LTXPipeline or LTXImageToVideoPipeline. Versions from 0.9.5 on use
LTXConditionPipeline, which takes longer prompts, calls T5 with its mask, and passes positions as coordinates: there the
first latent frame lies at 0 s and covers one video frame. An image condition is the clean first latent frame, at
timestep 0. By default the condition pipeline adds a little noise to it while it samples (`image_cond_noise_scale`);
training does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXVideoTransformer3DModel,
)
from torch import Tensor

from finetune.models import original_names, tiny
from finetune.models.batch import Tensors
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.sample import SampleLike
from finetune.models.text_limit import TextLimit
from finetune.recipe.schema import ObjectiveSettings
from finetune.recipe.validation import Prompt


class LTXVideo(Family):
    """LTX-Video 0.9.0 to 0.9.8, text-to-video."""

    name = "ltx"
    title = "LTX-Video"
    pipeline_classes = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
    transformer_class = "LTXVideoTransformer3DModel"
    attention_masks = "cross"
    least_sampling_steps = 2  # sigmas are stretched to the scheduler's `shift_terminal`: 0 / 0 of a single one
    original_layers = original_names.LTX
    variants = ("0.9.0", "0.9.7")
    read_when_opened = ("vae/*",)  # its weights include the latents' mean and deviation

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae = folder.config("vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        self.spatial = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
        self.temporal = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
        self.scaling_factor = vae["scaling_factor"]
        self.mean = folder.tensor("vae", "latents_mean").float().view(-1, 1, 1, 1)
        self.std = folder.tensor("vae", "latents_std").float().view(-1, 1, 1, 1)
        # Folders of 0.9.5 and 0.9.6 do not name the condition pipeline. They are recognised by their scheduler, which no longer
        # shifts by resolution.
        by_resolution = folder.config("scheduler").get("use_dynamic_shifting", False)
        self.by_coordinates = folder.pipeline_class == "LTXConditionPipeline" or not by_resolution

    @property
    def pipeline_class(self) -> str:
        return "LTXConditionPipeline" if self.by_coordinates else self.pipeline_classes[0]

    def text_limits(self) -> tuple[TextLimit, ...]:
        return (TextLimit(self.text_length),)

    @property
    def text_length(self) -> int:
        """Tokens of a caption: the default of the pipeline's `encode_prompt`."""
        return 256 if self.by_coordinates else 128

    def example_text(self, dtype: torch.dtype) -> Tensors:
        length, width = self.text_length, self.transformer_config["caption_channels"]
        mask = torch.ones(length, dtype=torch.bool)
        return {"encoder_hidden_states": torch.zeros(length, width, dtype=dtype), "encoder_attention_mask": mask}

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.mean) * self.scaling_factor / self.std

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        frames, height, width = noisy.shape[2:]
        timestep = level * 1000
        inputs = {"hidden_states": pack(noisy).to(text["encoder_hidden_states"].dtype), **text}
        if self.by_coordinates:
            seconds = torch.tensor([1.0 / sample.fps for sample in samples])  # per video frame
            return inputs | {"timestep": timestep[:, None], "video_coords": self.coordinates(noisy.shape[2:], seconds)}
        seconds = torch.tensor([self.temporal / sample.fps for sample in samples])  # per latent frame
        return inputs | {
            "timestep": timestep,
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (seconds.view(-1, 1, 1, 1, 1), self.spatial, self.spatial),
        }

    def coordinates(self, shape: Sequence[int], seconds: Tensor) -> Tensor:
        """The seconds and pixels at which each token begins, float32 (B, 3, tokens).

        As in LTXConditionPipeline._scale_video_ids, the first latent frame covers one video frame, the others `temporal`.

        Args:
            shape: latent (frames, height, width).
            seconds: duration of a video frame of each sample, float32 (B,).
        """
        frames, height, width = (torch.arange(size) for size in shape)
        frames = (frames * self.temporal + 1 - self.temporal).clamp(min=0)
        grid = torch.meshgrid(frames, height * self.spatial, width * self.spatial, indexing="ij")
        coordinates = torch.stack(grid).flatten(1).float().repeat(len(seconds), 1, 1)
        coordinates[:, 0] *= seconds[:, None]
        return coordinates

    def target(self, target: Tensor) -> Tensor:
        return pack(target)

    def sampling_arguments(self, prompt: Prompt) -> dict[str, Any]:
        arguments = super().sampling_arguments(prompt) | {"frame_rate": prompt.fps}
        if self.folder.config("vae").get("timestep_conditioning", False):  # from 0.9.1 on; values of the model card
            arguments |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
        return arguments

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        by_coordinates = variant == "0.9.7"
        tokenizer = tiny.t5_tokenizer(max_length=128)
        text_encoder = tiny.t5_encoder(tokenizer, width=32)
        vae = AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(16, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32) if by_coordinates else (16, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            timestep_conditioning=by_coordinates,  # from 0.9.1 on
        )
        vae.encoder.conv_out.conv.bias.data[-1] = -10  # low log-variance, as a trained VAE's posterior is narrow
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
        shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
        lengths = {"base_image_seq_len": 1024, "max_image_seq_len": 4096}
        scheduler = FlowMatchEulerDiscreteScheduler(**({} if by_coordinates else shift | lengths))
        pipeline = LTXConditionPipeline if by_coordinates else getattr(diffusers, cls.pipeline_classes[0])
        pipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(path)


class LTXImageToVideo(LTXVideo):
    """LTX-Video 0.9.0 to 0.9.8, image-to-video: the first frame is given."""

    name = "ltx_i2v"
    pipeline_classes = ("LTXImageToVideoPipeline", "LTXPipeline", "LTXConditionPipeline")
    takes_image = True

    def unused_keys(self) -> dict[str, str]:
        return super().unused_keys() | {"vae.image_noise": "the condition is the clip's own first latent frame"}

    @property
    def given_frames(self) -> int:
        return 1

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        given = torch.zeros(x0.shape[1:])
        # A single frame is an image to be made, as in Lightricks' trainer (_create_first_frame_conditioning_mask).
        given[0] = 0.0 if sample.image_dropped or x0.shape[1] == 1 else 1.0
        return {"given": given, "x0": x0}

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        given = condition["given"].bool()  # (B, F, H, W)
        noisy = torch.where(given[:, None], condition["x0"], noisy)
        inputs = super().inputs(noisy, level, text, {}, samples)
        inputs["timestep"] = level[:, None] * 1000 * (1 - condition["given"].flatten(1))  # (B, tokens)
        return inputs

    def counted(self, condition: Tensors, target: Tensor) -> Tensor | None:
        return 1 - condition["given"].flatten(1)[..., None]


def pack(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, F H W, C): one token per latent pixel, since the released models' patch size is 1."""
    return latents.flatten(2).transpose(1, 2)
