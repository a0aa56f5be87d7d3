"""`finetune`, and `python -m finetune`: hands over to the command line."""

import sys
from typing import NoReturn

from finetune.cli import LOST, main
from finetune.runtime.exit import leave


def run() -> NoReturn:
    """Run the command of this process's arguments, and end the process."""
    status = main(sys.argv[1:])
    leave(status, is_lost=status == LOST)


if __name__ == "__main__":
    run()
