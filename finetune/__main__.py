"""`python -m finetune`: hands over to the command line."""

import sys

from finetune.cli import LOST, main
from finetune.runtime.exit import leave

status = main(sys.argv[1:])
leave(status, is_lost=status == LOST)
