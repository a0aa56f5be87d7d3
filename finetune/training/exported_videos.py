"""Generates videos with the base model and with exported weights, in the diffusers pipeline as a user would run it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.data.images import load_image
from finetune.engine.generate import call_arguments, checked, told_steps
from finetune.engine.precision import DTYPES
from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.exporters.diffusers_lora import PREFIX, load_lora, lora_file
from finetune.models.adapters.given import add_frozen
from finetune.models.family import Family
from finetune.recipe import Recipe
from finetune.recipe.prompts import ResolvedPrompt, validation_prompts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say
from finetune.runtime.progress import PATIENCE, ProgressLine
from finetune.tracking.media import contact_sheet, strip, suffix_of, write_video
from finetune.training.job import open_checkpoints, sound_checkpoint


def sample(
    recipe: Recipe,
    family: Family,
    runtime: Runtime,
    out: Path,
    trained: Path | Sequence[tuple[Path, float]] | None = None,
    compare: bool = False,
    strengths: Sequence[float] | None = None,
) -> None:
    """Generate the recipe's validation prompts. Writes an mp4 for each, or a PNG of a single frame, and `out/contact_sheet.png`.

    Args:
        trained: where exported weights are, see `trained_parts`; or several LoRAs, each with its strength; None for the base model.
        compare: also generate with the base model, from the same noise, and say how much the training changes.
        strengths: of all LoRAs together, in the place of the prompts' own: a video with each.
    Raises:
        UserError: there are no weights in `trained`, they are of another model, or they change nothing.
    """
    adapters = [(trained, 1.0)] if isinstance(trained, Path) else list(trained or [])
    parts = _all_parts(adapters, family)
    for each, folder, _ in parts:
        check_trained(each, folder)
    if family.experts and adapters:
        used = {each.expert: str(folder) for each, folder, _ in parts}
        say("; ".join(f"{name}-noise expert: {used.get(name, 'as it was')}" for name in family.experts))
    prompts = validation_prompts(recipe.validation, recipe.data.sample_shape)
    images = [[load_image(image) for image in prompt.images] for prompt in prompts]
    say(f"loading {family.title}")
    pipeline = load_pipeline(recipe, family, runtime)
    line = _denoising(prompts, compare or not adapters, bool(adapters), strengths)
    made: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
    with line:
        for version in ["base"] * (compare or not adapters) + ["trained"] * bool(adapters):
            if version == "trained":
                for each, folder, _ in parts:
                    load_trained(pipeline, each, folder, recipe, runtime)
            for index, (prompt, given) in enumerate(zip(prompts, images, strict=True)):
                wanted = list(strengths or prompt.strengths) if version == "trained" else [1.0]
                for seed, strength in product(prompt.seeds, wanted):
                    if version == "trained":
                        set_strengths(pipeline, parts, strength)
                    runtime.device.reseed(seed)  # LTX's VAE draws noise from the device's generator
                    arguments = call_arguments(family, prompt, seed, given)
                    pipeline.register_modules(**family.prompt_components(prompt))
                    steps = told_steps(pipeline, partial(_next, line, prompt.text))
                    output = pipeline(prompt=prompt.text, negative_prompt=prompt.negative, **arguments, **steps)
                    frames = checked(output.frames[0], prompt)
                    name = version if wanted == [1.0] else f"{version}_strength{strength:g}"
                    path = out / f"{index:02d}_seed{seed}_{name}{suffix_of(frames)}"
                    write_video(frames, path, prompt.fps)
                    say(f"wrote {path}")
                    label = f"{name.replace('_strength', ', strength ')}: {prompt.text}  (seed {seed})"
                    made.setdefault((index, seed), []).append((label, frames))
    rows = [row for each in made.values() for row in each]
    contact_sheet([(label, strip(frames)) for label, frames in rows], out / "contact_sheet.png")
    say(f"wrote {out / 'contact_sheet.png'}")
    if compare and adapters:
        _say_change(made, [path for path, _ in adapters])


def _denoising(
    prompts: Sequence[ResolvedPrompt], has_base: bool, has_trained: bool, strengths: Sequence[float] | None
) -> ProgressLine:
    """The progress line of all videos' denoising steps."""
    total = 0
    for prompt in prompts:
        versions = has_base + has_trained * len(strengths or prompt.strengths)
        total += versions * len(prompt.seeds) * prompt.steps
    return ProgressLine("denoising step", total, patience=PATIENCE)


def _next(line: ProgressLine, text: str) -> None:
    line.update(min(line.done + 1, line.total), repr(text))


def _say_change(made: dict[tuple[int, int], list[tuple[str, np.ndarray]]], paths: Sequence[Path]) -> None:
    """Say how far the videos of each prompt and seed are from the first of them. Raises UserError if they are the same."""
    frames = [[video.astype(int) for _, video in each] for each in made.values()]
    change = np.mean([max(np.abs(video - base).mean() for video in others) for base, *others in frames])
    say(f"training changes a pixel by {change:.2g} of 255 on average")
    if change == 0:
        raise UserError(
            "the trained weights change nothing",
            "train for more steps or with a higher optimizer.lr",
            ", ".join(map(str, paths)),
        )


