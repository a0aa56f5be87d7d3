"""Every adapter on every kind of frozen weights, on two processes as on one: the same steps, and the same exported weights."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from adapters_worker import ADAPTERS, BASES, SOME
from processes import figures_of

FAMILIES = [("ltx", "0.9.0"), ("cogvideox", "2b"), ("hunyuan", None), ("wan", "2.1")]
TOLERANCE = 1e-5  # in float32, relative to each figure, in which nothing cancels

Figures = Callable[[bool, int], dict[str, dict[str, dict[str, list[float]]]]]


def _cases() -> list:
    found = []
    for family, variant in FAMILIES:
        for adapter in ADAPTERS:
            for base in BASES:
                is_short = family == "ltx" and (adapter, base) in SOME
                marks = () if is_short else (pytest.mark.full,)
                found.append(
                    pytest.param((family, variant), adapter, base, marks=marks, id=f"{family} {adapter} {base}")
                )
    return found


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]) -> Figures:
    """Figures of adapters_worker.py by "family of a case, is in the default suite" and number of processes."""

    @cache
    def run(is_short: bool, processes: int) -> dict:
        folder = tmp_path_factory.mktemp("adapters")
        recipes = [family_recipe(*model) for model in (FAMILIES[:1] if is_short else FAMILIES)]
        return figures_of(
            "adapters_worker.py", processes, folder, [Path("some" if is_short else "all"), *recipes], 1500
        )

    return run


@pytest.mark.parametrize("model, adapter, base", _cases())
def test_two_processes_train_and_export_what_one_does(
    spread: Figures, family_recipe: Callable[..., Path], model: tuple, adapter: str, base: str
) -> None:
    is_short = model == FAMILIES[0] and (adapter, base) in SOME
    alone, two = (spread(is_short, number)[family_recipe(*model).stem][f"{adapter} on {base}"] for number in (1, 2))
    assert len(alone["loss"]) == 4
    for figure, values in alone.items():
        assert two[figure] == pytest.approx(values, rel=TOLERANCE), figure
