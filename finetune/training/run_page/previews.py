"""A run's samples as a grid of prompt by step, with small videos that a page has in itself."""

import base64
import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
from PIL import Image

from finetune.recipe import Recipe
from finetune.recipe.prompts import validation_prompts
from finetune.runtime.errors import UserError

_STEP = re.compile(r"step_(\d+)")
_NAME = re.compile(r"(\d+)_seed(\d+)(?:_strength(-?[\d.e+-]+))?")
_SIDES = (320, 224, 160)  # pixels of the longer side; a smaller one where the page would be too large
_MOST_FRAMES = 97
_MOST_ROWS, _MOST_STEPS = 40, 10


@dataclass(frozen=True)
class Preview:
    """A sample in the page: a small copy as a data: address, and the whole file's path from the page's folder.

    `address` is empty where the file cannot be read; `poster` is a video's first frame.
    """

    file: str
    address: str
    is_video: bool
    width: int
    height: int
    poster: str = ""

    @property
    def size(self) -> int:
        return len(self.address) + len(self.poster)


@dataclass
class SampleRow:
    """The samples of one prompt, seed and strength, by step."""

    name: str
    prompt: str
    detail: str
    previews: dict[int, Preview] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleGrid:
    """All samples of a run.

    Attributes:
        rows: in the order of prompts, at most 40 of them.
        steps: those with previews in the page, ascending.
        linked: steps whose samples are only linked.
        more_rows: how many rows there are besides.
        why: why steps are only linked, in words; empty if none are.
    """

    rows: list[SampleRow]
    steps: list[int]
    linked: list[int]
    more_rows: int = 0
    why: str = ""


def sample_grid(run: Path, recipe: Recipe, page: Path, budget: int, seconds: float) -> SampleGrid | None:
    """The samples in a run's folder; None if there are none.

    Args:
        run: the folder with `samples` in it.
        page: the folder that the page lies in.
        budget: the most bytes that all addresses together may have.
        seconds: after this long no further previews are made.
    """
    rows, steps = _files(run, recipe, page)
    if not rows:
        return None
    shown = rows[:_MOST_ROWS]
    until, wanted = time.monotonic() + seconds, _by_worth(steps)[:_MOST_STEPS]
    kept: list[int] = []
    why = f"at most {_MOST_STEPS} steps are shown" if len(steps) > _MOST_STEPS else ""
    for side in _SIDES:
        kept, size, is_late = [], 0, False
        for step in wanted:
            made = {
                row.name: _preview(page / row.files[step], row.files[step], side) for row in shown if step in row.files
            }
            more = sum(preview.size for preview in made.values())
            if size + more > budget:
                why = f"the page would be larger than {budget / 1e6:.0f} MB"
                break
            for row in shown:
                if row.name in made:
                    row.previews[step] = made[row.name]
            kept.append(step)
            size += more
            if time.monotonic() > until and step != wanted[-1]:
                why, is_late = "there was no time for more; `finetune report` makes all", True
                break
        if len(kept) >= min(2, len(wanted)) or is_late:
            break
    linked = [step for step in steps if step not in kept]
    return SampleGrid(shown, sorted(kept), linked, len(rows) - len(shown), why if linked else "")


def _files(run: Path, recipe: Recipe, page: Path) -> tuple[list[SampleRow], list[int]]:
    """(the rows with the file of each step as its path from the page, all steps ascending)."""
    rows: dict[str, SampleRow] = {}
    steps = set()
    texts = _prompts(recipe)
    for folder in sorted((run / "samples").glob("step_*")):
        step = _STEP.fullmatch(folder.name)
        for file in sorted(folder.glob("*")) if step else []:
            named = _NAME.fullmatch(file.stem)
            if step is None or named is None or file.suffix not in (".mp4", ".png"):
                continue
            index = int(named[1])
            strength = f", strength {named[3]}" if named[3] is not None else ""
            prompt = texts[index] if index < len(texts) else f"prompt {index + 1}"
            row = rows.setdefault(file.stem, SampleRow(file.stem, prompt, f"seed {named[2]}{strength}"))
            row.files[int(step[1])] = file.relative_to(page).as_posix()
            steps.add(int(step[1]))
    return [rows[name] for name in sorted(rows, key=_order)], sorted(steps)


def _order(name: str) -> tuple[int, int, float]:
    named = _NAME.fullmatch(name)
    assert named is not None
    try:
        strength = float(named[3] or 1)
    except ValueError:
        strength = 1.0
    return int(named[1]), int(named[2]), strength


def _prompts(recipe: Recipe) -> list[str]:
    try:
        prompts = validation_prompts(recipe.validation, recipe.data.sample_shape)
    except (UserError, IndexError):  # a file of prompts that is gone
        return []
    return ["control: " * prompt.control + prompt.text for prompt in prompts]


def _by_worth(steps: Sequence[int]) -> list[int]:
    """All steps, those first that tell most: the last, the first, then what lies in the middle of the largest gap."""
    if len(steps) < 3:
        return list(reversed(steps))
    taken = [len(steps) - 1, 0]
    while len(taken) < len(steps):
        places = sorted(taken)
        gap, start = max((b - a, -a) for a, b in pairwise(places))
        taken.append(-start + gap // 2)
    return [steps[place] for place in taken]


def _preview(path: Path, file: str, side: int) -> Preview:
    is_video = path.suffix != ".png"
    try:
        if not is_video:
            with Image.open(path) as opened:
                data, (width, height) = _webp(opened.convert("RGB"), side)
            return Preview(file, _address("image/webp", data), False, width, height)
        data, first = _video(path, side)
        poster, (width, height) = _webp(first, side)
    except (OSError, ValueError, IndexError, SyntaxError, av.error.FFmpegError):  # cut off, or something else
        return Preview(file, "", is_video, 0, 0)
    return Preview(file, _address("video/mp4", data), True, width, height, _address("image/webp", poster))


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _webp(picture: Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    """(the picture in WebP, no side longer than `side`; its width and height)."""
    picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=75)
    return data.getvalue(), picture.size


def _video(path: Path, side: int) -> tuple[bytes, Image.Image]:
    """(a small H.264 copy, its first frame); of many frames every second, third and so on, at the same speed."""
    data, first = io.BytesIO(), None
    with av.open(str(path)) as source, av.open(data, "w", format="mp4") as target:
        stream = source.streams.video[0]
        rate = Fraction(stream.average_rate or 25)
        every = -(-(stream.frames or 1) // _MOST_FRAMES)
        scale = min(1.0, side / max(stream.width, stream.height))
        width, height = (max(2, round(length * scale) // 2 * 2) for length in (stream.width, stream.height))
        options = {"crf": "28", "preset": "veryfast"}
        out = target.add_stream("libx264", rate=(rate / every).limit_denominator(1001), options=options)
        out.width, out.height, out.pix_fmt = width, height, "yuv420p"
        for frame in islice(source.decode(stream), 0, None, every):
            small = frame.reformat(width=width, height=height, format="yuv420p")
            first, small.pts = first or small.to_image(), None
            target.mux(out.encode(small))
        target.mux(out.encode())
    if first is None:
        raise ValueError("no frames")
    return data.getvalue(), first