def _all_parts(adapters: Sequence[tuple[Path, float]], family: Family) -> list[tuple[Family, Path, float]]:
    """(family, folder, strength) of all exported weights. Raises UserError for what cannot be loaded together."""
    found = [(each, folder, own) for path, own in adapters for each, folder in trained_parts(path, family)]
    taken: set[str] = set()
    for each, folder, own in found:
        is_lora = (folder / lora_file(each)).is_file()
        if each.trained_component in taken and (each.expert is not None or not is_lora):
            what = "an expert takes one LoRA" if is_lora else "all weights replace what was given before them"
            raise UserError(what, "give one folder for each, or all weights first", str(folder))
        if not is_lora and own != 1:
            raise UserError("all weights have no strength", "give the folder without =STRENGTH", str(folder))
        taken.add(each.trained_component)
    return found


def set_strengths(
    pipeline: diffusers.DiffusionPipeline, parts: Sequence[tuple[Family, Path, float]], strength: float
) -> None:
    """Apply the LoRAs that have been loaded with their own strengths, times `strength`. Raises UserError if there are none."""
    weights: dict[str, list[float]] = {}
    for family, folder, own in parts:
        if (folder / lora_file(family)).is_file():
            weights.setdefault(family.trained_component, []).append(own * strength)
        elif strength != 1:
            raise UserError("all weights have no strength", "leave --strength out, or give a LoRA", str(folder))
    for component, scales in weights.items():
        transformer = getattr(pipeline, component)
        used = {name: scale for name, scale in zip(transformer.peft_config, scales, strict=True) if scale}
        if used:  # at 0 an adapter is switched off: DoRA's magnitudes would stay
            transformer.enable_adapters()
            transformer.set_adapters(list(used), list(used.values()))
        else:
            transformer.disable_adapters()


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
    """Load the whole pipeline onto the device, in the recipe's precision, with lora.frozen in the weights that are trained."""
    diffusers.utils.logging.disable_progress_bar()
    cls = getattr(diffusers, family.pipeline_class)
    dtype = DTYPES[recipe.train.precision]
    dtypes = {"default": dtype, "vae": family.vae_dtype or dtype}
    pipeline = cls.from_pretrained(family.folder.path, dtype=dtypes)
    trained = recipe.model.experts or family.experts
    for each in [family.of_expert(name) for name in trained] if family.experts else [family]:
        add_frozen(getattr(pipeline, each.trained_component), recipe.adapter, each)
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
        what = f"there is neither {' nor '.join(names)} in it" if path.is_dir() else "there is no such folder"
        raise UserError(what, cure, str(path))
    return parts


def check_trained(family: Family, folder: Path) -> None:
    """Raise UserError unless exported weights are of the component that a family trains."""
    file = folder / lora_file(family)
    if not file.is_file():
        return
    layers = {name for name, _ in family.empty_transformer().named_modules()}
    tensors = _read(file)
    adapted = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    if strange := sorted(adapted - layers):
        raise UserError(
            f"this LoRA is of another model: there is no {strange[0]} in {family.title}",
            "set model.family and model.path to what it was trained on",
            str(file),
        )
    for name, tensor in tensors.items():  # NaN may leave no trace in a video: attention on a CPU passes over it
        if not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}", "export it in float32, bf16 or float16", str(file))
        if not tensor.float().isfinite().all():
            cure = "use an earlier checkpoint, or export it again"
            raise UserError(f"{name} has values that are not finite", cure, str(file))
    if alone := sorted(name for name in tensors if _other_half(name) not in tensors):
        raise UserError(f"{alone[0]} lacks {_other_half(alone[0])}", "export it again", str(file))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"this LoRA is damaged ({error})", "export it again", str(file)) from None


def _other_half(name: str) -> str:
    """The name of the matrix that one of a pair cannot be without; of other tensors their own."""
    swap = {".lora_A.": ".lora_B.", ".lora_B.": ".lora_A."}
    return next((name.replace(one, other) for one, other in swap.items() if one in name), name)


def load_trained(
    pipeline: diffusers.DiffusionPipeline, family: Family, folder: Path, recipe: Recipe, runtime: Runtime
) -> None:
    """Load an exported LoRA into the pipeline's trained component, or replace the component by an exported one."""
    with _loading(folder):
        if (folder / lora_file(family)).is_file():
            load_lora(pipeline, family, folder)
            return
        cls = getattr(diffusers, family.transformer_class)
        transformer = cls.from_pretrained(folder, dtype=DTYPES[recipe.train.precision])
    pipeline.register_modules(**{family.trained_component: transformer.to(runtime.device.torch_device)})


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Turn what diffusers and peft say of files that are damaged, or that are no weights of this model, into a UserError."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        what = f"diffusers cannot load these weights ({type(error).__name__}: {reason})"
        raise UserError(
            what, "export them again, or give the folder that training named at its end", str(folder)
        ) from None
