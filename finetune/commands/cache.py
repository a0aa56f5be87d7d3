"""What takes room in a cache (size), what is damaged in it (verify), and what no recipe uses (prune)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.common import folder_named, with_runtime
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say, tell
from finetune.runtime.units import in_words

if TYPE_CHECKING:
    from finetune.data.cache import Cache
    from finetune.runtime.distributed import Runtime

Uses = dict[str, set[tuple[str, str]]]


EXAMPLES = """\
finetune cache size --dir cache
finetune cache verify --dir cache --remove
finetune cache prune --recipe mine.toml --recipe runs/older/recipe.toml --older-than 30 --yes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "action",
        choices=("size", "verify", "prune"),
        help="size: what takes room; verify: what is damaged; prune: remove what no recipe uses",
    )
    parser.add_argument(
        "--dir", type=folder_named, metavar="CACHE", help="the cache; data.cache of the recipes if not given"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        help="size: say what it uses; prune: keep what it uses. May be given several times, also as RUN/recipe.toml",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="table.key=value", help="override one key, in each recipe"
    )
    parser.add_argument("--remove", action="store_true", help="verify: remove damaged items")
    parser.add_argument(
        "--older-than", type=_days, default=0.0, metavar="DAYS", help="prune: only items that were written before"
    )
    parser.add_argument("--yes", action="store_true", help="prune: remove them; without it, they are only counted")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipes = {name: load_recipe(name, arguments.set) for name in arguments.recipe}
    _check_options(arguments)
    folder = _folder(arguments.dir, list(recipes.values()))
    from finetune.data.cache import Cache

    cache = Cache(folder)
    if arguments.action == "verify":
        return _verify(cache, arguments.remove)
    uses: Uses = {}
    if recipes:

        def body(runtime: Runtime) -> int:
            from finetune.checks.buckets import resolve_buckets
            from finetune.checks.model import open_family
            from finetune.preparation.used import used_keys

            for name, recipe in recipes.items():
                with runtime.together():
                    family = open_family(recipe)
                uses[name] = used_keys(resolve_buckets(recipe, family, runtime, cache), family, runtime, folder)
            return 0

        with_runtime(next(iter(recipes.values())), body, on_cpu=True)
    if arguments.action == "prune":
        return _prune(cache, uses, arguments.older_than, arguments.yes)
    from finetune.preparation.upkeep import room

    tell("\n".join(room(cache, uses)))
    return 0


def _verify(cache: Cache, is_removing: bool) -> int:
    from finetune.preparation.upkeep import remove, verify

    found = verify(cache)
    say(found.told)
    if is_removing and found.damaged:
        for _, problem in found.damaged:
            say(f"{problem.where}: {problem.what}")
        if problems := remove([item for item, _ in found.damaged]):
            raise UserError.of(problems)
        say(f"removed {len(found.damaged)}: the next start that needs one encodes it anew")
    damaged = [] if is_removing else [problem for _, problem in found.damaged]
    if problems := damaged + found.unreadable:
        raise UserError.of(problems, f"{len(problems)} items are damaged or cannot be read:")
    if not found.damaged:
        say("no item is damaged")
    return 0


def _prune(cache: Cache, uses: Uses, days: float, is_meant: bool) -> int:
    from finetune.preparation.upkeep import by_kind, remove, unused

    items = unused(cache, uses.values(), days)
    if items and not is_meant:
        say(f"used by none of these recipes: {by_kind(items)}; --yes removes them")
        return 0
    if problems := remove(items):
        raise UserError.of(problems)
    say(f"removed {by_kind(items)}" if items else "there is nothing to remove")
    if is_meant and (shorter := cache.files.compact()) > 0:
        say(f"{cache.files.path}: {in_words(shorter)} of what holds no more taken out")
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.action == "prune" and not arguments.recipe:
        raise UserError(
            "no recipe is named, so nothing tells what is still used",
            "name every recipe whose items are to be kept: --recipe R (also RUN/recipe.toml, as a run keeps it)",
            "cache prune",
        )
    for option, action in (("remove", "verify"), ("older_than", "prune"), ("yes", "prune")):
        if getattr(arguments, option) and arguments.action != action:
            raise UserError(
                f"--{option.replace('_', '-')} goes with `cache {action}`", "leave it out", f"cache {arguments.action}"
            )


def _folder(named: Path | None, recipes: list[Recipe]) -> Path:
    """The cache that is meant. Raises UserError if that is not clear, or there is none."""
    folders = sorted({recipe.data.cache for recipe in recipes})
    if named is None and len(folders) != 1:
        what = f"the recipes have several caches ({', '.join(map(str, folders))})" if folders else "no cache is named"
        raise UserError(what, "name one with --dir", "cache")
    folder = named or folders[0]
    if not folder.is_dir():
        raise UserError("there is no such folder", "name a cache with --dir", str(folder))
    return folder


def _days(text: str) -> float:
    """An argument's value as a number of days; raises argparse's error."""
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days")
    return days
