"""HunyuanVideo image-to-video (Tencent 2025): its two kinds of checkpoints, which diffusers tells apart by `image_condition_type`.

Training follows diffusers' HunyuanVideoImageToVideoPipeline in reverse. Both kinds see the first frame in the text, which Llava
encodes, and as the latents of that frame alone, without noise: not the clip's first latent frame, since the VAE's group norms
span time. A sample whose image is dropped keeps these latents, and has a black image in its text, as the pipeline's negative
prompts have. "latent_concat" (33 channels) has them beside the noised latents, with a mask; its pipeline generates four more frames
in front, and drops them. "token_replace" (16 channels) has them in the place of the first latent frame.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from finetune.models import tiny
from finetune.models.batch import Tensors
from finetune.models.encoder import Encode, Encoder
from finetune.models.folder import ModelFolder
from finetune.models.hunyuan import HunyuanVideo, llama_limit, tiny_vae
from finetune.models.sample import SampleLike
from finetune.models.text_limit import TextLimit
from finetune.models.text_mask import padded
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae
from finetune.runtime.errors import UserError

_INTERLEAVE = {"latent_concat": 2, "token_replace": 4}  # of the image's 576 tokens every second, or every fourth
_TEXT_TOKENS = 252
_BLACK_INTERLEAVE = 2  # of the black image, whatever the kind
HALVED = ("texture", "quantity", "atmosphere", "transitions")  # makes the template as long as with Llama's tokenizer


def text_length(interleave: int) -> int:
    """Tokens of the image, and of the padded caption."""
    return 576 // interleave + _TEXT_TOKENS


class HunyuanVideoImageToVideo(HunyuanVideo):
    """HunyuanVideo-I2V of both kinds."""

    name = "hunyuan_i2v"
    title = "HunyuanVideo image-to-video"
    pipeline_classes = ("HunyuanVideoImageToVideoPipeline",)
    text_components = (*HunyuanVideo.text_components, "image_processor")
    components = (*HunyuanVideo.components, "image_processor")
    variants = ("latent_concat", "token_replace")
    takes_image = True
    moments = ("mean", "logvar", "image_mean")

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        self.kind = self.transformer_config["image_condition_type"]
        self.replaces_frame = self.kind == "token_replace"

    def unused_keys(self) -> dict[str, str]:
        return super().unused_keys() | {
            "vae.image_noise": "the model is given the image without noise",
        }

    @property
    def least_frames(self) -> int:
        return self.temporal + 1

    # Encoding

    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        text, video = super().encoders(dtype, settings)
        return replace(text, sources=("caption", "first_frame"), variant=[text.variant, self.kind]), video

    def text_encoder(self, device: torch.device, dtype: torch.dtype) -> Encode:
        """Load the text encoders. Returns a function from a caption and the first frame, uint8 (H, W, 3), to text tensors.

        Without a frame, it is what the pipeline guides away from: a black image, of which both kinds take every second token.
        """
        pipeline = self.pipeline(
            **{name: self.transformers_component(name, device, dtype) for name in self.text_components}
        )

        @torch.no_grad()
        def encode(caption: str, frame: np.ndarray | None) -> Tensors:
            if "<image>" in caption:
                raise UserError("this caption has the image's token <image> in it", "write it in words", caption)
            image = Image.new("RGB", (16, 16)) if frame is None else Image.fromarray(frame)
            interleave = _BLACK_INTERLEAVE if frame is None else _INTERLEAVE[self.kind]
            embeds, pooled, mask = pipeline.encode_prompt(
                image, caption, device=device, image_embed_interleave=interleave
            )
            return {
                "encoder_hidden_states": embeds[0],
                "encoder_attention_mask": mask[0].to(embeds.dtype),
                "pooled_projections": pooled[0],
            }

        return encode

    def text_limits(self) -> tuple[TextLimit, ...]:
        # Of the 256 tokens that the pipeline keeps, it drops the last four, which are the template's or in their place.
        return llama_limit(_TEXT_TOKENS, DEFAULT_PROMPT_TEMPLATE), *super().text_limits()[1:]

    def example_text(self, dtype: torch.dtype) -> Tensors:
        config, length = self.transformer_config, text_length(_INTERLEAVE[self.kind])
        return {
            "encoder_hidden_states": torch.zeros(length, config["text_embed_dim"], dtype=dtype),
            "encoder_attention_mask": torch.ones(length, dtype=dtype),
            "pooled_projections": torch.zeros(config["pooled_projection_dim"], dtype=dtype),
        }

    def encode_video(self, vae: diffusers.ModelMixin, video: Tensor, settings: Vae) -> Tensors:
        image = vae.encode(video[:, :, :1].to(vae.dtype)).latent_dist
        return super().encode_video(vae, video, settings) | {"image_mean": image.mode()[0]}

    # Training

    @property
    def given_frames(self) -> int:
        return 1 if self.replaces_frame else 0

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        image = self.normalise(sample.moments["image_mean"].float())  # (C, 1, H, W)
        return {"image": image, **super().condition(sample, x0, settings)}

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        image = condition["image"]
        if self.replaces_frame:
            latents = torch.cat([image, noisy[:, :, 1:]], 2)
        else:
            given = torch.cat([image, torch.ones_like(image[:, :1])], 1)  # and the mask
            latents = torch.cat([noisy, pad(given, (0, 0, 0, 0, 0, noisy.shape[2] - 1))], 1)
        if self.keeps_text_length:  # with and without an image
            text = padded(text, text_length(_BLACK_INTERLEAVE))
        return super().inputs(latents, level, text, condition, samples)

    def counted(self, condition: Tensors, target: Tensor) -> Tensor | None:
        if not self.replaces_frame:
            return None
        counted = torch.ones(len(target), 1, target.shape[2], 1, 1)
        counted[:, :, 0] = 0
        return counted

    # Generating

    def shape_arguments(self, shape: Bucket) -> dict[str, int]:
        """Arguments of the pipeline's call; of "latent_concat" it drops the first latent frame's four frames."""
        dropped = 0 if self.replaces_frame else 4
        return super().shape_arguments(shape._replace(frames=shape.frames + dropped))

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        kind = variant or cls.variants[0]
        tokenizer = tiny.llama_tokenizer(DEFAULT_PROMPT_TEMPLATE["template"], begin=2, halved=HALVED)
        tokenizer_2 = tiny.clip_tokenizer()
        vae = tiny_vae()
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4 if kind == "token_replace" else 2 * 4 + 1,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            guidance_embeds=kind == "token_replace",
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
            image_condition_type=kind,
        )
        HunyuanVideoImageToVideoPipeline(
            text_encoder=tiny.llava_encoder(tokenizer, width=32),
            tokenizer=tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny.clip_encoder(tokenizer_2, width=32),
            tokenizer_2=tokenizer_2,
            image_processor=tiny.clip_image_processor(48),
        ).save_pretrained(path)
