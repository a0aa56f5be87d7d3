"""Benchmarks, each run by `python -m benchmarks.NAME`. Their results are in `results/`."""

from finetune.runtime.logging import quiet_libraries

quiet_libraries()
