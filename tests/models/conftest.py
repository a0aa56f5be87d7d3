"""The tiny pipeline of each family and variant, opened."""

from collections.abc import Callable
from pathlib import Path

import pytest
from recording import MARKED, TinyModel, variant_id


@pytest.fixture(params=MARKED, ids=variant_id)
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> TinyModel:
    """Each family and variant; a test that is about some of them parametrises it with `recording.variants`."""
    return TinyModel.open(tiny_model(*request.param), request.param[0])
