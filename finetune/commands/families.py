"""List the model families and their variants."""

import argparse

from finetune.runtime.logging import tell

EXAMPLES = """\
finetune families
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command takes no arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from finetune.models import FAMILIES, family_class

    for name in FAMILIES:
        cls = family_class(name)
        what = (cls.__doc__ or "").strip().partition("\n")[0]
        tell(f"{name:14} {what}" + (f" --variant: {', '.join(cls.variants)}" if cls.variants else ""))
    return 0
