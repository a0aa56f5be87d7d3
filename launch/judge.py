"""Did the quickstart learn? `python launch/judge.py RUN SAMPLES CLIPS RECIPE` counts the videos that show the new shape.

SAMPLES is the folder of `finetune sample --compare`. Draws base | with the LoRA | a real clip, as a contact sheet and as a
moving picture. Ends with exit status 1 unless the shape is in 80 % of the trained model's videos, and in no more than 20 % of
the base model's.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.data.shapes import NEW_SHAPE, seen
from finetune.runtime.files import atomic

MOST_OF_BASE, LEAST_OF_TRAINED = 0.2, 0.8
HEIGHT, GAP, LABEL = 112, 6, 26  # pixels of a picture, between cells, and of a line of text
MOVING_HEIGHT, FPS = 208, 8  # of the moving picture's videos, as wide as a prompt


def frames_of(path: Path) -> np.ndarray:
    """A video's frames, uint8 (F, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shares(folder: Path) -> dict[str, list[bool]]:
    """Whether each video shows the new shape, of the base model and of the trained one."""
    return {
        version: [seen(frames_of(path)).shape == NEW_SHAPE for path in sorted(folder.glob(f"*_{version}.mp4"))]
        for version in ("base", "trained")
    }


@dataclass(frozen=True)
class Compared:
    """A video of the base model, the same with the LoRA, and a real clip: frames, uint8 (F, H, W, 3), and what each shows."""

    videos: list[np.ndarray]
    texts: list[str]


def compared(samples: Path, real: list[Path], prompts: list[str]) -> list[Compared]:
    """One for each video of the trained model."""
    found = []
    for number, video in enumerate(sorted(samples.glob("*_trained.mp4"))):
        clip = real[number % len(real)]
        files = (video.with_name(video.name.replace("_trained", "_base")), video, clip)
        texts = [prompts[number]] * 2 + [clip.with_suffix(".txt").read_text(encoding="utf-8").strip()]
        found.append(Compared([frames_of(file) for file in files], texts))
    return found


def contact_sheet(rows: list[Compared], path: Path) -> None:
    """Write a PNG: a row for each, with start, middle and end of the base model's video, the trained model's and a real one."""
    drawn(rows, lambda video: video[[0, 8, -1]], HEIGHT).save(path)


def moving_picture(rows: list[Compared], path: Path) -> None:
    """Write an animated WebP with the same rows and columns, which plays all videos again and again."""
    count = min(len(video) for row in rows for video in row.videos)
    pictures = [drawn(rows, lambda video, at=at: video[[at]], MOVING_HEIGHT) for at in range(count)]
    with atomic(path) as partial:
        rest = pictures[1:]
        pictures[0].save(partial, "WEBP", save_all=True, append_images=rest, duration=1000 // FPS, loop=0, quality=85)


def drawn(rows: list[Compared], chosen: Callable[[np.ndarray], np.ndarray], height: int) -> Image.Image:
    """The rows with the `chosen` frames of each video beside each other, `height` pixels high."""
    font = ImageFont.load_default(size=15)
    cells = [[[picture(frame, height) for frame in chosen(video)] for video in row.videos] for row in rows]
    wide, count = cells[0][0][0].width, len(cells[0][0])
    cell_width = count * (wide + 2) - 2
    size = 3 * (cell_width + 2 * GAP) + GAP, LABEL + len(rows) * (height + LABEL + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("the base model", "with the LoRA", "a real clip")):
        left = GAP + column * (cell_width + 2 * GAP)
        draw.text((left, GAP), title, fill="black", font=font)
        for number, row in enumerate(rows):
            top = LABEL + number * (height + LABEL + GAP)
            draw.text((left, top + GAP), row.texts[column], fill="#555555", font=font)
            for place, frame in enumerate(cells[number][column]):
                sheet.paste(frame, (left + place * (wide + 2), top + LABEL))
    return sheet


def picture(frame: np.ndarray, height: int) -> Image.Image:
    return Image.fromarray(frame).resize((round(height * frame.shape[1] / frame.shape[0]), height))


def prompts_of(recipe: Path) -> list[str]:
    """The prompt of each sample: each is there once for each of its seeds."""
    from finetune.recipe import load_recipe

    prompts = load_recipe(str(recipe), []).validation.prompts
    return [prompt.text for prompt in prompts for _ in prompt.seeds]


def main() -> int:
    run, samples, clips, recipe = map(Path, sys.argv[1:5])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    heldout = [row for row in rows if "heldout_loss" in row]
    first, last = heldout[0]["heldout_loss"], heldout[-1]["heldout_loss"]
    by_heart = ": a dozen clips are soon known by heart, and more would keep it low" if last > first else ""
    print(f"held-out loss {first:.3f} -> {last:.3f}{by_heart}")
    found = shares(samples)
    for version, name in (("base", "the base model"), ("trained", "the model with the LoRA")):
        print(f"{name}: {sum(found[version])} of {len(found[version])} videos show a {NEW_SHAPE}")
    rows_of_videos = compared(samples, sorted(clips.glob("*.mp4")), prompts_of(recipe))
    contact_sheet(rows_of_videos, samples / "base_trained_real.png")
    moving_picture(rows_of_videos, samples / "base_trained_real.webp")
    print(f"look at {samples / 'base_trained_real.png'}, at the same moving in {samples / 'base_trained_real.webp'},")
    print(f"and at the run's page, {run / 'report.html'}")
    learnt = found["trained"] and np.mean(found["trained"]) >= LEAST_OF_TRAINED
    was_new = np.mean(found["base"] or [True]) <= MOST_OF_BASE
    if not (learnt and was_new):
        print(f"expected: at least {LEAST_OF_TRAINED:.0%} with the LoRA, at most {MOST_OF_BASE:.0%} without it")
    return int(not (learnt and was_new))


if __name__ == "__main__":
    sys.exit(main())
