"""Did the quickstart learn? `python launch/judge.py RUN SAMPLES CLIPS RECIPE` counts the videos that show the new shape.

SAMPLES is the folder of `finetune sample --compare`. Draws the contact sheet base | with the LoRA | a real clip, and ends with
exit status 1 unless the shape is in 80 % of the trained model's videos, and in no more than 20 % of the base model's.
"""

import json
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.data.shapes import NEW_SHAPE, seen

MOST_OF_BASE, LEAST_OF_TRAINED = 0.2, 0.8
HEIGHT, GAP, LABEL = 112, 6, 26  # pixels of a picture, between cells, and of a line of text


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


def contact_sheet(samples: Path, real: list[Path], prompts: list[str], path: Path) -> None:
    """Write a PNG: a row for each video of the trained model, its columns are the base model, the trained one and a real clip,
    each at its start, middle and end.
    """
    font = ImageFont.load_default(size=15)
    trained = sorted(samples.glob("*_trained.mp4"))
    rows = []
    for number, video in enumerate(trained):
        base = video.with_name(video.name.replace("_trained", "_base"))
        cells = [frames_of(file)[[0, 8, -1]] for file in (base, video, real[number % len(real)])]
        rows.append([[picture(frame) for frame in cell] for cell in cells])
    wide = rows[0][0][0].width
    cell_width = 3 * wide + 4
    sheet = Image.new(
        "RGB", (3 * (cell_width + 2 * GAP) + GAP, LABEL + len(rows) * (HEIGHT + LABEL + GAP) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("the base model", "with the LoRA", "a real clip")):
        left = GAP + column * (cell_width + 2 * GAP)
        draw.text((left, GAP), title, fill="black", font=font)
        for number, row in enumerate(rows):
            top = LABEL + number * (HEIGHT + LABEL + GAP)
            clip = real[number % len(real)].with_suffix(".txt")
            text = prompts[number] if column < 2 else clip.read_text(encoding="utf-8").strip()
            draw.text((left, top + GAP), text, fill="#555555", font=font)
            for place, frame in enumerate(row[column]):
                sheet.paste(frame, (left + place * (wide + 2), top + LABEL))
    sheet.save(path)


def picture(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame).resize((round(HEIGHT * frame.shape[1] / frame.shape[0]), HEIGHT))


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
    sheet = samples / "base_trained_real.png"
    contact_sheet(samples, sorted(clips.glob("*.mp4")), prompts_of(recipe), sheet)
    print(f"look at {sheet}")
    learnt = found["trained"] and np.mean(found["trained"]) >= LEAST_OF_TRAINED
    was_new = np.mean(found["base"] or [True]) <= MOST_OF_BASE
    if not (learnt and was_new):
        print(f"expected: at least {LEAST_OF_TRAINED:.0%} with the LoRA, at most {MOST_OF_BASE:.0%} without it")
    return int(not (learnt and was_new))


if __name__ == "__main__":
    sys.exit(main())
