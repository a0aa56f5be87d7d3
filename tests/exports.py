"""Weights exported as a run does it, and loaded as a user of diffusers loads them."""

from pathlib import Path

import diffusers

from finetune.engine.step import StepState
from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE
from finetune.training.job import write_weights


def export_weights(state: StepState, method: str, folder: Path) -> None:
    """Write the trained weights in the run's own form, and verify them."""
    write_weights(state, exporter_of(method), folder)


def load_adapter(pipeline: diffusers.DiffusionPipeline, folder: Path, file: str = LORA_FILE) -> None:
    """Not every pipeline has a method for it; the transformer's is diffusers' own, too."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, weight_name=file)
    else:
        pipeline.transformer.load_lora_adapter(folder, weight_name=file)
