"""Draw the loss curve of a run, as loss.png in its folder."""

import argparse

from finetune.commands.common import folder_named
from finetune.runtime.logging import say

EXAMPLES = """\
finetune plot --run runs/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--run", type=folder_named, required=True, help="the run's output folder")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from finetune.tracking.plot import plot_losses

    say(f"wrote {plot_losses(arguments.run)}")
    return 0
