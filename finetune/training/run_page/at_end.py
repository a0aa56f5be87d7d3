"""Has every start of a run end with its page, which no training fails for."""

import time
from collections.abc import Callable

from finetune.recipe import Recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.logging import say
from finetune.training.run_page.page import write_run_page

_AFTER_ALL_STEPS, _AFTER_A_STOP = 120.0, 3.0  # seconds for previews: who stops a run is in a hurry


def with_page(recipe: Recipe, runtime: Runtime, train: Callable[[], int]) -> int:
    """Do the training, which returns the process's exit status, and write the page of its output. Collective.

    After an error there is a page only of a run in one process: with several, torchrun ends rank 0 while it would write.
    """
    try:
        status = train()
    except LostPeer:
        raise
    except UserError:
        if runtime.world_size == 1:
            _write(recipe, _AFTER_A_STOP)
        raise
    runtime.doing("writing the page of the run")
    with runtime.together():
        if runtime.is_main:
            _write(recipe, _AFTER_A_STOP if status else _AFTER_ALL_STEPS)
    return status


def _write(recipe: Recipe, seconds: float) -> None:
    start = time.monotonic()
    try:
        path, size = write_run_page(recipe.output, is_running=False, seconds=seconds)
    except Exception as error:  # the training is done, whatever is wrong with its page
        reason = str(error).partition("\n")[0] or type(error).__name__
        say(f"warning: the page of the run is not written ({reason}); try finetune report --run {recipe.output}")
        return
    took = time.monotonic() - start
    say(f"the page of the run: {path} ({size / 1e6:.1f} MB" + (f", in {took:.0f} s)" if took > 5 else ")"))
