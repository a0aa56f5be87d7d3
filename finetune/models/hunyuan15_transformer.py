"""HunyuanVideo-1.5's transformer without branches that depend on data, and with a mask only where tokens are padded.

diffusers' own forward pass sorts each sample's valid text tokens to the front, asks whether the batch has images, and builds a mask
(B, 1, S, S) in every block. Each waits for the device, none works on tensors without data, and at 480p the mask takes 2.6 GB.
Text has no positions in the blocks, so its order changes nothing: here padded tokens stay where they are, and no token attends to
them. Whether a sample has an image is asked for each sample, not for the batch.
"""

from types import MethodType
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TokenRefiner
from diffusers.utils import apply_lora_scale
from torch import Tensor
from torch.nn import functional

from finetune.models.text_mask import TextMask

TEXT, GLYPHS, IMAGE = range(3)  # rows of `cond_type_embed`


def adapt(transformer: HunyuanVideo15Transformer3DModel) -> HunyuanVideo15Transformer3DModel:
    """Give a transformer the forward pass and the attention of this file, in place."""
    transformer.text_mask = TextMask(transformer)
    transformer.forward = MethodType(forward, transformer)
    for block in transformer.transformer_blocks:
        block.attn.processor = PaddedJointAttention()
    return transformer


@apply_lora_scale("attention_kwargs")
def forward(
    self: HunyuanVideo15Transformer3DModel,
    hidden_states: Tensor,  # (B, C, F, H, W)
    timestep: Tensor,  # (B,) in the dtype of the weights
    encoder_hidden_states: Tensor,  # (B, T, D)
    encoder_attention_mask: Tensor,  # (B, T), 1 for valid tokens
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,  # (B, G, D'), glyphs
    encoder_attention_mask_2: Tensor | None = None,  # (B, G)
    image_embeds: Tensor | None = None,  # (B, I, D''): all zeros are no image, and so is None
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> tuple[Tensor] | Transformer2DModelOutput:
    """The transformer's forward pass, with diffusers' arguments."""
    assert encoder_hidden_states_2 is not None  # the pipelines always pass both, as diffusers' own forward demands
    assert encoder_attention_mask_2 is not None
    is_masked = self.text_mask.is_needed
    positions = self.rope(hidden_states)
    time = self.time_embed(timestep, timestep_r=timestep_r)
    video = self.x_embedder(hidden_states)

    kinds = self.cond_type_embed.weight
    padding = encoder_attention_mask if is_masked else None
    text = refined(self.context_embedder, encoder_hidden_states, timestep, padding)
    streams = [self.context_embedder_2(encoder_hidden_states_2) + kinds[GLYPHS], text + kinds[TEXT]]
    masks = [encoder_attention_mask_2.bool(), encoder_attention_mask.bool()]
    if image_embeds is not None:
        streams.insert(0, self.image_embedder(image_embeds) + kinds[IMAGE])
        is_given = (image_embeds != 0).flatten(1).any(1, keepdim=True)
        masks.insert(0, is_given.expand(image_embeds.shape[:2]))
    condition = torch.cat(streams, 1)
    seen = functional.pad(torch.cat(masks, 1), (video.shape[1], 0), value=True)[:, None, None] if is_masked else None

    for block in self.transformer_blocks:
        video, condition = block(video, condition, time, seen, positions)
    output = unpatched(self.proj_out(self.norm_out(video, time)), self.config, hidden_states.shape)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def unpatched(tokens: Tensor, config: Any, shape: torch.Size) -> Tensor:
    """Predictions of tokens (B, N, C p_t p p) as a video (B, C, F, H, W); `shape` is that of the model's input."""
    p_t, p = config.patch_size_t, config.patch_size
    video = tokens.reshape(shape[0], shape[2] // p_t, shape[3] // p, shape[4] // p, -1, p_t, p, p)
    return video.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def refined(refiner: HunyuanVideo15TokenRefiner, text: Tensor, timestep: Tensor, mask: Tensor | None) -> Tensor:
    """The refiner's output for text (B, T, D), of whose tokens those are padding where the mask (B, T) is 0."""
    if mask is None:
        pooled, seen = text.mean(1), None
    else:
        valid = mask.float()[..., None]
        pooled, seen = ((text * valid).sum(1) / valid.sum(1)).to(text.dtype), mask.bool()[:, None, None]
    time = refiner.time_text_embed(timestep, pooled)
    text = refiner.proj_in(text)
    for block in refiner.token_refiner.refiner_blocks:
        text = block(text, time, seen)
    return text


class PaddedJointAttention:
    """Attention of video and text tokens together, in which no token attends to those that a mask (B, 1, 1, S) leaves out."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (B, V, D) video
        encoder_hidden_states: Tensor,  # (B, T, D) text
        attention_mask: Tensor | None = None,  # bool (B, 1, 1, V + T)
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        text_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        text_value = attn.add_v_proj(encoder_hidden_states)
        query, key = torch.cat([query, text_query], 1), torch.cat([key, text_key], 1)
        value = heads(torch.cat([attn.to_v(hidden_states), text_value], 1))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        video, text = mixed[:, : hidden_states.shape[1]], mixed[:, hidden_states.shape[1] :]
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)
