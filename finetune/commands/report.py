"""Write the page of a run, report.html in its folder: curves, samples, dataset, memory, settings and how to use the result.

It shows a run as it is by now: under way, stopped or finished.
"""

import argparse

from finetune.commands.common import folder_named
from finetune.runtime.logging import say

EXAMPLES = """\
finetune report --run runs/mine          then open runs/mine/report.html in a browser
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--run",
        type=folder_named,
        required=True,
        metavar="DIR",
        help="the run's output folder; of two experts, that which both lie in",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from finetune.training.run_page.page import write_run_page

    path, size = write_run_page(arguments.run)
    say(f"wrote {path} ({size / 1e6:.1f} MB)")
    return 0
