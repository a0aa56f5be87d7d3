"""The published table, and what is reproduced of it exactly."""

from pathlib import Path

import pytest
from every_family import few
from PIL import Image
from processes import run_python

from benchmarks.memory.__main__ import RESULTS
from benchmarks.memory.chart import draw, read_table
from benchmarks.memory.ours import Ours, resident, with_savers
from benchmarks.memory.published import rows
from benchmarks.memory.table import Line, errors, markdown

LOAD = """
import json, sys
from benchmarks.memory.published import rows
from benchmarks.memory.reference import Reference
from finetune.planning.accelerator import Accelerator
from finetune.planning.device import register
from finetune.planning.trace import Trace
register()
with Accelerator(Trace(), Trace()) as accelerator:
    print(json.dumps(Reference(rows()[int(sys.argv[1]) - 1], accelerator)._load()))
"""
GIB = 2**30


def test_there_are_65_rows_of_which_63_have_a_training_peak() -> None:
    table = rows()
    assert len(table) == 65
    assert sum(row.published[1] is not None for row in table) == 63
    assert {row.model for row in table} == {"cogvideox-2b", "cogvideox-5b"}


@pytest.mark.parametrize("number", few([1, 8, 3, 7]))  # 2b and 5b with adapters of rank 16 and 64
def test_memory_before_training_is_reproduced_to_two_mib(number: int) -> None:
    done = run_python(["-c", LOAD, number])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / GIB == pytest.approx(rows()[number - 1].published[0], abs=0.0021)


@pytest.mark.parametrize("choose", [resident, with_savers])
def test_every_row_has_a_recipe_of_ours_that_is_valid(choose) -> None:
    for row in rows():
        ours = choose(row)
        assert Ours.parse(ours.key).recipe() == ours.recipe()
        assert ours.recipe().train.micro_batch_size == row.batch_size


def test_errors_are_told_by_group_with_masked_rows_apart() -> None:
    plain, masked = rows()[0], rows()[1]
    figures = {"reserved": 10 * GIB, "allocated": 9 * GIB}
    measured = dict(
        zip(("loaded", "training", "validation", "testing"), (13 * GIB, 44 * GIB, 45 * GIB, 24 * GIB), strict=True)
    )
    lines = [Line(plain, figures, figures, measured), Line(masked, figures, figures, measured | {"training": 8 * GIB})]
    assert lines[0].error(1) == pytest.approx(44 / 43.764 - 1)
    assert [line.is_masked for line in lines] == [False, True]
    told = errors(lines)
    assert "AdamW, no checkpointing | before validation, unmasked | 1 | 0.54%" in told
    assert "AdamW | before validation, masked | 1 | 0.42%" in told
    assert "43.76 / 44.00" in markdown(lines)


def test_the_chart_is_drawn_from_the_written_table(tmp_path: Path) -> None:
    figures = {"reserved": 10 * GIB, "allocated": 9 * GIB}
    out_of_memory = next(row for row in rows() if row.published[1] is None)
    lines = [Line(row, figures, figures) for row in (rows()[0], out_of_memory)]
    drawn = read_table(f"# A report\n\n| other | table |\n|---|---|\n\n{markdown(lines)}\n\n{errors(lines)}")
    assert [row.published[1] for row in drawn] == [43.76, None]
    assert [(row.ours, row.savers, row.reproduced) for row in drawn] == [(10, 10, ())] * 2
    written = read_table((RESULTS / "memory.md").read_text())
    assert len(written) == 65
    draw(written, tmp_path / "memory.png")
    with Image.open(tmp_path / "memory.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
