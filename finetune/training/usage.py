"""Tells the user of a finished run where the trained weights are, with a script that generates with them."""

from collections.abc import Sequence
from pathlib import Path

from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.exporters.exporter import Exporter
from finetune.models.family import Family
from finetune.recipe import Recipe
from finetune.recipe.experts import of_expert
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic
from finetune.runtime.logging import say
from finetune.training.frozen_usage import frozen_lines
from finetune.training.job import Job
from finetune.training.output import results_folder, results_folders
from finetune.training.start_note import SCRIPT_FILE


def say_usage(job: Job, folder: Path) -> None:
    """Print where the trained weights are and how to use them; the script is kept as use.py in the run's folder. Collective."""
    family = job.state.family
    what = _exporter(job, folder).title(family)
    whose = "" if family.expert is None else f" (the {family.expert}-noise expert's)"
    ema = job.recipe.ema
    which = "moving average of the " if ema.decay is not None and "export" in ema.use else ""
    say(f"\ndone. The {which}{what} lies in {folder}{whose}", is_result=True)
    for name, other in results_folders(job.recipe, family).items():
        if other != folder:
            say(f"      The {exporter_of(job.recipe.train.method, name).title(family)} lies in {other}{whose}")
    if lines := _usage(job, folder):
        say("Use it with diffusers:\n")
        say("\n".join(f"    {line}" for line in lines))
        _keep(job, lines)


def _keep(job: Job, lines: Sequence[str]) -> None:
    """Write the script into the run's folder. The weights are safe by then, so a full disk is no error of the run."""
    runtime = job.state.runtime
    with runtime.together():
        if not runtime.is_main:
            return
        try:
            with atomic(job.recipe.run_folder / SCRIPT_FILE) as partial:
                partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except UserError as error:
            say(f"warning: {error}")


def _exporter(job: Job, folder: Path) -> Exporter:
    """The form of the weights in a folder."""
    names = [name for name, each in results_folders(job.recipe, job.state.family).items() if each == folder]
    return exporter_of(job.recipe.train.method, names[0] if names else None)


def _parts(job: Job, folder: Path) -> list[tuple[Family, Path]]:
    """Every expert that has been trained so far, with the folder of its weights; or the one transformer that there is."""
    recipe, family = job.recipe, job.state.family
    if family.expert is None:
        return [(family, folder)]
    experts = [family.of_expert(name) for name in family.experts]
    parts = [
        (each, results_folder(of_expert(recipe, name), each))
        for name, each in zip(family.experts, experts, strict=True)
    ]
    return [(each, there) for each, there in parts if there == folder or there.is_dir()]


def _usage(job: Job, folder: Path) -> list[str]:
    """The lines of a script that generates a video with the trained weights; none if their format has no such lines."""
    recipe, family = job.recipe, job.state.family
    base, dtype = base_arguments(recipe, family, recipe.model.path)
    exporter = _exporter(job, folder)
    loading = exporter.usage(base, dtype, _parts(job, folder))
    if not loading:
        return []
    below = [] if exporter.format == "merged" else frozen_lines(recipe.adapter, family)  # which has them in it
    return script(recipe, family, [*loading, *below], job.state.runtime.device.kind)


def base_arguments(recipe: Recipe, family: Family, path: str) -> tuple[str, str]:
    """The base model as arguments of a pipeline's `from_pretrained`, and the dtype of trained weights, both as Python.

    Args:
        path: the base model's id on the Hub, or its folder.
    """
    dtype = "torch.bfloat16" if recipe.train.precision == "bf16" else "torch.float32"
    source = f'"{path}"' + (f', revision="{recipe.model.revision}"' if recipe.model.revision != "main" else "")
    mixed = family.vae_dtype is not None and dtype != str(family.vae_dtype)
    dtypes = f'{{"default": {dtype}, "vae": {family.vae_dtype}}}' if mixed else dtype
    return f"{source}, torch_dtype={dtypes}", dtype


def script(recipe: Recipe, family: Family, loading: Sequence[str], device: str) -> list[str]:
    """The lines of a script that generates a video of the recipe's shape.

    Args:
        loading: its lines that make `pipe`, see `Exporter.usage`.
        device: where it generates, such as "cuda".
    """
    shape = recipe.data.sample_shape
    helpers = "export_to_video, load_image" if family.takes_image else "export_to_video"
    lines = ["import torch, diffusers"]
    if shape.frames > 1:
        lines.append(f"from diffusers.utils import {helpers}  # pip install imageio imageio-ffmpeg")
    lines += loading
    size = ", ".join(f"{name}={value}" for name, value in family.shape_arguments(shape).items())
    image = 'image=load_image("first_frame.png"), ' if family.takes_image else ""
    image += 'last_image=load_image("last_frame.png"), ' if family.last_image else ""
    if shape.frames == 1:
        call = f'pipe.to("{device}")(prompt="your prompt", {size}, output_type="pil")'
        return [*lines, f'{call}.frames[0][0].save("image.png")']
    lines.append(f'video = pipe.to("{device}")(prompt="your prompt", {image}{size}).frames[0]')
    lines.append(f'export_to_video(video, "video.mp4", fps={recipe.data.fps or 25:g})')
    return lines
