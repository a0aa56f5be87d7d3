"""Compare finished runs by their held-out losses, before and after, inside and outside of the noise levels that each trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.runtime.logging import tell

EXAMPLES = """\
finetune compare runs/rank16 runs/rank64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="OUTPUT", help="folders of runs; one with experts has several"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from finetune.tracking.comparison import comparison

    tell("\n".join(comparison(arguments.runs)))
    return 0
