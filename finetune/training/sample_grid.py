"""The samples of a run side by side: a row for each prompt, seed and strength, a column for each step."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

from finetune.runtime.errors import harmless
from finetune.tracking.media import contact_sheet, scaled
from finetune.training.job import Job
from finetune.training.samples import SHEET, samples_folder, wanted_samples

GRID = "grid.png"
_MOST_STEPS = 12


def write_grid(job: Job) -> Path | None:
    """Write `samples/grid.png` with the middle frame of each video after each step that has all samples, twelve steps at most.

    Collective; rank 0 writes. Returns the file's path; None if there are samples of one step alone.

    Raises:
        UserError: it cannot be written.
    """
    runtime, path = job.state.runtime, None
    with runtime.together():
        if runtime.is_main:
            path = _write(job)
    return path


def _write(job: Job) -> Path | None:
    root = samples_folder(job.recipe, 0).parent
    steps = [folder for folder in sorted(root.glob("step_*")) if (folder / SHEET).is_file()]
    if len(steps) < 2:
        return None
    steps = [steps[place] for place in np.linspace(0, len(steps) - 1, min(len(steps), _MOST_STEPS)).round().astype(int)]
    rows = []
    for wanted in wanted_samples(job):
        cells = [middle_frame(folder, wanted.name) for folder in steps]
        size = next((cell.shape for cell in cells if cell is not None), None)
        if size is not None:  # a prompt that has been changed has none at earlier steps
            blank = np.full(size, 255, np.uint8)
            rows.append((wanted.label, np.stack([blank if cell is None else cell for cell in cells])))
    path = root / GRID
    numbers = [int(folder.name.removeprefix("step_")) for folder in steps]
    title = f"samples of {harmless(job.recipe.run_folder.absolute().name)}: the middle frame of each"
    contact_sheet(rows, path, ["base model" if step == 0 else f"step {step:,}" for step in numbers], title)
    return path


def middle_frame(folder: Path, name: str, height: int = 128) -> np.ndarray | None:
    """The middle frame of a video, or a single picture, uint8 (height, width, 3); None if there is no file of this name."""
    if (picture := folder / f"{name}.png").is_file():
        with Image.open(picture) as opened:
            return scaled(np.asarray(opened.convert("RGB")), height)
    if not (video := folder / f"{name}.mp4").is_file():
        return None
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            for index, frame in enumerate(container.decode(stream)):
                if index >= stream.frames // 2:
                    return scaled(frame.to_ndarray(format="rgb24"), height)
    except (av.error.FFmpegError, IndexError):  # a file that was cut off or replaced by hand
        return None
    return None
