"""Validation samples: the recipe's prompts as videos of the model in training, spread over the data ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.engine.generate import Request, generate
from finetune.engine.precision import DTYPES
from finetune.preparation.encode import PreparedPrompt
from finetune.recipe import Recipe
from finetune.runtime.progress import PATIENCE, ProgressLine
from finetune.tracking.media import contact_sheet, strip, suffix_of, write_video
from finetune.training.job import Job
from finetune.training.other_expert import add_other_expert

SHEET = "contact_sheet.png"  # written when all videos are


def sample_name(index: int, seed: int, strength: float | None) -> str:
    """The name of a video's file, without the suffix: of a prompt by its index, and of a strength if it is told."""
    return f"{index:02d}_seed{seed}" + ("" if strength is None else f"_strength{strength:g}")


@dataclass(frozen=True)
class Samples:
    """What was generated.

    Attributes:
        videos: (label, mp4 or PNG) of each in order.
        sheet: all of them on one picture.
        control_change: how much the LoRA changes what is made of the control prompts: the mean difference of a pixel, of 255,
            between the strongest and none. None without such prompts, and after other ranks than 0.
    """

    videos: list[tuple[str, Path]]
    sheet: Path
    control_change: float | None = None


@dataclass(frozen=True)
class Wanted:
    """One video to generate."""

    index: int  # of the prompt
    prompt: PreparedPrompt
    seed: int
    strength: float
    is_told: bool  # whether its strength is one of several, or not 1

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return sample_name(self.index, self.seed, self.strength if self.is_told else None)

    @property
    def label(self) -> str:
        strength = f", strength {self.strength:g}" if self.is_told else ""
        return f"{'control: ' * self.prompt.prompt.control}{self.prompt.prompt.text}  (seed {self.seed}{strength})"


def wanted_samples(job: Job) -> list[Wanted]:
    """The videos of a recipe's prompts, in order."""
    found = []
    for index, prepared in enumerate(job.prepared.prompts):
        strengths = prepared.prompt.strengths if job.recipe.train.method == "lora" else [1.0]
        for seed in prepared.prompt.seeds:
            found += [Wanted(index, prepared, seed, strength, strengths != [1.0]) for strength in strengths]
    return found


def validation_samples(job: Job, step: int, stop: Callable[[], bool] = lambda: False) -> Samples | None:
    """Generate the prompts after `step` steps into the run's `samples/step_...`. Collective.

    Args:
        stop: whether this rank is asked to end the run.
    Returns:
        None without prompts, or if the run is to end before all are made.
    """
    wanted = wanted_samples(job)
    if not wanted:
        return None
    recipe, runtime = job.recipe, job.state.runtime
    runtime.doing(f"generating the samples of step {step}")
    folder = samples_folder(recipe, step)
    mine = wanted[runtime.data.rank :: runtime.data.size]
    made: list[tuple[str, Path, np.ndarray]] = []

    def write(turn: int, frames: np.ndarray) -> None:
        path = folder / f"{mine[turn].name}{suffix_of(frames)}"
        if runtime.context.rank == 0:  # all ranks of a context have the same frames
            write_video(frames, path, mine[turn].prompt.prompt.fps)
        made.append((mine[turn].label, path, strip(frames)))

    add_other_expert(job)
    with runtime.together():
        requests = [request_of(job, each.prompt, each.seed, each.strength) for each in mine]
        idle = job.idle_batch()
    dtype = DTYPES[recipe.train.precision]
    steps = sum(request.prompt.steps for request in requests)
    with ProgressLine("samples: denoising step", steps, enabled=runtime.is_main, patience=PATIENCE) as line:
        whole = generate(
            job.state,
            requests,
            idle,
            recipe.validation.tiling,
            dtype,
            write,
            stop,
            lambda index: line.update(min(line.done + 1, steps), mine[index].label),
        )
    runtime.device.reset_peak()  # what is reported of a step is the step's
    if not whole:
        return None
    shares = runtime.gather_data(made)
    in_order = [shares[i % runtime.data.size][i // runtime.data.size] for i in range(len(wanted))]
    sheet = folder / SHEET
    with runtime.together():
        if runtime.is_main:
            title = "samples of the base model" if step == 0 else f"samples after step {step:,}"
            contact_sheet([(label, frames) for label, _, frames in in_order], sheet, title=title)
    strips = [frames for _, _, frames in in_order]
    return Samples([(label, path) for label, path, _ in in_order], sheet, _control_change(wanted, strips))


def _control_change(wanted: list[Wanted], strips: list[np.ndarray]) -> float | None:
    """See `Samples`. `strips` has frames of each video, uint8 (F, H, W, 3)."""
    changes = []
    for base, frames in zip(wanted, strips, strict=True):
        if base.prompt.prompt.control and base.is_told and base.strength == 0:
            others = [place for place, each in enumerate(wanted) if (each.index, each.seed) == (base.index, base.seed)]
            strongest = max(others, key=lambda place: abs(wanted[place].strength))
            changes.append(np.abs(strips[strongest].astype(int) - frames.astype(int)).mean())
    return float(np.mean(changes)) if changes else None


def has_prompts(job: Job) -> bool:
    """Whether a recipe has any to generate."""
    return any(prompt.prompt.seeds for prompt in job.prepared.prompts)


def samples_folder(recipe: Recipe, step: int) -> Path:
    return recipe.run_folder / "samples" / f"step_{step:08d}"


def has_samples(job: Job, step: int) -> bool:
    """Whether all samples of a step were made, as rank 0 sees it. Collective."""
    return job.state.runtime.from_main((samples_folder(job.recipe, step) / SHEET).exists())


def forget_samples(job: Job, done: int) -> None:
    """No longer take samples of steps after `done` for made: remove their contact sheets. Raises OSError."""
    for sheet in (job.recipe.run_folder / "samples").glob(f"step_*/{SHEET}"):
        if sheet.parent.name > samples_folder(job.recipe, done).name:
            sheet.unlink()


def request_of(job: Job, prepared: PreparedPrompt, seed: int, strength: float = 1.0) -> Request:
    """A prompt with what the cache holds of it."""
    cache = job.prepared.cache
    return Request(
        prompt=prepared.prompt,
        seed=seed,
        encoded={kind: cache.read(kind, key) for kind, key in prepared.keys.items()},
        negative=cache.read("text", prepared.negative_key),
        images=[cache.read("image", key)["pixels"].numpy() for key in prepared.image_keys],
        strength=strength,
    )
