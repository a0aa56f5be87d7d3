"""Memory savers compose: alone and in pairs, on one process and on two, they train what the plain run trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import figures_of
from savers import ALONE, FAMILIES, METHODS, baseline, chosen

FIGURES = ("loss", "grad_norm", "heldout")
TOLERANCE = 1e-5  # in float32, relative to each figure, a mean or root of squares, in which nothing cancels
# What two processes round otherwise than one: blocks of moments end where shards do, numbers for stochastic rounding are
# drawn by each rank (and in the order of the updates), and a tensor's float8 scale is that of a rank's own samples.
ROUNDED_BY_RANK = {
    "adamw_8bit": 5e-3,
    "adamw_fp8": 5e-3,
    "adamw_4bit": 5e-3,
    "bf16 weights": 2e-2,
    "float8 products": 5e-3,
}


def cases(which: str) -> list[tuple[int, str, str, str]]:
    """(processes, family, method, saver) of all of the matrix, or of what the default suite runs of it."""
    return [
        (processes, family, method, name)
        for processes in (1, 2)
        for family in FAMILIES
        for method in METHODS
        for name in chosen(which, family, method, processes)
    ]


@pytest.fixture(scope="session")
def matrix(
    tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]
) -> Callable[[str, int], dict[str, dict]]:
    """Figures of tests/engine/savers_worker.py, made when they are first asked for."""
    known: dict[tuple[str, int], dict] = {}

    def get(which: str, processes: int) -> dict[str, dict]:
        if (which, processes) not in known:
            recipes = [family_recipe(family) for family in (FAMILIES if which == "all" else ALONE.values())]
            folder = tmp_path_factory.mktemp(f"savers-{which}")
            seconds = 290 if which == "some" else 6000
            known[which, processes] = figures_of("savers_worker.py", processes, folder, [which, *recipes], seconds)
        return known[which, processes]

    return get


@pytest.mark.parametrize("processes, family, method, saver", cases("some"))
def test_a_saver_trains_what_the_plain_run_trains(matrix, processes: int, family: str, method: str, saver: str) -> None:
    compare(matrix("some", processes)[family][method], matrix("some", 1)[family][method], processes, saver)


@pytest.mark.full
@pytest.mark.timeout(7000)
@pytest.mark.parametrize("processes, family, method, saver", cases("all"))
def test_every_pair_trains_what_the_plain_run_trains(
    matrix, processes: int, family: str, method: str, saver: str
) -> None:
    compare(matrix("all", processes)[family][method], matrix("all", 1)[family][method], processes, saver)


def compare(figures: dict, alone: dict, processes: int, saver: str) -> None:
    """With the run of one process that has the same changes and nothing else."""
    changes = baseline(saver)
    found, expected = figures[saver], alone[f"as {changes}"]
    limits = [ROUNDED_BY_RANK.get(change, TOLERANCE) for change in changes.split(" + ")]
    otherwise = processes > 1 or "updates in backward" in saver
    for figure in FIGURES:
        assert len(found[figure]) >= 2
        assert found[figure] == pytest.approx(expected[figure], rel=max(limits) if otherwise else TOLERANCE), figure
