"""HunyuanVideo (Kong et al. 2024), text-to-video.

Training follows diffusers' HunyuanVideoPipeline in reverse: flow matching on VAE latents that are scaled by one factor.
The text is encoded by Llama, inside a prompt template, and by CLIP, pooled. The checkpoint is guidance-distilled, so the
model takes a guidance scale as an input.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from finetune.models import original_names, tiny
from finetune.models.batch import Tensors
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.sample import SampleLike
from finetune.models.text_limit import TextLimit
from finetune.models.text_mask import MARK, TextMask, cut
from finetune.recipe.schema import ObjectiveSettings
from finetune.recipe.validation import Prompt


class HunyuanVideo(Family):
    """HunyuanVideo, text-to-video."""

    name = "hunyuan"
    title = "HunyuanVideo"
    pipeline_classes = ("HunyuanVideoPipeline",)
    transformer_class = "HunyuanVideoTransformer3DModel"
    attention_masks = "padding"
    text_components: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    components: ClassVar[tuple[str, ...]] = ("scheduler", "vae", "transformer", *text_components)
    text_arguments: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
        "pooled_projections": "pooled_prompt_embeds",
    }
    takes_true_guidance = True
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    depth_keys = ("num_layers", "num_single_layers")
    original_layers = original_names.HUNYUAN
    original_spellings = original_names.HUNYUAN_SPELLINGS
    lora_spellings = original_names.HUNYUAN_LORA_SPELLINGS

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae, transformer = folder.config("vae"), self.transformer_config
        self.spatial, self.temporal = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
        self.scaling_factor = vae["scaling_factor"]
        self.patch, self.patch_t = transformer["patch_size"], transformer["patch_size_t"]
        self.guided = transformer["guidance_embeds"]

    def unused_keys(self) -> dict[str, str]:
        keys = super().unused_keys()
        if self.guided:
            del keys["objective.guidance"]
        return keys

    def encode_text(self, pipeline: diffusers.DiffusionPipeline, caption: str, device: torch.device) -> Tensors:
        embeds, pooled, mask = pipeline.encode_prompt(caption, device=device)
        mask = mask.to(embeds.dtype)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def text_limits(self) -> tuple[TextLimit, ...]:
        return llama_limit(256, DEFAULT_PROMPT_TEMPLATE), TextLimit(77, "tokenizer_2")

    def example_text(self, dtype: torch.dtype) -> Tensors:
        config = self.transformer_config
        return {
            "encoder_hidden_states": torch.zeros(256, config["text_embed_dim"], dtype=dtype),
            "encoder_attention_mask": torch.ones(256, dtype=dtype),
            "pooled_projections": torch.zeros(config["pooled_projection_dim"], dtype=dtype),
        }

    def normalise(self, z: Tensor) -> Tensor:
        return z * self.scaling_factor

    def adapt_transformer(self, transformer: HunyuanVideoTransformer3DModel) -> HunyuanVideoTransformer3DModel:
        transformer.text_mask = TextMask(transformer)
        for block in transformer.context_embedder.token_refiner.refiner_blocks:
            block.attn.processor = RefinerAttention(transformer.text_mask)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.processor = JointAttention(transformer.text_mask)
        return transformer

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        return {"guidance": torch.tensor(settings.guidance)} if self.guided else {}

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        dtype = text["encoder_hidden_states"].dtype
        text, needs_mask = cut(text, self.keeps_text_length)
        return {
            "hidden_states": noisy.to(dtype),
            "timestep": level * 1000,
            # Rounded before the product, as in the pipeline.
            "guidance": condition["guidance"].to(dtype) * 1000.0 if self.guided else None,
            **text,
            MARK: not needs_mask,
        }

    def sampling_arguments(self, prompt: Prompt) -> dict[str, Any]:
        arguments = super().sampling_arguments(prompt)
        return arguments if prompt.true_guidance is None else arguments | {"true_cfg_scale": prompt.true_guidance}

    def prompt_problem(self, prompt: Prompt) -> str | None:
        if prompt.guidance is not None and not self.guided:
            return "this checkpoint has no embedded guidance: remove `guidance`, or set `true_guidance` in its place"
        if prompt.negative and prompt.true_guidance is None:
            return "HunyuanVideo's embedded guidance uses no negative prompt: set `true_guidance`, or remove `negative`"
        return super().prompt_problem(prompt)

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny.llama_tokenizer(DEFAULT_PROMPT_TEMPLATE["template"]), tiny.clip_tokenizer()
        vae = tiny_vae()
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            guidance_embeds=True,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
        )
        HunyuanVideoPipeline(
            text_encoder=tiny.llama_encoder(tokenizer, width=32),
            tokenizer=tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny.clip_encoder(tokenizer_2, width=32),
            tokenizer_2=tokenizer_2,
        ).save_pretrained(path)


def llama_limit(tokens: int, template: Mapping[str, Any]) -> TextLimit:
    """What Llama reads of a caption in one of diffusers' templates, whose `crop_start` first tokens the pipeline drops."""
    before, _, behind = template["template"].partition("{}")
    return TextLimit(tokens, template=lambda tokenizer: (before, behind), dropped=template["crop_start"])


def tiny_vae() -> AutoencoderKLHunyuanVideo:
    """A VAE of random weights whose latents have about unit variance."""
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.quant_conv.bias.data[4:] = -10  # low log-variances, as a trained VAE's posterior is narrow
    tiny.scale_latents(vae, frames=17, size=64)
    return vae


class JointAttention(HunyuanVideoAttnProcessor2_0):
    """diffusers' attention, which is given a mask in every call, without it where no text token is masked."""

    def __init__(self, text_mask: TextMask) -> None:
        super().__init__()
        self.text_mask = text_mask

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        mask = attention_mask if self.text_mask.is_needed else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


class RefinerAttention(AttnProcessor2_0):
    """The same of the layers that refine the text before the blocks."""

    def __init__(self, text_mask: TextMask) -> None:
        super().__init__()
        self.text_mask = text_mask

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        mask = attention_mask if self.text_mask.is_needed else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask)
