"""Memory savers compose: alone and in pairs, on one process and on two, they train what the plain run trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import figures_of
from savers import METHODS, ROUNDED, pairwise, savers, turn_of

MODELS = [("ltx", None), ("cogvideox", None), ("hunyuan", None)]
TOLERANCE = 1e-5  # relative, in float32
FIGURES = ("loss", "grad_norm", "heldout")


def cases(which: str) -> list[tuple[int, str, str, str]]:
    """(processes, family, method, saver) of all of the matrix, or of what the default suite runs of it."""
    found = []
    for processes in (1, 2):
        for place, (family, _) in enumerate(MODELS):
            for method in METHODS:
                turn = turn_of(place, method, processes)
                names = list(savers(method, processes))
                names = names if which == "all" else pairwise(names, turn)
                found += [(processes, family, method, name) for name in names if name != "plain"]
    return found


@pytest.fixture(scope="session")
def matrix(
    tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]
) -> Callable[[str, int], dict[str, dict]]:
    """Figures of tests/engine/savers_worker.py, made when they are first asked for."""
    recipes = [family_recipe(*model) for model in MODELS]
    known: dict[tuple[str, int], dict] = {}

    def get(which: str, processes: int) -> dict[str, dict]:
        if (which, processes) not in known:
            folder = tmp_path_factory.mktemp(f"savers-{which}")
            known[which, processes] = figures_of("savers_worker.py", processes, folder, [which, *recipes])
        return known[which, processes]

    return get


@pytest.mark.parametrize("processes, family, method, saver", cases("some"))
def test_a_saver_trains_what_the_plain_run_trains(matrix, processes: int, family: str, method: str, saver: str) -> None:
    compare(matrix("some", processes), matrix("some", 1), family, method, saver)


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes, family, method, saver", cases("all"))
def test_every_pair_trains_what_the_plain_run_trains(
    matrix, processes: int, family: str, method: str, saver: str
) -> None:
    compare(matrix("all", processes), matrix("all", 1), family, method, saver)


def compare(figures: dict, alone: dict, family: str, method: str, saver: str) -> None:
    """With the run of one process that has the same rounded weights, or none; nothing else may show."""
    rounded = [name for name in saver.split(" + ") if name in ROUNDED]
    found, expected = figures[family][method][saver], alone[family][method][rounded[0] if rounded else "plain"]
    for figure in FIGURES:
        assert len(found[figure]) >= 2
        assert found[figure] == pytest.approx(expected[figure], rel=TOLERANCE), figure
    if rounded:
        assert found["loss"] != alone[family][method]["plain"]["loss"]
