"""Generate videos with the base model and, optionally, a trained adapter, through the family's diffusers pipeline."""

from pathlib import Path

import diffusers
import numpy as np

from finetune.data.images import load_image
from finetune.engine.export import LORA_FILE
from finetune.engine.precision import DTYPES
from finetune.engine.sampling import call_arguments, checked
from finetune.models.family import Family
from finetune.recipe import Recipe
from finetune.recipe.prompts import validation_prompts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say
from finetune.tracking.media import contact_sheet, strip, write_video


def sample(
    recipe: Recipe,
    family: Family,
    runtime: Runtime,
    out: Path,
    adapter: Path | None = None,
    compare: bool = False,
) -> None:
    """Generate the recipe's validation prompts; write one mp4 a video and `out/contact_sheet.png`.

    Args:
        adapter: folder of an exported LoRA, or the file in it; None for the base model.
        compare: generate with the base model too, from the same noise, and say how much the adapter changes.
    Raises:
        UserError: no adapter there, or one that changes nothing.
    """
    pipeline = load_pipeline(recipe, family, runtime)
    versions = [("base", None)] if compare or adapter is None else []
    versions += [("lora", adapter)] if adapter else []
    made: dict[str, list[tuple[str, np.ndarray]]] = {}
    for version, weights in versions:
        if weights is not None:
            load_adapter(pipeline, weights)
        made[version] = []
        for index, prompt in enumerate(validation_prompts(recipe.validation, recipe.data.buckets[0])):
            image = load_image(prompt.image, prompt.shape.height, prompt.shape.width) if prompt.image else None
            for seed in prompt.seeds:
                arguments = call_arguments(family, prompt, seed, image)
                made_frames = pipeline(prompt=prompt.text, negative_prompt=prompt.negative, **arguments).frames[0]
                frames = checked(made_frames, prompt)
                path = out / f"{index:02d}_seed{seed}_{version}.mp4"
                write_video(frames, path, prompt.fps)
                say(f"wrote {path}")
                made[version].append((f"{version}: {prompt.text}  (seed {seed})", frames))
    rows = [row for pair in zip(*made.values(), strict=True) for row in pair]
    contact_sheet([(label, strip(frames)) for label, frames in rows], out / "contact_sheet.png")
    say(f"wrote {out / 'contact_sheet.png'}")
    if len(made) == 2:
        pairs = zip(made["base"], made["lora"], strict=True)
        change = np.mean([np.abs(a.astype(int) - b.astype(int)).mean() for (_, a), (_, b) in pairs])
        say(f"the adapter changes a pixel by {change:.2g} of 255 on average")
        if change == 0:
            raise UserError(
                "the adapter changes nothing", "train for more steps or with a higher optimizer.lr", str(adapter)
            )


def load_pipeline(recipe: Recipe, family: Family, runtime: Runtime) -> diffusers.DiffusionPipeline:
    """The whole pipeline on the device, in the recipe's precision."""
    diffusers.utils.logging.disable_progress_bar()
    cls = getattr(diffusers, family.pipeline_class)
    pipeline = cls.from_pretrained(family.folder.path, dtype=DTYPES[recipe.train.precision])
    if recipe.validation.tiling:
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(runtime.device.torch_device)


def load_adapter(pipeline: diffusers.DiffusionPipeline, adapter: Path) -> None:
    """Load an exported LoRA, given its folder or the file in it."""
    folder = adapter.parent if adapter.name == LORA_FILE else adapter
    if not (folder / LORA_FILE).is_file():
        raise UserError(
            f"there is no {LORA_FILE} in it", "give the folder that training named at its end", str(adapter)
        )
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
