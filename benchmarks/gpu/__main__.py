"""What a GPU does with this project: `python -m benchmarks.gpu` measures, `python -m benchmarks.gpu --first` checks.

`[--models 5b 2b] [--seconds 540]` on one GPU: LoRA of rank 64 at 49x480x720, batch 1, and full finetuning, of CogVideoX with
random weights. Each line measures this project's own step on a newly built model, without its first two steps. "over
without" is the step time divided by that of the same step without its last saver; for copies, it shows the cost that does
not overlap with computation. "planned" is what `plan` says of the same recipe, simulated after the measurements, and "off"
by how much. Utilisation is the FLOPs of one forward and one backward pass, counted on the meta device without
recomputation, divided by the step time and by the measured rate of a large bf16 matrix product.

`--first [--only NAME ...] [--seconds 600] [--out FILE] [--folder LOGS]` makes the checks of the first minutes with a GPU,
each in a process of its own, and prints a table of verdicts; the exit status is 1 if any failed.

`--smoke` takes tiny models, to test the benchmarks themselves: on any device, the checks on a CPU.
"""

import argparse
import sys
from pathlib import Path

import torch

from finetune.runtime.device import why_no_accelerator

SECONDS = {False: 540.0, True: 600.0}  # whether --first -> the default of --seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["2b", "5b"], default=["5b", "2b"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-plan", action="store_true", help="do not plan the memory of what is measured")
    parser.add_argument("--first", action="store_true", help="the checks of the first minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these checks; one of your own is module:function")
    parser.add_argument("--out", type=Path, help="write the table of the checks to a file, too")
    parser.add_argument("--folder", type=Path, help="keep what the checks write, their logs too, in this empty folder")
    parser.add_argument("--seconds", type=float, help="begin nothing further after this long (540; the checks: 600)")
    parser.add_argument("--smoke", action="store_true", help="tiny models and small videos, without a GPU, too")
    arguments = parser.parse_args()
    if arguments.seconds is None:
        arguments.seconds = SECONDS[arguments.first]
    if not arguments.smoke and not torch.accelerator.is_available():
        parser.error(f"there is no GPU here ({why_no_accelerator()}); --smoke runs on a CPU")
    if arguments.first:
        from benchmarks.gpu.first.run import run
    else:
        from benchmarks.gpu.measure import run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
