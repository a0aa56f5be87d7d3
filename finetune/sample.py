"""Generate videos with the base model and, optionally, a trained adapter, through the family's diffusers pipeline."""

from pathlib import Path

import diffusers
import numpy as np
import torch

from finetune.engine.export import LORA_FILE
from finetune.engine.precision import DTYPES
from finetune.models.family import Family
from finetune.recipe import Recipe
from finetune.recipe.schema import Prompt
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say
from finetune.tracking.media import contact_sheet, write_video


def sample(
    recipe: Recipe, family: Family, runtime: Runtime, prompts: list[Prompt], adapter: Path | None, out: Path
) -> list[tuple[str, np.ndarray]]:
    """Generate every prompt and write `out/NN_seed.mp4` and `out/contact_sheet.png`.

    Args:
        adapter: folder of an exported LoRA, or the file in it; None for the base model.
    Returns:
        (label, uint8 frames (F, H, W, 3)) of each video.
    """
    pipeline = load_pipeline(recipe, family, runtime, adapter)
    videos = []
    for index, prompt in enumerate(prompts):
        for seed in range(prompt.seed, prompt.seed + prompt.count):
            frames = generate(pipeline, family, prompt, seed, recipe)
            path = out / f"{index:02d}_seed{seed}.mp4"
            write_video(frames, path, prompt.fps)
            say(f"wrote {path}")
            videos.append((f"{prompt.text}  (seed {seed})", frames))
    contact_sheet(videos, out / "contact_sheet.png")
    say(f"wrote {out / 'contact_sheet.png'}")
    return videos


def load_pipeline(recipe: Recipe, family: Family, runtime: Runtime, adapter: Path | None) -> diffusers.DiffusionPipeline:
    """The whole pipeline on the device, in the recipe's precision, with the adapter loaded if one is given."""
    cls = getattr(diffusers, family.pipeline_class)
    pipeline = cls.from_pretrained(family.folder.path, torch_dtype=DTYPES[recipe.train.precision])
    if adapter is not None:
        folder = adapter.parent if adapter.name == LORA_FILE else adapter
        if not (folder / LORA_FILE).is_file():
            raise UserError(f"there is no {LORA_FILE} in it", "give the folder that training named at its end", str(adapter))
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    if recipe.vae.slicing:
        pipeline.vae.enable_slicing()
    if recipe.vae.tiling:
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(runtime.device.torch_device)


def generate(
    pipeline: diffusers.DiffusionPipeline, family: Family, prompt: Prompt, seed: int, recipe: Recipe
) -> np.ndarray:
    """One video, uint8 (F, H, W, 3); its noise is drawn on the CPU, so a seed means the same on every device."""
    shape = prompt.shape or recipe.data.buckets[0]
    arguments = {"guidance_scale": prompt.guidance} if prompt.guidance is not None else {}
    frames = pipeline(
        prompt=prompt.text,
        negative_prompt=prompt.negative,
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        num_inference_steps=prompt.steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **arguments,
        **family.sampling_arguments(prompt.fps),
    ).frames[0]
    return (np.nan_to_num(frames) * 255).round().astype(np.uint8)
