"""`cache`: what takes room in a cache, what is damaged in it, and what no recipe uses."""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from processes import run_python

from finetune.checks.model import open_family
from finetune.cli import main
from finetune.data.cache import Cache, StoredItem
from finetune.data.synthetic import RECORDINGS, write_clips
from finetune.preparation.encode import prepare
from finetune.preparation.upkeep import room, unused
from finetune.preparation.used import used_keys
from finetune.recipe import Recipe, load_recipe, write_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError

PROMPT = "validation.prompts=a cat@@@9x64x64"


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, runtime: Runtime, small_recipe: Callable[[Path], Path]
) -> tuple[Recipe, Recipe]:
    """Two recipes that share captions, and one cache with all that they use."""
    folder = tmp_path_factory.mktemp("first")
    write_clips(folder / "clips", RECORDINGS[:3])
    file, own = small_recipe(folder), [f"data.path={folder / 'clips'}", f"data.cache={folder / 'cache'}"]
    recipes = [load_recipe(file, [*own, *each]) for each in ([], ["data.buckets=9x64x64", PROMPT])]
    for recipe in recipes:
        prepare(recipe, open_family(recipe), runtime)
    return recipes[0], recipes[1]


class Made:
    """A copy of the cache, and the recipes as files."""

    def __init__(self, folder: Path, recipes: tuple[Recipe, Recipe], runtime: Runtime) -> None:
        self.folder, self.recipes, self.runtime = folder / "cache", recipes, runtime
        shutil.copytree(recipes[0].data.cache, self.folder)
        self.files = [folder / "one.toml", folder / "two.toml"]
        for recipe, file in zip(recipes, self.files, strict=True):
            write_recipe(recipe, file)

    def run(self, *arguments: object) -> subprocess.CompletedProcess:
        return run_python(["-m", "finetune", "cache", *arguments, "--dir", self.folder])

    def used(self, number: int, *overrides: str) -> set[tuple[str, str]]:
        recipe = load_recipe(self.files[number], overrides)
        return used_keys(recipe, open_family(recipe), self.runtime, self.folder)

    def items(self) -> dict[str, int]:
        return {f"{item.kind}/{item.key}": item.path.stat().st_mtime_ns for item in Cache(self.folder).items()}

    def encoded_by(self, number: int) -> set[str]:
        """What a start of a recipe encodes, now."""
        before = self.items()
        recipe = load_recipe(self.files[number], [f"data.cache={self.folder}"])
        prepare(recipe, open_family(recipe), self.runtime)
        return {name for name, written in self.items().items() if before.get(name) != written}


@pytest.fixture
def made(tmp_path: Path, first: tuple[Recipe, Recipe], runtime: Runtime) -> Made:
    return Made(tmp_path, first, runtime)


def test_size_is_told_by_kind_and_by_recipe(made: Made) -> None:
    """The items' bytes, as the file system has them."""
    foreign = made.folder / "video" / "ab" / f"{'ab' * 20}.safetensors"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(bytes(2048))
    (made.folder / "plans").mkdir()
    (made.folder / "plans" / "a.json").write_bytes(bytes(4096))
    uses = {str(file): made.used(number) for number, file in enumerate(made.files)}
    lines = room(Cache(made.folder), uses)
    assert lines[0].startswith(f"{made.folder}: 12 items, ")
    assert [line.split(",")[0] for line in lines[1:3]] == ["  text: 5 items", "  video: 7 items"]
    assert "plans" in lines[3]
    assert lines[4].startswith(f"{made.files[0]}: 6 items, ")
    assert ", of which 3 items, " in lines[4]
    assert lines[5].startswith(f"{made.files[1]}: 8 items, ")
    assert lines[-1] == "used by none of these recipes: 1 item, 2.0 KiB"


class Shared(Cache):
    """A cache whose items another run removes as soon as they are listed."""

    def items(self) -> Iterator[StoredItem]:
        for item in super().items():
            item.path.unlink()
            yield item


def test_items_that_another_run_removes_meanwhile_do_no_harm(tmp_path: Path) -> None:
    for number in range(3):
        Cache(tmp_path).write("text", f"{number}{'ab' * 19}c", {"mean": torch.ones(1)}, "a cat")
    assert len(unused(Shared(tmp_path), [], days=1e-9)) == 3
    Cache(tmp_path).write("text", "ab" * 20, {"mean": torch.ones(1)}, "a cat")
    assert room(Shared(tmp_path), {})[0].startswith(f"{tmp_path}: 1 item, ")


def test_what_is_known_of_files_is_pruned_with_the_items(made: Made) -> None:
    facts = made.folder / "files.jsonl"
    before = facts.read_text()
    facts.write_text(before * 3)
    done = made.run("prune", *(part for file in made.files for part in ("--recipe", file)), "--yes")
    assert "what holds no more" in done.stderr
    assert 0 < len(facts.read_text()) <= len(before)


