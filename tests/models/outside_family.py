"""A family from outside of the project, as its user would write one: by the contract in finetune/models/family.py alone.

Its model is made of diffusers' LTX-Video classes, under another name and with its own encoding of text.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LTXPipeline
from diffusers import LTXVideoTransformer3DModel as Transformer
from torch import Tensor

from finetune.models import tiny
from finetune.models.batch import Tensors
from finetune.models.family import Family, SampleLike
from finetune.models.folder import ModelFolder

STYLE = "in clay: "  # what the model has before each caption


class Clay(Family):
    """Clay, text-to-video."""

    name = "clay"
    title = "Clay"
    pipeline_classes = ("LTXPipeline",)
    transformer_class = "LTXVideoTransformer3DModel"
    read_when_opened = ("vae/*",)  # the statistics of latents are among its weights
    lora_targets = ("attn1.to_q", "attn1.to_v")
    spatial, temporal = 32, 8

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        self.mean = folder.tensor("vae", "latents_mean").view(-1, 1, 1, 1)
        self.std = folder.tensor("vae", "latents_std").view(-1, 1, 1, 1)

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def encode_text(self, pipeline: DiffusionPipeline, caption: str, device: torch.device) -> Tensors:
        return super().encode_text(pipeline, STYLE + caption, device)

    def example_text(self, dtype: torch.dtype) -> Tensors:
        embeds = torch.zeros(128, self.transformer_config["caption_channels"], dtype=dtype)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": torch.ones(128, dtype=torch.bool)}

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        seconds = torch.tensor([self.temporal / sample.fps for sample in samples])
        names = ("num_frames", "height", "width")
        return {
            "hidden_states": noisy.flatten(2).transpose(1, 2).to(text["encoder_hidden_states"].dtype),
            "timestep": 1000 * level,
            "rope_interpolation_scale": (seconds.view(-1, 1, 1, 1, 1), self.spatial, self.spatial),
            **dict(zip(names, noisy.shape[2:], strict=True)),
            **text,
        }

    def target(self, target: Tensor) -> Tensor:
        return target.flatten(2).transpose(1, 2)

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        tokenizer = tiny.t5_tokenizer(max_length=128)
        widths = (16, 32, 32, 32)
        vae = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=widths,
            decoder_block_out_channels=widths,
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
        vae.encoder.conv_out.conv.bias.data[-1] = -10  # the log-variance: a trained VAE's posterior is narrow
        tiny.normalise_latents(vae, frames=17, size=64)
        transformer = Transformer(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            num_layers=2,
        )
        text_encoder = tiny.t5_encoder(tokenizer, width=32)
        # Nothing is shifted: training and sampling see the same noise levels.
        LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, text_encoder, tokenizer, transformer).save_pretrained(path)


class LaterSteps(Clay):
    """The transformer of another name in a folder: one of two that share the noise levels, say."""

    name = "clay_later"
    trained_components = ("transformer_2",)
    components = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer_2")

    def pipeline(self, **components: Any) -> DiffusionPipeline:
        return super().pipeline(**{name.removesuffix("_2"): part for name, part in components.items()})

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        super().tiny(path, seed, variant)
        (path / "transformer").rename(path / "transformer_2")
        index = json.loads((path / "model_index.json").read_text())
        index["transformer_2"] = index.pop("transformer")
        (path / "model_index.json").write_text(json.dumps(index))
