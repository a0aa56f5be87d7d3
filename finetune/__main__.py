"""`python -m finetune`: hands over to the command line."""

import sys

from finetune.cli import main
from finetune.runtime.exit import leave

leave(main(sys.argv[1:]))
