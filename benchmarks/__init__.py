"""Measurements, each `python -m benchmarks.NAME`; what they gave is in `results/`."""

from finetune.runtime.logging import quiet_libraries

quiet_libraries()
