"""A family from outside with two transformers, as Wan 2.2 A14B has them: one for high noise levels, one for low ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from finetune.engine.companion import Companion, build_companion
from finetune.engine.gradients import local
from finetune.models import tiny
from finetune.models.batch import Tensors
from finetune.models.family import Family, SampleLike
from finetune.models.folder import ModelFolder
from finetune.models.objective import FlowMatching, constant_shift
from finetune.recipe.schema import ObjectiveSettings
from finetune.training.job import Job

BOUNDARY = 0.875


class HighNoise(Family):
    """The expert that denoises first is trained."""

    name = "high_noise"
    title = "Two experts"
    pipeline_classes = ("WanPipeline",)
    transformer_class = "WanTransformer3DModel"
    components = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer", "transformer_2")
    text_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "prompt_embeds"}
    block_lists = ("blocks",)
    spatial, temporal, patch = 8, 4, 2

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae = folder.config("vae")
        self.mean = torch.tensor(vae["latents_mean"]).view(-1, 1, 1, 1)
        self.std = torch.tensor(vae["latents_std"]).view(-1, 1, 1, 1)

    def objective(self, settings: ObjectiveSettings) -> FlowMatching:
        return FlowMatching(settings, constant_shift(3.0))

    def encode_text(self, pipeline: DiffusionPipeline, caption: str, device: torch.device) -> Tensors:
        embeds, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=512, device=device
        )
        return {"encoder_hidden_states": embeds}

    def example_text(self, dtype: torch.dtype) -> Tensors:
        return {"encoder_hidden_states": torch.zeros(512, self.transformer_config["text_dim"], dtype=dtype)}

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        latents = noisy.to(text["encoder_hidden_states"].dtype)
        return {"hidden_states": latents, "timestep": 1000 * level, **text}

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        tokenizer = tiny.t5_tokenizer(max_length=512)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes, feed_forward_proj="gated-gelu"))
        numbers = {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}
        vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **numbers)
        vae.quant_conv.bias.data[4:] = -10  # low log-variances: trained posteriors are narrow
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        WanPipeline(
            tokenizer,
            text_encoder.eval(),
            vae.eval(),
            scheduler,
            transformer=_expert(),
            transformer_2=_expert(),
            boundary_ratio=BOUNDARY,
        ).save_pretrained(path)


class LowNoise(HighNoise):
    """The expert that denoises last is trained."""

    name = "low_noise"
    trained_components = ("transformer_2",)


def _expert() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )


def other_family(family: Family) -> Family:
    """The family opened on the other expert."""
    return (HighNoise if family.name == "low_noise" else LowNoise)(family.folder)


def with_companion(job: Job, **keywords: Any) -> Companion:
    """Give a job the other expert, as pretrained."""
    other, recipe = other_family(job.state.family), job.recipe
    weights = other.transformer_weights()
    settings = recipe.train, recipe.adapter, recipe.memory, job.state.runtime
    job.state.companion = build_companion(job.state.transformer, other, weights, *settings, **keywords)
    return job.state.companion


def recipe_of(
    family: type[HighNoise], model: Path, clips: Path, cache: Path, output: Path, prompts: Sequence[dict[str, Any]]
) -> str:
    """A recipe of the family. Prompts: each one's settings."""
    tables = "".join(
        "[[validation.prompts]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in prompt.items())
        for prompt in prompts
    )
    return f"""
output = "{output}"
[model]
family = "experts:{family.__name__}"
path = "{model}"
[data]
path = "{clips}"
buckets = ["9x64x64"]
cache = "{cache}"
workers = 0
[train]
steps = 10
global_batch_size = 2
micro_batch_size = 1
precision = "float32"
[optimizer]
lr = 0.05
{tables}"""


def step(job: Job, number: int) -> list[float]:
    """A step's loss and norm of gradients."""
    batches = job.micro_batches()
    first = number * job.split.accumulation
    result = job.step(number, [batches[first + turn] for turn in range(job.split.accumulation)])
    assert result.updated
    return [result.loss, result.grad_norm]


def training_state(job: Job) -> dict[str, bytes]:
    """The bits of what this rank holds of all weights, and of the optimizer's state."""
    transformer = job.state.transformer
    found = {f"weight {name}": value for name, value in transformer.named_parameters()}
    found |= {f"buffer {name}": value for name, value in transformer.named_buffers()}
    for place, each in enumerate(job.state.optimizer.state.values()):
        found |= {f"{key} {place}": value for key, value in each.items() if isinstance(value, Tensor)}
    return {name: bits(local(value)) for name, value in found.items()}


def bits(tensor: Tensor) -> bytes:
    """From a copy: torch does not resize what numpy has seen."""
    return tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()
