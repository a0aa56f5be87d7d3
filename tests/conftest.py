"""Shared fixtures: one tiny pipeline, one set of real clips and one cache for the whole session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import ROOT, Finetune, command

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from finetune.runtime.logging import quiet_libraries

quiet_libraries()

if TYPE_CHECKING:
    from finetune.job import Job
    from finetune.runtime.distributed import Runtime


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve real clips with captions. Copy it before changing it."""
    from finetune.data.synthetic import RECORDINGS, write_clips

    folder = tmp_path_factory.mktemp("data") / "clips"
    write_clips(folder, RECORDINGS)
    return folder


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of other scenes, for the held-out loss."""
    from finetune.data.synthetic import RECORDINGS, write_clips

    folder = tmp_path_factory.mktemp("data") / "heldout"
    write_clips(folder, RECORDINGS[:3], first_scene=len(RECORDINGS))
    return folder


@pytest.fixture(scope="session")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LTX-Video pipeline on disk. Copy it before changing it."""
    from finetune.models import family_class

    folder = tmp_path_factory.mktemp("models") / "ltx"
    family_class("ltx").tiny(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the session's runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_ltx: Path, clips: Path, cache: Path) -> Path:
    """A small LoRA recipe in float32, two samples a step; override what a test is about with --set."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
output = "{tmp_path / "run"}"
[model]
family = "ltx"
path = "{tiny_ltx}"
[data]
path = "{clips}"
buckets = ["17x64x96"]
cache = "{cache}"
workers = 0
[train]
steps = 10
global_batch_size = 4
micro_batch_size = 2
precision = "float32"
[lora]
rank = 4
alpha = 8
[optimizer]
lr = 1e-3
"""
    )
    return path


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """A process group of this process alone, for tests that build jobs in it."""
    from finetune.runtime import distributed

    yield distributed.start(timeout_seconds=60)
    distributed.stop()


@pytest.fixture
def build_job(recipe_file: Path, runtime: Runtime) -> Callable[..., Job]:
    """Build a training in this process, of the small recipe if no other is given: `build_job("train.method=full")`."""
    from finetune.check import open_family
    from finetune.job import build
    from finetune.prepare import prepare
    from finetune.recipe import load_recipe

    def make(*overrides: str, recipe_file: Path = recipe_file) -> Job:
        recipe = load_recipe(recipe_file, overrides)
        family = open_family(recipe)
        return build(recipe, runtime, family, prepare(recipe, family, runtime))

    return make


@pytest.fixture(scope="session")
def parity_recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_ltx: Path, clips: Path, heldout: Path, cache: Path
) -> Path:
    """What tests/engine/parity_worker.py trains: two buckets, dropped captions, clipped gradients, a moving rate."""
    path = tmp_path_factory.mktemp("parity") / "recipe.toml"
    path.write_text(
        f"""
output = "{path.parent / "run"}"
[model]
family = "ltx"
path = "{tiny_ltx}"
[data]
path = "{clips}"
buckets = ["17x64x96", "9x64x64"]
caption_dropout = 0.2
cache = "{cache}"
workers = 0
[train]
steps = 10
global_batch_size = 4
precision = "float32"
max_grad_norm = 0.1
[objective]
weighting = "cosmap"
[optimizer]
weight_decay = 1e-2
[schedule]
name = "cosine"
warmup_steps = 3
[validation]
heldout = "{heldout}"
sigmas = 3
"""
    )
    return path


@pytest.fixture(scope="session")
def parity(parity_recipe: Path) -> dict[int, dict]:
    """Figures of every configuration of tests/engine/parity_worker.py, by number of processes."""
    figures = {}
    for processes in (1, 2):
        out = parity_recipe.with_name(f"{processes}.json")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        worker = [ROOT / "tests" / "engine" / "parity_worker.py", parity_recipe, out]
        start = [sys.executable, *(torchrun if processes > 1 else []), *worker]
        done = subprocess.run(start, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        figures[processes] = json.loads(out.read_text())
    return figures


@pytest.fixture(scope="session")
def finetune() -> Finetune:
    """Run the command line as a user does: `finetune("--recipe", path, processes=2)` starts torchrun."""

    def run(*arguments: object, processes: int = 0, timeout: float = 120, env: dict[str, str] | None = None):
        return subprocess.run(
            command(arguments, processes),
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
