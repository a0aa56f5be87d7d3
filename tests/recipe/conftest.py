"""Recipes written to a file."""

from pathlib import Path

import pytest


@pytest.fixture
def written(tmp_path: Path):
    """Write a recipe text and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
