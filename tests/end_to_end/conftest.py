"""No test leaves a training behind."""

from collections.abc import Iterator

import pytest
from trainings import RUNS


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    for run in RUNS:
        if run.process.poll() is None:
            run.kill_all()
