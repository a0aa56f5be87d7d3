"""ffmpeg, and recipes on datasets and caches of a test's own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ffmpeg_oracle import Ffmpeg

from finetune.recipe import Recipe, load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime


@pytest.fixture(scope="session")
def ffmpeg(tmp_path_factory: pytest.TempPathFactory) -> Ffmpeg:
    return Ffmpeg(tmp_path_factory.mktemp("ffmpeg"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """A process group of this process alone."""
    yield distributed.start(30)
    distributed.stop()


MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def make_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_ltx: Path) -> MakeRecipe:
    """A float32 LTX recipe on a dataset and a cache, with overrides."""

    def make(data: Path, cache: Path, *overrides: str) -> Recipe:
        path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
        path.write_text(
            f"""
output = "{path.parent / "run"}"
[model]
family = "ltx"
path = "{tiny_ltx}"
[data]
path = "{data}"
buckets = ["17x64x96", "17x96x64", "17x64x64"]
cache = "{cache}"
workers = 0
[train]
global_batch_size = 4
precision = "float32"
"""
        )
        return load_recipe(path, overrides)

    return make
