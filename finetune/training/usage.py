"""Tells the user of a finished run where the trained weights are, with a script that generates with them."""

from pathlib import Path

from finetune.engine.weights.exporters import exporter_of
from finetune.runtime.logging import say
from finetune.training.job import Job


def say_usage(job: Job, folder: Path) -> None:
    """Print where the trained weights are and how to use them."""
    say(f"\ndone. The {exporter_of(job.recipe.train.method).title(job.state.family)} lies in {folder}")
    if lines := _usage(job, folder):
        say("Use it with diffusers:\n")
        say("\n".join(f"    {line}" for line in lines))


def _usage(job: Job, folder: Path) -> list[str]:
    """The lines of a script that generates a video with the trained weights; none if their format has no such lines."""
    family, model, shape = job.state.family, job.recipe.model, job.recipe.data.buckets[0]
    dtype = "torch.bfloat16" if job.recipe.train.precision == "bf16" else "torch.float32"
    source = f'"{model.path}"' + (f', revision="{model.revision}"' if model.revision != "main" else "")
    helpers = "export_to_video, load_image" if family.takes_image else "export_to_video"
    lines = ["import torch, diffusers", f"from diffusers.utils import {helpers}  # pip install imageio imageio-ffmpeg"]
    loading = exporter_of(job.recipe.train.method).usage(family, source, dtype, folder)
    if not loading:
        return []
    lines += loading
    size = ", ".join(f"{name}={value}" for name, value in family.shape_arguments(shape).items())
    image = 'image=load_image("first_frame.png"), ' if family.takes_image else ""
    device = job.state.runtime.device.kind
    lines.append(f'video = pipe.to("{device}")(prompt="your prompt", {image}{size}).frames[0]')
    lines.append(f'export_to_video(video, "video.mp4", fps={job.recipe.data.fps or 25:g})')
    return lines
