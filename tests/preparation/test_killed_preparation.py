"""Killed at any moment, a preparation goes on as if nothing had been. Two real ranks, real signals."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import ROOT, command
from safetensors.torch import load_file
from trainings import descendants

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime

DEADLINE = 200.0  # seconds that one preparation may take


def items(cache: Path) -> list[Path]:
    return sorted(path.relative_to(cache) for path in cache.glob("*/??/*.safetensors") if path.name[0] != ".")


def assert_same_tensors(cache: Path, undisturbed: Path) -> None:
    assert items(cache) == items(undisturbed)
    for item in items(cache):
        ours, theirs = load_file(cache / item), load_file(undisturbed / item)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert list(cache.rglob(".partial-*")) == []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[[Path], Path]) -> Path:
    return small_recipe(tmp_path_factory.mktemp("preparations"))


@pytest.fixture(scope="module")
def prepare_here(recipe: Path, runtime: Runtime) -> Callable[[Path], Path]:
    """Prepare into a cache, in this process alone."""

    def make(cache: Path) -> Path:
        loaded = load_recipe(recipe, [f"data.cache={cache}", "data.caption_dropout=0.1"])
        prepare(loaded, open_family(loaded), runtime)
        return cache

    return make


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, prepare_here: Callable[[Path], Path]) -> Path:
    return prepare_here(recipe.with_name("undisturbed"))


def prepare_with_two_ranks(recipe: Path, cache: Path, killed_at: int | None = None) -> None:
    """The command itself. SIGKILL ends it, with all its ranks, as soon as there are so many items."""
    arguments = ["prepare", "--recipe", recipe, "--set", f"data.cache={cache}", "--set", "data.caption_dropout=0.1"]
    with cache.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command(arguments, 2), cwd=ROOT, stderr=log, start_new_session=True)
    deadline = time.monotonic() + DEADLINE
    try:
        while process.poll() is None and (killed_at is None or len(items(cache)) < killed_at):
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        ranks = descendants(process.pid) if process.poll() is None else []
        for pid in [process.pid, *ranks]:
            if killed_at is not None:
                os.kill(pid, signal.SIGKILL)
        process.wait(DEADLINE)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):  # until they are dead: they hold their partial files
        assert time.monotonic() < deadline
        time.sleep(0.01)
    expected = 0 if killed_at is None else -signal.SIGKILL
    assert process.returncode == expected, cache.with_suffix(".log").read_text()


@pytest.mark.parametrize(
    "moments",
    [1, pytest.param(3, marks=pytest.mark.full), pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
)
@pytest.mark.full
def test_killed_at_any_moment_a_preparation_goes_on_to_the_same_tensors(
    recipe: Path, undisturbed: Path, prepare_here: Callable[[Path], Path], moments: int
) -> None:
    """Moments are numbers of items that are written.

    Each is of a preparation of its own, which goes on with one rank, or with two (--full).
    """
    total = len(items(undisturbed))
    assert total > 20
    drawn = random.Random(moments).sample(range(1, total - 2), moments)
    for count in drawn:
        cache = recipe.with_name(f"{moments}-{count}")
        prepare_with_two_ranks(recipe, cache, killed_at=count)
        assert count <= len(items(cache)) <= total
        if moments > 3 and count % 2:
            prepare_with_two_ranks(recipe, cache)
        else:
            prepare_here(cache)
        assert_same_tensors(cache, undisturbed)
