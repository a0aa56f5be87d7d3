"""Ranks that hold the same part of bf16 weights round it alike, and so hold the same bits."""

from pathlib import Path

import pytest
from processes import figures_of


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.full
def test_replicas_are_equal_bit_for_bit(recipe_file: Path, tmp_path: Path, processes: int) -> None:
    """With every optimizer, replicated and hybrid, updated after and in the backward pass."""
    text = recipe_file.read_text().replace("global_batch_size = 4", f"global_batch_size = {processes}")
    recipe_file.write_text(text)
    found = figures_of("replicas_worker.py", processes, tmp_path, [recipe_file])
    assert len(found) == (8 if processes == 2 else 16)
    assert [name for name, differing in found.items() if differing] == []
