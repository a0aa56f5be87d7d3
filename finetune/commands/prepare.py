"""Encode clips and captions into the cache, and train nothing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, with_runtime
from finetune.recipe import load_recipe
from finetune.runtime.logging import say
from finetune.runtime.units import counted

if TYPE_CHECKING:
    from finetune.runtime.distributed import Runtime


EXAMPLES = """\
finetune prepare mine.toml
torchrun --nproc_per_node 8 -m finetune prepare mine.toml      each GPU encodes its share
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.buckets import resolve_buckets
    from finetune.checks.model import open_family
    from finetune.data.cache import Cache
    from finetune.preparation.encode import prepare
    from finetune.recipe.experts import recipes_of_experts
    from finetune.training.identity import begun

    def body(runtime: Runtime) -> int:
        with runtime.together():
            family = open_family(recipe)
        cache = Cache(recipe.data.cache)
        resolved = resolve_buckets(recipe, family, runtime, cache)
        its = begun(recipes_of_experts(resolved, list(family.experts)), family)
        prepared = prepare(resolved, family, runtime, cache, its)
        clips = counted(len(prepared.train), "clip")
        say(f"{clips} to train on, {len(prepared.heldout)} held out, in {recipe.data.cache}")
        return 0

    return with_runtime(recipe, body)
