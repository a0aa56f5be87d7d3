"""Exported weights, loaded as a user of diffusers loads them."""

from pathlib import Path

import diffusers

from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE


def load_adapter(pipeline: diffusers.DiffusionPipeline, folder: Path, file: str = LORA_FILE) -> None:
    """Not every pipeline has a method for it; the transformer's is diffusers' own, too."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, weight_name=file)
    else:
        pipeline.transformer.load_lora_adapter(folder, weight_name=file)
