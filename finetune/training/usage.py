"""Tells the user of a finished run where the trained weights are, with a script that generates with them."""

from pathlib import Path

from finetune.engine.weights.exporters import exporter_of
from finetune.models.family import Family
from finetune.recipe.experts import of_expert
from finetune.runtime.logging import say
from finetune.training.job import Job
from finetune.training.output import results_folder


def say_usage(job: Job, folder: Path) -> None:
    """Print where the trained weights are and how to use them."""
    family = job.state.family
    what = exporter_of(job.recipe.train.method).title(family)
    whose = "" if family.expert is None else f" (the {family.expert}-noise expert's)"
    ema = job.recipe.ema
    which = "moving average of the " if ema.decay is not None and "export" in ema.use else ""
    say(f"\ndone. The {which}{what} lies in {folder}{whose}")
    if lines := _usage(job, folder):
        say("Use it with diffusers:\n")
        say("\n".join(f"    {line}" for line in lines))


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
    family, model, shape = job.state.family, job.recipe.model, job.recipe.data.sample_shape
    dtype = "torch.bfloat16" if job.recipe.train.precision == "bf16" else "torch.float32"
    source = f'"{model.path}"' + (f', revision="{model.revision}"' if model.revision != "main" else "")
    helpers = "export_to_video, load_image" if family.takes_image else "export_to_video"
    lines = ["import torch, diffusers"]
    if shape.frames > 1:
        lines.append(f"from diffusers.utils import {helpers}  # pip install imageio imageio-ffmpeg")
    mixed = family.vae_dtype is not None and dtype != str(family.vae_dtype)
    dtypes = f'{{"default": {dtype}, "vae": {family.vae_dtype}}}' if mixed else dtype
    base = f"{source}, torch_dtype={dtypes}"
    loading = exporter_of(job.recipe.train.method).usage(base, dtype, _parts(job, folder))
    if not loading:
        return []
    lines += loading
    size = ", ".join(f"{name}={value}" for name, value in family.shape_arguments(shape).items())
    image = 'image=load_image("first_frame.png"), ' if family.takes_image else ""
    image += 'last_image=load_image("last_frame.png"), ' if family.last_image else ""
    device = job.state.runtime.device.kind
    if shape.frames == 1:
        call = f'pipe.to("{device}")(prompt="your prompt", {size}, output_type="pil")'
        return [*lines, f'{call}.frames[0][0].save("image.png")']
    lines.append(f'video = pipe.to("{device}")(prompt="your prompt", {image}{size}).frames[0]')
    lines.append(f'export_to_video(video, "video.mp4", fps={job.recipe.data.fps or 25:g})')
    return lines
