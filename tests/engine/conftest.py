"""A run that has saved checkpoints, for what becomes of them."""

from collections.abc import Callable

import pytest
from checkpointing import run

from finetune.training.job import Job


@pytest.fixture
def interrupted(build_job: Callable[..., Job]) -> Job:
    """A run that has saved its steps 2 and 4."""
    job = build_job("checkpoint.keep_last=all")
    run(job, 0, 4, save_each=2)
    return job
