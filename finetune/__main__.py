"""`python -m finetune`: hands over to the command line."""

import sys

from finetune.cli import main

sys.exit(main(sys.argv[1:]))
