"""Make something to try the trainer on without a download: a tiny random pipeline and a dozen real clips."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from finetune.commands.common import folder_named
from finetune.runtime.errors import UserError
from finetune.runtime.files import writing
from finetune.runtime.logging import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--out", type=folder_named, required=True, help="folder to write to")
    parser.add_argument("--family", default="ltx", help="see `families`; or package.module:Class (ltx)")
    parser.add_argument("--variant", help="which checkpoint of the family; see `families`")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    make_demo(arguments.out, arguments.family, arguments.variant)
    return 0


def make_demo(out: Path, family: str, variant: str | None = None) -> None:
    """Write `out/model` (a pipeline of a few MB), `out/clips` and `out/heldout`; what is there already is kept."""
    from finetune.data.synthetic import RECORDINGS, write_clips
    from finetune.models import family_class

    cls = family_class(family)
    if variant and variant not in cls.variants:
        cure = f"variants are: {', '.join(cls.variants)}" if cls.variants else "leave --variant out"
        raise UserError(f"{family} has no variant {variant!r}", cure, "--variant")
    parts = {
        "model": lambda folder: cls.tiny(folder, variant=variant),
        "clips": lambda folder: write_clips(folder, RECORDINGS),
        "heldout": lambda folder: write_clips(
            folder, [replace(r, name=f"heldout_{r.name}") for r in RECORDINGS[:3]], first_scene=len(RECORDINGS)
        ),
    }
    for name, make in parts.items():
        if (out / name).exists():
            continue
        partial = out / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(out / name):
                make(partial)
                partial.rename(out / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: a tiny {family} pipeline in model/, {len(RECORDINGS)} clips in clips/, 3 in heldout/")
