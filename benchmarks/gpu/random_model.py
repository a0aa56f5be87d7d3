"""Models of published sizes with random weights, and batches for them: nothing is downloaded."""

import json
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.loader import Sample
from finetune.models.batch import Batch, Tensors
from finetune.models.cogvideox import CogVideoX
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.published import complete
from finetune.recipe import Bucket, Recipe

MODELS = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "smoke": {"num_attention_heads": 2, "num_layers": 2, "attention_head_dim": 16, "text_embed_dim": 32},
}


class RandomWeights:
    """Stands in for a transformer's weights with the same million random numbers, because drawing billions takes minutes."""

    def __init__(self, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
        self.shapes = shapes
        self.drawn = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(dtype)

    def names(self) -> set[str]:
        return set(self.shapes)

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = torch.Size([stop - start, *self.shapes[name][1:]])
        return self.drawn.repeat(-(-shape.numel() // len(self.drawn)))[: shape.numel()].view(shape)


def random_weights(family: Family, dtype: torch.dtype) -> RandomWeights:
    """Random weights of a family's transformer."""
    return RandomWeights({name: p.shape for name, p in family.empty_transformer().named_parameters()}, dtype)


class RandomCogVideoX(CogVideoX):
    """CogVideoX with random weights."""

    def transformer_weights(self) -> RandomWeights:
        return random_weights(self, torch.bfloat16)


def full_width(recipe_path: str, folder: Path, depth: int | None, family: type[Family]) -> Family:
    """A published model at its full width, with random weights to be had from `random_weights`.

    Args:
        recipe_path: the model.path of a recipe; see `finetune.models.published.PUBLISHED`.
        depth: blocks of each kind; None for all.
    """
    complete(recipe_path, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    if depth is not None:
        config |= dict.fromkeys(family.depth_keys, depth)
    file.write_text(json.dumps(config))
    return family(ModelFolder(folder))


def model_folder(path: Path, name: str) -> ModelFolder:
    """Write a model folder that has only configs."""
    configs = {
        "transformer/config.json": {"_class_name": "CogVideoXTransformer3DModel", "sample_frames": 49, **MODELS[name]},
        "vae/config.json": {
            "latent_channels": 16,
            "block_out_channels": [0] * 4,
            "temporal_compression_ratio": 4,
            "scaling_factor": 0.7,
        },
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "model_index.json": {"_class_name": "CogVideoXPipeline"},
    }
    defaults = {
        "patch_size": 2,
        "sample_height": 60,
        "sample_width": 90,
        "attention_head_dim": 64,
        "text_embed_dim": 4096,
    }
    configs["transformer/config.json"] = defaults | configs["transformer/config.json"]
    for file, config in configs.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(json.dumps(config))
    return ModelFolder(path)


def random_batch(family: Family, recipe: Recipe, bucket: Bucket, dtype: torch.dtype, seed: int = 0) -> Batch:
    """A micro-batch of random latents and captions. Where captions have masks, the second sample's is half as long."""
    generator = torch.Generator().manual_seed(seed)
    size = recipe.train.micro_batch_size
    samples = [
        Sample(_random_encoded(family, bucket, dtype, generator, place), bucket, 25.0, generator, (place, size))
        for place in range(size)
    ]
    return family.batch(samples, family.training_objective(recipe.objective))


def _random_encoded(
    family: Family, bucket: Bucket, dtype: torch.dtype, generator: torch.Generator, place: int
) -> dict[str, Tensors]:
    """What is cached of a clip, drawn at random: latents that have unit variance when they are normalised, with a narrow
    posterior.
    """

    def drawn(name: str, zeros: Tensor) -> Tensor:
        if name.endswith("mask"):
            mask = torch.ones_like(zeros)
            mask[len(mask) // (1 + place % 2) :] = 0
            return mask
        if name.endswith("logvar"):
            return torch.full(zeros.shape, -10.0)
        values = torch.randn(zeros.shape, generator=generator)
        if name != "mean":
            return values.to(zeros.dtype)
        offset = family.normalise(torch.zeros_like(values))
        return (values - offset) / (family.normalise(torch.ones_like(values)) - offset)

    example = family.example(bucket, dtype)
    return {kind: {name: drawn(name, zeros) for name, zeros in tensors.items()} for kind, tensors in example.items()}
