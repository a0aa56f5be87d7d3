"""What several files plan: a recipe, and a cache without plans."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def recipe(family_recipe: Callable[..., Path]) -> Path:
    return family_recipe("ltx")


@pytest.fixture(scope="module")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a test file's own: it has no plans yet."""
    return tmp_path_factory.mktemp("plans")
