"""Shared fixtures: one tiny pipeline, one set of real clips and one cache for the whole session."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache as cache_calls
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import FORKED_WITH, ROOT, Finetune, figures_of, imported_with, run_python
from slowest import pytest_terminal_summary  # noqa: F401  pytest finds its hooks here

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell has it so in what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup has it so
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from finetune.runtime.logging import quiet_libraries

quiet_libraries()


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not full":
        FORKED_WITH.update(imported_with(os.environ))


if TYPE_CHECKING:
    from finetune.runtime.distributed import Runtime
    from finetune.training.job import Job


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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny pipeline on disk, made when it is first asked for: `tiny_model("ltx", "0.9.7")`. Copy it before changing it."""
    from finetune.models import family_class

    folder = tmp_path_factory.mktemp("models")

    @cache_calls
    def make(family: str, variant: str | None = None) -> Path:
        path = folder / (f"{family}-{variant}" if variant else family)
        family_class(family).tiny(path, variant=variant)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_ltx(tiny_model: Callable[..., Path]) -> Path:
    """A tiny LTX-Video pipeline on disk. Copy it before changing it."""
    return tiny_model("ltx")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the session's runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_recipe(tiny_ltx: Path, clips: Path, cache: Path) -> Callable[[Path], Path]:
    """Write a small LoRA recipe in float32, two samples a step, into a folder; override what a test is about with --set."""

    def write(folder: Path) -> Path:
        path = folder / "recipe.toml"
        path.write_text(
            f"""
output = "{folder / "run"}"
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

    return write


@pytest.fixture
def recipe_file(tmp_path: Path, small_recipe: Callable[[Path], Path]) -> Path:
    """The small recipe, in a folder of the test's own."""
    return small_recipe(tmp_path)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """A process group of this process alone, for tests that build jobs in it."""
    from finetune.runtime import distributed

    yield distributed.start(timeout_seconds=60)
    distributed.stop()


@pytest.fixture
def build_job(recipe_file: Path, runtime: Runtime) -> Callable[..., Job]:
    """Build a training in this process, of the small recipe if no other is given: `build_job("train.method=full")`."""
    from finetune.checks.model import open_family
    from finetune.preparation.encode import prepare
    from finetune.recipe import load_recipe
    from finetune.training.job import build

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
def few_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five real clips with captions, for what is done with every family. Copy it before changing it."""
    from finetune.data.synthetic import RECORDINGS, write_clips

    folder = tmp_path_factory.mktemp("data") / "few"
    write_clips(folder, RECORDINGS[:5])
    return folder


@pytest.fixture(scope="session")
def family_recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path], few_clips: Path, cache: Path
) -> Callable[..., Path]:
    """A recipe of a family and variant, in float32, that has in it all that must be the same however it is run.

    Dropped captions and images, stratified noise levels, clipped gradients, a moving rate, a clip held out.
    """
    from finetune.models import family_class

    folder = tmp_path_factory.mktemp("families")

    @cache_calls
    def make(family: str, variant: str | None = None) -> Path:
        path = folder / (f"{family}-{variant}.toml" if variant else f"{family}.toml")
        path.write_text(
            f"""
output = "{path.with_suffix("")}"
[model]
family = "{family}"
path = "{tiny_model(family, variant)}"
[data]
path = "{few_clips}"
buckets = ["{"13x64x96" if family == "mochi" else "17x64x96"}"]
caption_dropout = 0.4
{"image_dropout = 0.4" if family_class(family).takes_image else ""}
cache = "{cache}"
workers = 0
[train]
steps = 5
global_batch_size = 2
micro_batch_size = 2
precision = "float32"
max_grad_norm = 0.05
[objective]
stratified = true
[optimizer]
lr = 1e-2
weight_decay = 1e-2
[schedule]
name = "cosine"
warmup_steps = 2
[validation]
heldout_clips = 1
sigmas = 3
"""
        )
        return path

    return make


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], dict]], dict]:
    """Figures that tests of several files read, made by the worker of pytest-xdist that first asks for them."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def get(name: str, make: Callable[[], dict]) -> dict:
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = folder / f"{name}.json"
            if not file.exists():
                file.write_text(json.dumps(make()))
            return json.loads(file.read_text())

    return get


@pytest.fixture(scope="session")
def parity(parity_recipe: Path, made_once: Callable[[str, Callable[[], dict]], dict]) -> dict[int, dict]:
    """Figures of every configuration of tests/engine/parity_worker.py, by number of processes."""
    folder = parity_recipe.parent
    names = {processes: f"parity of {processes}" for processes in (1, 2)}
    return {
        processes: made_once(name, lambda n=processes: figures_of("parity_worker.py", n, folder, [parity_recipe]))
        for processes, name in names.items()
    }


@pytest.fixture(scope="session")
def families_parity(
    tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]
) -> Callable[..., dict[str, dict]]:
    """Figures of tests/engine/families_worker.py for a family and variant by a number of processes.

    Those of the default suite are run together when one of them is first asked for, and so are other families' first variants,
    and all the others.
    """
    from every_family import FEW, FIRST, MODELS

    @cache_calls
    def run(group: tuple[bool, bool], processes: int) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("families-parity")
        recipes = [family_recipe(*model) for model in MODELS if (model in FEW, model in FIRST) == group]
        return figures_of("families_worker.py", processes, folder, recipes)

    return lambda model, processes: run((model in FEW, model in FIRST), processes)[family_recipe(*model).stem]


@pytest.fixture(scope="session")
def finetune() -> Finetune:
    """Run the command line to its end: `finetune("--recipe", path, processes=2)`; see `run_python`."""

    def run(
        *arguments: object,
        processes: int = 0,
        timeout: float = 120,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
    ):
        return run_python(["-m", "finetune", *arguments], processes, cwd, env, timeout)

    return run


@pytest.fixture
def another_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that no file of `tmp_path` can be renamed into."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here: /dev/shm is missing, or has the temporary folder")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
