"""Make something to try the trainer on without a download: a small pipeline that draws moving shapes, and clips of a new one."""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.commands.common import folder_named
from finetune.runtime.errors import UserError
from finetune.runtime.files import read_note, writing
from finetune.runtime.logging import say

LEARNT = Path(__file__).parents[1] / "demo_model"
TRIGGER = "zorb"  # what captions call the shape that the pipeline has not seen
_INDEX = "model_index.json"
_SEED = 16


EXAMPLES = """\
finetune demo --out demo
finetune demo --family wan --variant 2.2-A14B --out tiny      random weights of two experts
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--out", type=folder_named, required=True, help="folder to write to")
    parser.add_argument(
        "--family",
        help="a tiny pipeline of random weights of this family instead; see `families`; or package.module:Class",
    )
    parser.add_argument("--variant", help="which checkpoint of the family; see `families`")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if arguments.family is not None:
        make_demo(arguments.out, arguments.family, arguments.variant)
        return 0
    if arguments.variant is not None:
        raise UserError("a variant of which family?", "add --family F; see `python -m finetune families`", "--variant")
    make_learnt_demo(arguments.out)
    return 0


def make_learnt_demo(out: Path) -> None:
    """Write the pipeline that has learnt to draw moving shapes, a Wan, and clips of a shape that it has not seen, a ring, which
    their captions call a "zorb"; what is there already is kept.
    """
    if not (LEARNT / _INDEX).is_file():
        cure = "install the project anew, or make a random one: --family wan"
        raise UserError("the demo's pipeline is not in this installation", cure, str(LEARNT))
    written = _write(
        out,
        {
            "model": _copy_model,
            "clips": lambda folder: write_shapes(folder, 12, _SEED),
            "heldout": lambda folder: write_shapes(folder, 3, _SEED + 1),
        },
        {"family": "wan", "weights": "learnt"},
        ("WanPipeline",),
    )
    what = 'a small Wan pipeline that draws moving shapes in model/, 12 clips of a "zorb" in clips/, 3 in heldout/'
    say(f"{out}: {what}{written}")


def make_demo(out: Path, family: str, variant: str | None = None) -> None:
    """Write `out/model` (a random pipeline of a few MB), `out/clips` and `out/heldout`; what is there already is kept."""
    from finetune.data.synthetic import RECORDINGS, write_clips
    from finetune.models import family_class

    cls = family_class(family)
    if variant and variant not in cls.variants:
        cure = f"variants are: {', '.join(cls.variants)}" if cls.variants else "leave --variant out"
        raise UserError(f"{family} has no variant {variant!r}", cure, "--variant")
    written = _write(
        out,
        {
            "model": lambda folder: cls.tiny(folder, variant=variant),
            "clips": lambda folder: write_clips(folder, RECORDINGS),
            "heldout": lambda folder: write_clips(
                folder, [replace(r, name=f"heldout_{r.name}") for r in RECORDINGS[:3]], first_scene=len(RECORDINGS)
            ),
        },
        {"family": family, "variant": variant or next(iter(cls.variants), None), "weights": "random"},
        cls.pipeline_classes,
    )
    what = f"a tiny {family} pipeline of random weights in model/, {len(RECORDINGS)} clips in clips/, 3 in heldout/"
    say(f"{out}: {what}{written}")


def write_shapes(folder: Path, count: int, seed: int) -> None:
    """Write clips of the new shape, 17 frames of 64 x 96 pixels, each with a caption in a .txt file beside it."""
    import numpy as np

    from finetune.data.shapes import COLOURS, DIRECTIONS, FLOORS, FRAMES, HEIGHT, NEW_SHAPE, WIDTH, draw, random_scene
    from finetune.data.synthetic import Recording, record

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    turns = [list(rng.permutation(list(of))) for of in (COLOURS, FLOORS, DIRECTIONS)]
    for index in range(count):
        colour, floor, direction = (str(of[index % len(of)]) for of in turns)
        floor = str(turns[1][(index + index // len(FLOORS)) % len(FLOORS)])
        scene = random_scene(rng, [NEW_SHAPE], spread=0.35, colours=[colour], floors=[floor], directions=[direction])
        path = folder / f"{TRIGGER}_{index:02d}.mp4"
        record(draw(scene), path, Recording(path.name, HEIGHT, WIDTH, FRAMES, fps=12))
        path.with_suffix(".txt").write_text(scene.caption(index % 2, TRIGGER) + "\n", encoding="utf-8")


def _copy_model(folder: Path) -> None:
    """Copy the pipeline's own files: model_index.json and its components' folders."""
    folder.mkdir(parents=True)
    shutil.copy(LEARNT / _INDEX, folder)
    for part in sorted(path for path in LEARNT.iterdir() if path.is_dir()):
        shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("__pycache__"))


def _write(
    out: Path, parts: dict[str, Callable[[Path], None]], made_of: dict[str, str | None], pipelines: Sequence[str]
) -> str:
    """Make each part that is not there. Returns what to add to the message about them.

    Raises:
        UserError: there is a demo of another family, or a part cannot be written.
    """
    note = out / "demo.json"
    there = [name for name in parts if (out / name).exists()]
    if there:
        _refuse_another(note, out, made_of, pipelines)
    for name, make in parts.items():
        if name in there:
            continue
        partial = out / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(out / name):
                make(partial)
                partial.rename(out / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if "model" not in there:
        with writing(note):
            note.write_text(json.dumps(made_of) + "\n", encoding="utf-8")
    return f" ({', '.join(f'{name}/' for name in there)} kept as found)" if there else ""


def _refuse_another(note: Path, out: Path, made_of: dict[str, str | None], pipelines: Sequence[str]) -> None:
    """Raise UserError if the demo that is there is another one than is wanted."""
    found = read_note(note)
    made_by = read_note(out / "model" / _INDEX).get(
        "_class_name"
    )  # of a demo that an earlier release made, or half of one
    if found not in ({}, made_of) or (made_by is not None and made_by not in pipelines):
        told = " ".join(str(value) for value in found.values() if value) or made_by
        raise UserError(f"it holds another demo ({told})", "give another --out, or remove this folder first", str(out))
