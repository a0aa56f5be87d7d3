"""Generates videos with the base model and with exported weights, in the diffusers pipeline as a user would run it."""

from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
from safetensors import safe_open

from finetune.data.images import load_image
from finetune.engine.generate import call_arguments, checked
from finetune.engine.precision import DTYPES
from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.exporters.diffusers_lora import PREFIX, load_lora, lora_file
from finetune.models.family import Family
from finetune.recipe import Recipe
from finetune.recipe.prompts import validation_prompts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say
from finetune.tracking.media import contact_sheet, strip, suffix_of, write_video
from finetune.training.job import open_checkpoints, sound_checkpoint


def sample(
    recipe: Recipe,
    family: Family,
    runtime: Runtime,
    out: Path,
    trained: Path | None = None,
    compare: bool = False,
) -> None:
    """Generate the recipe's validation prompts. Writes an mp4 for each, or a PNG of a single frame, and `out/contact_sheet.png`.

    Args:
        trained: where exported weights are, see `trained_parts`; None for the base model.
        compare: also generate with the base model, from the same noise, and say how much the training changes.
    Raises:
        UserError: there are no weights in `trained`, they are of another model, or they change nothing.
    """
    parts = [] if trained is None else trained_parts(trained, family)
    for each, folder in parts:
        check_trained(each, folder)
    if family.experts and trained is not None:
        used = {each.expert: str(folder) for each, folder in parts}
        say("; ".join(f"{name}-noise expert: {used.get(name, 'as it was')}" for name in family.experts))
    prompts = validation_prompts(recipe.validation, recipe.data.sample_shape)
    images = [[load_image(image) for image in prompt.images] for prompt in prompts]
    pipeline = load_pipeline(recipe, family, runtime)
    versions: list[Path | None] = [None] if compare or trained is None else []
    versions += [trained] if trained else []
    made: dict[str, list[tuple[str, np.ndarray]]] = {}
    for weights in versions:
        version = "base" if weights is None else "trained"
        if weights is not None:
            for each, folder in parts:
                load_trained(pipeline, each, folder, recipe, runtime)
        made[version] = []
        for index, (prompt, given) in enumerate(zip(prompts, images, strict=True)):
            for seed in prompt.seeds:
                runtime.device.reseed(seed)  # LTX's VAE draws noise from the device's generator
                arguments = call_arguments(family, prompt, seed, given)
                pipeline.register_modules(**family.prompt_components(prompt))
                output = pipeline(prompt=prompt.text, negative_prompt=prompt.negative, **arguments)
                frames = checked(output.frames[0], prompt)
                path = out / f"{index:02d}_seed{seed}_{version}{suffix_of(frames)}"
                write_video(frames, path, prompt.fps)
                say(f"wrote {path}")
                made[version].append((f"{version}: {prompt.text}  (seed {seed})", frames))
    rows = [row for pair in zip(*made.values(), strict=True) for row in pair]
    contact_sheet([(label, strip(frames)) for label, frames in rows], out / "contact_sheet.png")
    say(f"wrote {out / 'contact_sheet.png'}")
    if len(made) == 2:
        pairs = zip(*made.values(), strict=True)
        change = np.mean([np.abs(a.astype(int) - b.astype(int)).mean() for (_, a), (_, b) in pairs])
        say(f"training changes a pixel by {change:.2g} of 255 on average")
        if change == 0:
            raise UserError(
                "the trained weights change nothing", "train for more steps or with a higher optimizer.lr", str(trained)
            )


def adapter_of(recipe: Recipe, family: Family, runtime: Runtime, step: int | Literal["best"]) -> Path:
    """The folder of the adapter in a checkpoint of a recipe's run.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it holds no adapter in a form of its own.
    """
    exporter = exporter_of(recipe.train.method)
    if family.experts and len(recipe.model.experts or family.experts) > 1:
        cure = "name one of them: --set model.experts=" + " or ".join(family.experts)
        raise UserError("each expert has checkpoints of its own", cure, "--step")
    if not exporter.is_small:
        cure = "write it first: python -m finetune export --recipe R --step N --out DIR, then --adapter DIR"
        raise UserError("a checkpoint of full finetuning holds no transformer as diffusers loads it", cure, "--step")
    checkpoints = open_checkpoints(recipe, runtime)
    found = sound_checkpoint(checkpoints, step)
    assert found is not None  # it was asked for by name
    each = family.of_expert(recipe.model.experts[0]) if recipe.model.experts else family
    return checkpoints.path(found) / exporter.folder(each)


def load_pipeline(recipe: Recipe, family: Family, runtime: Runtime) -> diffusers.DiffusionPipeline:
    """Load the whole pipeline onto the device, in the recipe's precision."""
    diffusers.utils.logging.disable_progress_bar()
    cls = getattr(diffusers, family.pipeline_class)
    dtype = DTYPES[recipe.train.precision]
    dtypes = {"default": dtype, "vae": family.vae_dtype or dtype}
    pipeline = cls.from_pretrained(family.folder.path, dtype=dtypes)
    if recipe.validation.tiling:
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(runtime.device.torch_device)


def trained_parts(path: Path, family: Family) -> list[tuple[Family, Path]]:
    """The exported weights at a path: the family whose trained component they are of, and their folder, for each.

    Args:
        path: the folder of a LoRA or of all weights, or a LoRA's file; or, of a model with experts, the output of a run, which
            may have those of each.
    Raises:
        UserError: there are none.
    """
    experts = [family.of_expert(name) for name in family.experts] or [family]
    parts: list[tuple[Family, Path]] = []
    for each in experts:
        component = each.trained_component
        if path.name == lora_file(each) and path.is_file():
            parts.append((each, path.parent))
            continue
        ends = [path, path / "lora", path / component]
        if each.expert is not None:
            ends += [path / each.expert / "lora", path / each.expert / component]
        for folder in ends:
            is_whole = (folder / "config.json").is_file() and (each.expert is None or folder.name == component)
            if is_whole or (folder / lora_file(each)).is_file():
                parts.append((each, folder))
                break
    if not parts:
        names = [f"{lora_file(each)} nor a {each.trained_component}" for each in experts]
        cure = "give the folder that training named at its end"
        raise UserError(f"there is neither {' nor '.join(names)} in it", cure, str(path))
    return parts


def check_trained(family: Family, folder: Path) -> None:
    """Raise UserError unless exported weights are of the component that a family trains."""
    file = folder / lora_file(family)
    if not file.is_file():
        return
    layers = {name for name, _ in family.empty_transformer().named_modules()}
    with safe_open(file, "pt") as weights:
        adapted = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights.keys()}  # noqa: SIM118
    if strange := sorted(adapted - layers):
        raise UserError(
            f"this LoRA is of another model: there is no {strange[0]} in {family.title}",
            "set model.family and model.path to what it was trained on",
            str(file),
        )


def load_trained(
    pipeline: diffusers.DiffusionPipeline, family: Family, folder: Path, recipe: Recipe, runtime: Runtime
) -> None:
    """Load an exported LoRA into the pipeline's trained component, or replace the component by an exported one."""
    if not (folder / lora_file(family)).is_file():
        cls = getattr(diffusers, family.transformer_class)
        transformer = cls.from_pretrained(folder, dtype=DTYPES[recipe.train.precision])
        pipeline.register_modules(**{family.trained_component: transformer.to(runtime.device.torch_device)})
        return
    load_lora(pipeline, family, folder)