def test_what_a_recipe_has_not_encoded_yet_is_told_and_nothing_is_encoded(made: Made) -> None:
    before = made.items()
    assert room(Cache(made.folder), {"other": made.used(0, "data.buckets=17x64x64")})[-2].endswith(
        "; 3 are not encoded yet"
    )
    assert made.items() == before


def test_a_recipe_uses_what_its_preparation_encodes(made: Made) -> None:
    """Into an empty cache, with dropped captions and a prompt: nothing more and nothing less."""
    shutil.rmtree(made.folder)
    overrides = ["data.caption_dropout=0.1", "validation.heldout_clips=1"]
    used = made.used(1, *overrides)
    assert made.items() == {}
    recipe = load_recipe(made.files[1], [*overrides, f"data.cache={made.folder}"])
    prepare(recipe, open_family(recipe), made.runtime)
    assert {(item.kind, item.key) for item in Cache(made.folder).items()} == used


def test_a_sound_cache_is_said_to_be_sound(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", "--dir", str(made.folder)]) == 0
    assert "no item is damaged" in capsys.readouterr().err


def damage(made: Made) -> list[Path]:
    """Flip a bit in one item, cut another."""
    flipped, cut = (Cache(made.folder).path(*name.split("/")) for name in list(made.items())[:2])
    data = bytearray(flipped.read_bytes())
    data[-3] ^= 16
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    return [flipped, cut]


def test_damaged_items_are_named_and_kept(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    paths = damage(made)
    assert main(["cache", "verify", "--dir", str(made.folder)]) == 2
    told = capsys.readouterr().err
    for path in paths:
        assert f"{path}: this item is damaged: it" in told
        assert path.exists()
    assert "it was made of" in told


def test_damaged_items_are_removed_if_asked_and_encoded_anew(made: Made) -> None:
    paths = damage(made)
    assert main(["cache", "verify", "--dir", str(made.folder), "--remove"]) == 0
    assert [path.exists() for path in paths] == [False, False]
    names = {f"{path.parent.parent.name}/{path.stem}" for path in paths}
    assert made.encoded_by(0) | made.encoded_by(1) == names


def test_what_a_damaged_item_ends_a_training_with_names_the_command_that_removes_all_others(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits are flipped in each of them, which a start does not see: only the reading of an item compares its bytes."""
    cache = Cache(made.folder)
    for item in cache.items():
        data = bytearray(item.path.read_bytes())
        data[-3] ^= 16
        item.path.write_bytes(data)
    first, *others = list(cache.items())
    with pytest.raises(UserError) as caught:
        cache.read(first.kind, first.key)
    command = shlex.split(caught.value.problems[0].cure.partition("too: ")[2].removesuffix(" removes all that are"))
    assert command[:3] == ["python", "-m", "finetune"]
    assert main(command[3:]) == 0
    assert f"removed {len(others)}: the next start that needs one encodes it anew" in capsys.readouterr().err
    assert list(cache.items()) == []


def test_prune_counts_and_removes_only_when_told_and_only_what_no_recipe_uses(made: Made) -> None:
    before = made.items()
    dry = made.run("prune", "--recipe", made.files[0])
    assert dry.returncode == 0, dry.stderr
    assert "used by none of these recipes: text: 2 items, " in dry.stderr
    assert "video: 3 items, " in dry.stderr
    assert made.items() == before
    assert unused(Cache(made.folder), [made.used(0), made.used(1)]) == []
    done = made.run("prune", "--recipe", made.files[0], "--yes")
    assert done.returncode == 0, done.stderr
    assert made.encoded_by(0) == set()
    assert len(made.encoded_by(1)) == len(before) - len(made.items()) + 5 == 5


def test_prune_can_leave_what_was_written_lately(made: Made) -> None:
    old, *young = Cache(made.folder).items()
    os.utime(old.path, (time.time() - 3 * 86400,) * 2)
    assert [item.path for item in unused(Cache(made.folder), [], days=2)] == [old.path]
    assert unused(Cache(made.folder), [{(old.kind, old.key)}], days=2) == []
    assert unused(Cache(made.folder), [{(old.kind, old.key)}]) == young


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["prune"], "no recipe is named, so nothing tells what is still used"),
        (["size"], "no cache is named"),
        (["size", "--dir", "nowhere"], "nowhere: there is no such folder"),
        (["size", "--yes", "--dir", "."], "--yes goes with `cache prune`"),
        (["prune", "--older-than", "x"], "'x' is not a number of days"),
        (["shrink"], "invalid choice: 'shrink'"),
    ],
)
def test_what_is_not_clear_is_asked(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_what_a_recipe_with_refused_clips_uses_is_not_known(made: Made, tmp_path: Path) -> None:
    clips = Path(shutil.copytree(made.recipes[0].data.path, tmp_path / "clips"))
    (clips / "wide.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"wide\.mp4"):
        made.used(0, f"data.path={clips}")
