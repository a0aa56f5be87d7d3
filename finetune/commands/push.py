"""Give a finished run to the Hugging Face Hub: weights, a model card, samples and the recipe. Private if not said otherwise."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.common import folder_named
from finetune.runtime.errors import UserError
from finetune.runtime.files import writing
from finetune.runtime.logging import listed, say
from finetune.runtime.units import counted

if TYPE_CHECKING:
    from finetune.models.family import Family
    from finetune.recipe import Recipe
    from finetune.training.finished import Trained

_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
_OFFLINE = "hub"  # the folder in the run's that is written without a network


EXAMPLES = """\
finetune push --run runs/mine --repo you/surfing-ltx
finetune push --run runs/mine --repo you/surfing-ltx --offline-folder card      only look at what would be sent
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--run", type=folder_named, required=True, help="the run's output folder")
    parser.add_argument("--repo", required=True, help="the repository, such as you/surfing-ltx")
    parser.add_argument(
        "--public", action="store_true", help="make the repository one that all see; else it is private"
    )
    parser.add_argument("--revision", default="main", help="a branch of the repository, which is made if there is none")
    parser.add_argument(
        "--message", default="Weights, samples, recipe and card of a training", help="message of the commit"
    )
    parser.add_argument("--base-model", help="the base model's id on the Hub, if the recipe names a folder")
    parser.add_argument("--offline-folder", type=folder_named, help="only write the files, into this folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="table.key=value", help="override one key of the run's recipe"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if not _NAME.fullmatch(arguments.repo):
        raise UserError("not the name of a repository", "write it like you/surfing-ltx", f"--repo {arguments.repo}")
    from finetune.tracking.hub import check_name, command_for_later, full_name, is_offline, push_folder
    from finetune.training.finished import recipe_of_run, trained_of

    check_name(arguments.repo, f"--repo {arguments.repo}")
    if arguments.base_model is not None:
        check_name(arguments.base_model, f"--base-model {arguments.base_model}")
    if not re.fullmatch(r"[^\s~^:?*\[\\]+", arguments.revision):
        raise UserError("not the name of a branch", "write one without spaces, or leave it out", "--revision")
    out: Path | None = arguments.offline_folder
    if out is None and is_offline():
        out = arguments.run / _OFFLINE
    recipe = recipe_of_run(arguments.run, arguments.set)
    if out is not None:
        if "/" not in arguments.repo:
            raise UserError("offline it is not known whose it is", "write it like you/NAME", f"--repo {arguments.repo}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError("this is not an empty folder", "remove it, or name another with --offline-folder", str(out))
    from finetune.checks.model import open_family

    family = open_family(recipe, with_weights=False)
    trained = trained_of(recipe, family)
    settings = (arguments.public, arguments.revision, arguments.message)
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        _write(arguments, arguments.repo, recipe, family, trained, out, is_online=False)
        say(f"wrote {out}, and sent nothing. With a network, this does:\n")
        say(f"    {command_for_later(out, arguments.repo, *settings)}")
        return 0
    repo = full_name(arguments.repo)
    with tempfile.TemporaryDirectory(prefix="finetune-push-") as folder:
        _write(arguments, repo, recipe, family, trained, Path(folder), is_online=True)
        done = push_folder(Path(folder), repo, *settings)
    whose = "private" if done.is_private else "public"
    if arguments.public and done.is_private:
        whose += " as it was: its settings on the Hub make it public"
    say(f"{'pushed' if done.is_new else 'nothing has changed since'} {done.url} ({whose})")
    return 0


def _write(
    arguments: argparse.Namespace,
    repo: str,
    recipe: Recipe,
    family: Family,
    trained: list[Trained],
    out: Path,
    is_online: bool,
) -> None:
    """Write all files of the repository into an empty folder, and say what is in it that the user may want to look at."""
    from finetune.tracking.hub import card_of
    from finetune.training.card import Destination, licence_of, local_licence, write_folder
    from finetune.training.facts import base_model_of

    base = arguments.base_model or base_model_of(recipe.model, family)
    licence = local_licence(family, trained, base)
    if not licence and base and is_online:
        licence = licence_of(card_of(base, recipe.model.revision), base)
    if base is None:
        say("the base model is known as a folder only: --base-model OWNER/NAME has the card name it, and its licence")
    left_out = write_folder(out, recipe, trained, Destination(repo, arguments.revision, base, licence))
    if left_out:
        say(f"left out of the recipe: {', '.join(left_out)}")
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    say(
        f"{counted(len(files), 'file')}, {size / 2**20:.1f} MiB: {listed(sorted(file.relative_to(out) for file in files), most=8)}"
    )
