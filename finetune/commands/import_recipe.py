"""Make a recipe of another trainer's settings, and say what became of each of them. Nothing is executed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from finetune.commands.common import number_of_gpus
from finetune.importers import Draft, import_files, recipe_text
from finetune.recipe import load_recipe
from finetune.recipe.rules import saver_problems
from finetune.runtime.errors import Problem, UserError, harmless
from finetune.runtime.logging import tell

EXAMPLES = """\
finetune import train.toml dataset.toml --out mine.toml
finetune import train.sh --gpus 4 --clips 120          it counted epochs, and was started on 4 GPUs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="what the other trainer is started with: a script or command (.sh, .txt, - for standard input), and its "
        "TOML, JSON or YAML files; files that these name are read where they lie",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the recipe into this file, which must be new; else it is printed"
    )
    parser.add_argument(
        "--gpus", type=number_of_gpus, metavar="N", help="GPUs that it was started on, if the files do not say it"
    )
    parser.add_argument(
        "--clips", type=number_of_clips, metavar="N", help="how many clips there are, where epochs are counted"
    )


def number_of_clips(text: str) -> int:
    """An argument's value as a count of clips; raises argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of clips")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    out = Path(arguments.out) if arguments.out else None
    if out and out.exists():
        raise UserError("the file is there already", "give --out a new name, or move it", str(out))
    draft = import_files(arguments.files, arguments.gpus, arguments.clips)
    text = recipe_text(draft, " ".join(Path(file).name for file in arguments.files))
    _check(text, draft)
    report = "\n".join(_report(draft, arguments))
    if out is None:
        print(harmless(report), file=sys.stderr)
        tell(text.rstrip("\n"))
        return 0
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", "give --out a file in a folder that is there", str(out)
        ) from None
    tell(report)
    return 0


def _report(draft: Draft, arguments: argparse.Namespace) -> list[str]:
    counts = Counter(note.outcome for note in draft.notes)
    lines = [str(note) for note in draft.notes]
    lines.append(f"{draft.trainer}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for what in dict.fromkeys(draft.todo):
        lines.append(f"look at: {what}")
    name = arguments.out or "mine.toml"
    where = f"{name} is written" if arguments.out else "the recipe is printed; --out mine.toml writes it"
    gpus = f" --gpus {draft.gpus}" if draft.gpus > 1 else ""
    lines.append(f"{where}. Next: python -m finetune check --recipe {name}{gpus}")
    return lines


def _check(text: str, draft: Draft) -> None:
    """Raise UserError, by the recipe's keys, if the source has values that no recipe can have."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "imported.toml"
        path.write_text(text, encoding="utf-8")
        try:
            recipe = load_recipe(path)
            problems = saver_problems(recipe, draft.gpus)
        except UserError as error:
            problems = [Problem(each.what, _setting(each.what, draft), each.cure) for each in error.problems]
    if problems:
        raise UserError.of(problems, f"{draft.trainer}: {len(problems)} settings that no recipe can have")


def _setting(what: str, draft: Draft) -> str:
    """The setting of the source that a key of the recipe was made of; "" if it is not known."""
    key = what.split(" =")[0].split("[")[0].split(":")[0].strip()
    return next((note.setting for note in draft.notes if note.target.startswith(f"{key} =")), "")
