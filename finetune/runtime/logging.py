"""One console per run: only rank 0 prints, and libraries are quiet."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

LIBRARIES = (
    "diffusers",
    "transformers",
    "peft",
    "torchao",
    "torchdata",
    "huggingface_hub",
    "libav",
    "PIL",
    "matplotlib",
    "wandb",
    "torch.distributed",
    "torch.utils._pytree",
)

HARMLESS = (
    "'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
    "In CPU autocast, but the target dtype is not supported",  # Mochi uses this to turn autocast off
    "FSDP2-wrapped module .* returned a view tensor",  # nothing modifies a transformer's output in place here
)


def quiet_libraries() -> None:
    """Raise the libraries' log level to errors and turn off their progress bars. Call before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quietly() -> Iterator[None]:
    """Print nothing inside the block."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def say(message: str) -> None:
    """Print one line on rank 0; other ranks stay silent."""
    if int(os.environ.get("RANK", 0)) == 0:
        console.print(message, markup=False)
