"""Tells the user of a finished run where the trained weights are, with a script that generates with them."""

from pathlib import Path

from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE
from finetune.runtime.logging import say
from finetune.training.job import Job


def say_usage(job: Job, folder: Path) -> None:
    """Print where the trained weights are and how to use them."""
    what = "LoRA, verified by loading it back," if job.recipe.train.method == "lora" else "transformer"
    say(f"\ndone. The {what} lies in {folder}\nUse it with diffusers:\n")
    say("\n".join(f"    {line}" for line in _usage(job, folder)))


def _usage(job: Job, folder: Path) -> list[str]:
    """The lines of a script that generates a video with the trained weights."""
    family, model, shape = job.state.family, job.recipe.model, job.recipe.data.buckets[0]
    dtype = "torch.bfloat16" if job.recipe.train.precision == "bf16" else "torch.float32"
    source = f'"{model.path}"' + (f', revision="{model.revision}"' if model.revision != "main" else "")
    helpers = "export_to_video, load_image" if family.takes_image else "export_to_video"
    lines = ["import torch, diffusers", f"from diffusers.utils import {helpers}  # pip install imageio imageio-ffmpeg"]
    if job.recipe.train.method == "lora":
        lines.append(f"pipe = diffusers.{family.pipeline_class}.from_pretrained({source}, torch_dtype={dtype})")
        lines.append(f'pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")')
    else:
        component = family.trained_component
        lines.append(f'model = diffusers.{family.transformer_class}.from_pretrained("{folder}", torch_dtype={dtype})')
        lines.append(
            f"pipe = diffusers.{family.pipeline_class}.from_pretrained({source}, {component}=model, torch_dtype={dtype})"
        )
    size = f"num_frames={shape.frames}, height={shape.height}, width={shape.width}"
    image = 'image=load_image("first_frame.png"), ' if family.takes_image else ""
    device = job.state.runtime.device.kind
    lines.append(f'video = pipe.to("{device}")(prompt="your prompt", {image}{size}).frames[0]')
    lines.append(f'export_to_video(video, "video.mp4", fps={job.recipe.data.fps or 25:g})')
    return lines
