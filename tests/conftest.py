"""Shared fixtures: one tiny pipeline, one set of real clips and one cache for the whole session."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from finetune.runtime.logging import quiet_libraries

quiet_libraries()

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve real clips with captions. Copy it before changing it."""
    from finetune.data.synthetic import RECORDINGS, write_clips

    folder = tmp_path_factory.mktemp("data") / "clips"
    write_clips(folder, RECORDINGS)
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


Finetune = Callable[..., subprocess.CompletedProcess]


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


def command(arguments: Sequence[object], processes: int) -> list[str]:
    """The command line of `python -m finetune`, under torchrun if `processes` is not 0."""
    head = [sys.executable, "-m"]
    if processes:
        head += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [*head, "finetune", *map(str, arguments)]
