"""Mochi 1 (Genmo 2024), text-to-video.

Training follows diffusers' MochiPipeline in reverse. Mochi's time runs from noise to data: the transformer takes the
timestep 1000 (1 - sigma) and predicts x0 - noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from diffusers.models.attention_processor import MochiAttention
from torch import Tensor, nn

from finetune.models import original_names, tiny
from finetune.models.batch import Tensors
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.sample import SampleLike
from finetune.models.text_limit import TextLimit
from finetune.models.text_mask import MARK, TextMask, cut


class Mochi(Family):
    """Mochi 1 preview, text-to-video."""

    name = "mochi"
    title = "Mochi"
    pipeline_classes = ("MochiPipeline",)
    transformer_class = "MochiTransformer3DModel"
    attention_masks = "padding"
    least_sampling_steps = 2  # of its linear-quadratic schedule; a single one divides by 0
    original_layers = original_names.MOCHI
    lora_spellings = original_names.MOCHI_LORA_SPELLINGS
    spatial, temporal, patch = 8, 6, 2  # constants in the pipeline

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae = folder.config("vae")
        self.scaling_factor = vae["scaling_factor"]
        self.mean, self.std = (torch.tensor(vae[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.mean) * self.scaling_factor / self.std

    def text_limits(self) -> tuple[TextLimit, ...]:
        return (TextLimit(256),)  # the default of `encode_prompt`

    def example_text(self, dtype: torch.dtype) -> Tensors:
        width = self.transformer_config["text_embed_dim"]
        mask = torch.ones(256, dtype=torch.bool)
        return {"encoder_hidden_states": torch.zeros(256, width, dtype=dtype), "encoder_attention_mask": mask}

    def adapt_transformer(self, transformer: MochiTransformer3DModel) -> MochiTransformer3DModel:
        transformer.text_mask = TextMask(transformer)
        for block in transformer.transformer_blocks:
            block.attn1.processor = MaskedAttention(transformer.text_mask)
        return transformer

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        dtype = text["encoder_hidden_states"].dtype
        text, needs_mask = cut(text, self.keeps_text_length)
        timestep = ((1 - level) * 1000).to(dtype)
        return {"hidden_states": noisy.to(dtype), "timestep": timestep, **text, MARK: not needs_mask}

    def target(self, target: Tensor) -> Tensor:
        return -target

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        tokenizer = tiny.t5_tokenizer(max_length=256)
        text_encoder = tiny.t5_encoder(tokenizer, width=32)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            latents_mean=(0.0,) * 12,
            latents_std=(1.0,) * 12,
        )
        vae.encoder.norm_out.norm_layer.bias.data.fill_(2.0)
        vae.encoder.proj_out.weight.data[12:] = -0.2  # log-variances of about -10: trained posteriors are narrow
        z = tiny.latents(vae, frames=19, size=64)
        mean, std = z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()
        vae.register_to_config(latents_mean=mean, latents_std=std)
        transformer = MochiTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=32,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=32,
            max_sequence_length=256,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
        MochiPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(path)


class MaskedAttention:
    """Mochi's joint attention with padded text tokens masked out, if there are any, for the whole batch at once.

    diffusers' own processor selects each sample's valid tokens with `nonzero`. That synchronises with the device for every
    sample and block, and its shapes depend on the data. The values here are the same: masked keys get no attention, and
    the attention output of padded tokens is zero.
    """

    def __init__(self, text_mask: TextMask | None = None) -> None:
        """`text_mask`: says whether there are padded tokens; they are looked for in each mask if None."""
        self.text_mask = text_mask

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: Tensor,  # (B, V, D) video
        encoder_hidden_states: Tensor,  # (B, T, D') text
        attention_mask: Tensor,  # bool (B, T)
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # cos, sin: (V, heads, head size / 2)
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        text_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        query = torch.cat([query, text_query], 1).transpose(1, 2)
        key = torch.cat([key, text_key], 1).transpose(1, 2)
        value = torch.cat([attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states)], 1)
        value = heads(value).transpose(1, 2)

        count = hidden_states.shape[1]
        if self.text_mask is None or self.text_mask.is_needed:
            seen = nn.functional.pad(attention_mask.bool(), (count, 0), value=True)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
            mixed = mixed.transpose(1, 2).flatten(2) * seen[..., None]
        else:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        video, text = mixed[:, :count], mixed[:, count:]
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to neighbouring pairs of x (B, V, heads, head size), computed in float32; returns the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
