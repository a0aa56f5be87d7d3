"""The report of `check`: what becomes of every file of the datasets, as a page with a picture of every clip."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from finetune.models.family import Family
from finetune.preparation.account import account_of
from finetune.preparation.captions import CaptionCounter, caption_lengths
from finetune.preparation.inspect import Inspection, refuse_or_skip
from finetune.preparation.page import write_page
from finetune.preparation.thumbnails import thumbnails
from finetune.recipe import Recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem
from finetune.runtime.files import writing
from finetune.runtime.logging import say


def write_report(
    folder: Path,
    recipe: Recipe,
    inspected: Sequence[Inspection],
    family: Family | None,
    problems: Sequence[Problem],
    runtime: Runtime,
    counter: CaptionCounter | None = None,
) -> None:
    """Write the page, and say where it is. Collective.

    Args:
        inspected: as `inspect_datasets` returns it.
        family: the model, if it could be opened.
        problems: why the training does not accept the datasets.
        counter: counts the captions' tokens; without it words are counted.
    Raises:
        UserError: the page cannot be written; or, once it is, clips cannot be decoded, unless data.bad_clips is "skip".
    """
    with runtime.together(), writing(folder):
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)  # before minutes of decoding
    pictures = thumbnails([entry for each in inspected for entry in each.clips], recipe.data.background, runtime)
    of_clips = {problem.where for each in inspected for problem in (*each.problems, *each.unreadable)}
    others = [problem for problem in problems if problem.where not in of_clips]
    with runtime.together():
        if runtime.is_main:
            tokens = family.tokens if family else None
            captions = [caption for each in inspected for entry in each.clips for caption in entry.clip.captions]
            lengths = caption_lengths(captions, counter) if counter else []
            account = account_of(recipe, inspected, tokens, lengths, others)
            path, size = write_page(folder, account, pictures)
            say(f"report: {path} ({size / 1e6:.1f} MB)")
    undecoded = dict.fromkeys(chain.from_iterable(each.problems for each in pictures))
    refuse_or_skip(list(undecoded), recipe.data.bad_clips, "decoded")
