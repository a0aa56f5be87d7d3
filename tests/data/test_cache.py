"""The cache: whole items or none, and nothing encoded twice."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_to_scale
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.checks.model import open_family
from finetune.data.cache import Cache, digest
from finetune.data.synthetic import RECORDINGS, Recording, record, scene, write_clips
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Recipe, write_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

TENSORS = {"mean": torch.arange(6.0).view(2, 3), "mask": torch.tensor([True, False]), "half": torch.ones(3).bfloat16()}
KEY = digest("some", "key")
NOBODY = 2**22 + 1  # above Linux's largest process id


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def item(store: Cache) -> Path:
    """The file of one stored item."""
    store.write("video", KEY, TENSORS, "a clip")
    return store.path("video", KEY)


def files(store: Cache) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file()]


# --- items ------------------------------------------------------------------------------------------------------------


def test_an_item_is_read_as_it_was_written(store: Cache, item: Path) -> None:
    found = store.read("video", KEY)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())


def test_empty_tensors_and_numbers_are_stored(store: Cache) -> None:
    odd = {"empty": torch.empty(0, 3), "number": torch.tensor(7), "turned": torch.arange(6).view(2, 3).T}
    store.write("video", KEY, odd, "a clip")
    assert all(torch.equal(store.read("video", KEY)[name], value) for name, value in odd.items())


def test_an_item_says_what_it_was_made_of(item: Path) -> None:
    with safe_open(item, "pt") as opened:
        assert opened.metadata()["source"] == "a clip"


def test_a_checksum_is_of_names_types_shapes_and_bytes(item: Path) -> None:
    """As the standard library's CRC-32 has it of the bytes of NumPy arrays."""
    with safe_open(item, "pt") as opened:
        found = opened.metadata()["checksum"]
    arrays = {
        "half torch.bfloat16 (3,) ": np.full(3, 0x3F80, np.uint16),  # 1.0 in bfloat16
        "mask torch.bool (2,) ": np.array([True, False]),
        "mean torch.float32 (2, 3) ": np.arange(6, dtype=np.float32),
    }
    assert (
        found == f"crc32:{zlib.crc32(b''.join(name.encode() + array.tobytes() for name, array in arrays.items())):08x}"
    )


def test_an_item_without_a_checksum_is_taken_as_it_is(store: Cache) -> None:
    """As older versions wrote it."""
    path = store.path("video", KEY)
    path.parent.mkdir(parents=True)
    save_file(TENSORS, path, {"source": "a clip"})
    assert store.has("video", KEY)
    assert torch.equal(store.read("video", KEY)["mean"], TENSORS["mean"])


def test_kinds_do_not_mix(store: Cache, item: Path) -> None:
    assert store.has("video", KEY)
    assert not store.has("text", KEY)


def test_a_part_of_a_key_that_differs_gives_another_key() -> None:
    keys = {
        digest("video", "ltx", 25.0),
        digest("video", "ltx", 24.0),
        digest("videoltx", 25.0),
        digest(["video", "ltx"], 25.0),
    }
    assert len(keys) == 4


def write_half(path: Path) -> None:
    with atomic(path) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError


def test_a_write_that_fails_leaves_nothing(store: Cache) -> None:
    with pytest.raises(ZeroDivisionError):
        write_half(store.path("video", KEY))
    assert files(store) == []


def test_a_failed_write_leaves_the_old_content(store: Cache, item: Path) -> None:
    before = item.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_half(item)
    assert item.read_bytes() == before


def test_a_half_written_item_does_not_count(store: Cache, item: Path) -> None:
    item.rename(item.with_name(f".partial-0123456789abcdef-{NOBODY}~{item.name}"))
    assert not store.has("video", KEY)


@pytest.mark.parametrize("left", [0, 5, 60, -1], ids=["nothing", "size", "header", "all_but_a_byte"])
def test_a_damaged_item_does_not_count_and_is_removed(
    store: Cache, item: Path, left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    item.write_bytes(item.read_bytes()[:left])
    assert not store.has("video", KEY)
    assert not item.exists()
    assert f"encoded anew: {item}, because" in capsys.readouterr().err


def test_a_flipped_bit_anywhere_is_noticed_or_changes_no_tensor(store: Cache, item: Path) -> None:
    """Header, metadata and data; and what is noticed is removed, so that the next start encodes it anew."""
    whole = item.read_bytes()
    noticed = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        item.write_bytes(damaged)
        try:
            found = store.read("video", KEY)
        except UserError:
            assert not store.has("video", KEY)
            noticed += 1
        else:
            assert found.keys() == TENSORS.keys()
            assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    data = sum(value.nbytes for value in TENSORS.values())
    assert noticed > data + 100  # all data, and most of the header


def test_a_damaged_item_is_said_by_what_it_was_made_of(store: Cache, item: Path) -> None:
    item.write_bytes(item.read_bytes()[:-4] + b"flip")
    with pytest.raises(UserError, match="not those that were written; it was made of 'a clip'"):
        store.read("video", KEY)
    assert not item.exists()


def test_an_item_that_cannot_be_read_for_another_reason_is_kept(store: Cache) -> None:
    path = store.path("video", KEY)
    path.mkdir(parents=True)  # which fails when it is read, for root as well
    with pytest.raises(UserError, match="check the disk and the permissions"):
        store.has("video", KEY)
    with pytest.raises(UserError, match="check the disk and the permissions"):
        store.read("video", KEY)
    assert path.exists()


def test_reading_a_damaged_item_says_what_to_do(store: Cache, item: Path) -> None:
    item.write_bytes(item.read_bytes()[:-1])
    with pytest.raises(UserError, match="run the same command again: it is encoded anew") as caught:
        store.read("video", KEY)
    assert caught.value.problems[0].where == str(item)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        Cache(tmp_path / "cache").write("video", KEY, TENSORS, "a clip")


def test_a_clip_whose_name_is_no_utf_8_has_an_item(store: Cache) -> None:
    store.write("video", KEY, TENSORS, os.fsdecode(b"caf\xe9.mp4"))
    with safe_open(store.path("video", KEY), "pt") as item:
        assert item.metadata()["source"] == "caf\\udce9.mp4"


# --- encoding into it -------------------------------------------------------------------------------------------------


def items(folder: Path) -> dict[str, int]:
    """Every item that counts, with the time it was written.

    Only folders of kinds are looked into: a process that encodes makes hidden ones and removes them again.
    """
    kinds = [path for path in folder.glob("[!.]*") if path.is_dir()]
    found = (path for kind in kinds for path in kind.glob("*/[!.]*"))
    return {os.fspath(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def kinds(names: set[str]) -> list[str]:
    return sorted(name.split(os.sep)[0] for name in names)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime, make_recipe) -> Recipe:
    """Three clips and a recipe whose cache holds them. Copy all of it before changing it."""
    folder = tmp_path_factory.mktemp("first")
    write_clips(folder / "clips", RECORDINGS[:3])
    recipe = make_recipe(folder / "clips", folder / "cache")
    prepare(recipe, open_family(recipe), runtime)
    return recipe


Again = Callable[..., tuple[Prepared, set[str], set[str]]]


@pytest.fixture
def again(first: Recipe, tmp_path: Path, runtime: Runtime, make_recipe) -> Again:
    """Change a copy of the clips or of the cache, prepare again; returns the result, what is new and what was rewritten."""
    data, cache = tmp_path / "clips", tmp_path / "cache"
    shutil.copytree(first.data.path, data)
    shutil.copytree(first.data.cache, cache)

    def run(change: Callable[[Path, Path], object], *overrides: str) -> tuple[Prepared, set[str], set[str]]:
        before = items(cache)
        change(data, cache)
        recipe = make_recipe(data, cache, *overrides)
        prepared = prepare(recipe, open_family(recipe), runtime)
        after = items(cache)
        kept = before.keys() & after.keys()
        return prepared, after.keys() - before.keys(), {name for name in kept if before[name] != after[name]}

    return run


def nothing(data: Path, cache: Path) -> None:
    pass


def test_each_clip_and_each_caption_is_an_item(first: Recipe) -> None:
    assert kinds(set(items(first.data.cache))) == ["text"] * 3 + ["video"] * 3


def test_what_is_there_is_not_encoded_again(again: Again) -> None:
    prepared, new, rewritten = again(nothing)
    assert (len(prepared.train), new, rewritten) == (3, set(), set())


def test_a_changed_caption_encodes_one_text(again: Again) -> None:
    _, new, rewritten = again(lambda data, cache: (data / "wide.txt").write_text("something else"))
    assert (kinds(new), rewritten) == (["text"], set())


def test_changed_bytes_of_a_clip_encode_one_video(again: Again) -> None:
    other = Recording("wide.mp4", 128, 192, 25, 25)
    _, new, rewritten = again(lambda data, cache: record(scene(7, 25, 128, 192)[0], data / "wide.mp4", other))
    assert (kinds(new), rewritten) == (["video"], set())


def test_a_renamed_clip_is_known_by_its_bytes(again: Again) -> None:
    def rename(data: Path, cache: Path) -> None:
        (data / "wide.mp4").rename(data / "renamed.mp4")
        (data / "wide.txt").rename(data / "renamed.txt")

    prepared, new, rewritten = again(rename)
    assert [item.path.name for item in prepared.train] == ["long.mp4", "renamed.mp4", "small.mp4"]
    assert (new, rewritten) == (set(), set())


def test_a_caption_that_two_clips_share_is_one_item(again: Again) -> None:
    def share(data: Path, cache: Path) -> None:
        shutil.copy(data / "wide.txt", data / "small.txt")

    prepared, new, _ = again(share)
    assert len({item.keys["text"] for item in prepared.train}) == 2
    assert new == set()


@pytest.mark.parametrize("kind", ["text", "video"])
def test_a_damaged_item_is_encoded_anew(again: Again, kind: str) -> None:
    def damage(data: Path, cache: Path) -> None:
        path = sorted((cache / kind).glob("*/*"))[0]
        path.write_bytes(path.read_bytes()[:-1])

    prepared, new, rewritten = again(damage)
    assert (new, kinds(rewritten)) == (set(), [kind])
    for entry in prepared.train:
        assert prepared.cache.read("video", entry.keys["video"])
        assert prepared.cache.read("text", entry.keys["text"])


@pytest.mark.parametrize(
    "override, new_kinds",
    [
        ("data.id_token=afkx", ["text"] * 3),
        ("data.buckets=17x64x64", ["video"] * 3),
        ("data.fps=24", ["video"] * 2),  # small.mp4 has 24 of its own
        ("train.precision=bf16", ["text"] * 3 + ["video"] * 3),
        ("vae.tiling=true", ["video"] * 3),
        ("data.caption_dropout=0.1", ["text"]),
        ("lora.rank=8", []),
        ("train.seed=1", []),
    ],
)
def test_a_setting_encodes_what_it_changes(again: Again, override: str, new_kinds: list[str]) -> None:
    _, new, rewritten = again(nothing, override)
    assert (kinds(new), rewritten) == (new_kinds, set())


def test_an_encoded_clip_is_the_families_encoding_of_its_frames(first: Recipe, runtime: Runtime) -> None:
    """Read back, an item is what diffusers' VAE says of the decoded clip."""
    from diffusers import AutoencoderKLLTXVideo

    from finetune.data.decode import decode, probe

    prepared = prepare(first, open_family(first), runtime)
    entry = next(item for item in prepared.train if item.path.name == "wide.mp4")
    frames = decode(entry.path, probe(entry.path), entry.bucket, entry.fps)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    vae = AutoencoderKLLTXVideo.from_pretrained(first.model.path, subfolder="vae")
    with torch.no_grad():
        expected = vae.encode(video).latent_dist
    found = prepared.cache.read("video", entry.keys["video"])
    assert_close_to_scale(found["mean"], expected.mean[0])
    assert_close_to_scale(found["logvar"], expected.logvar[0])


# --- killed -----------------------------------------------------------------------------------------------------------


def kill_when(recipe: Path, folder: Path, count: int) -> int:
    """Start `prepare`, kill it with SIGKILL as soon as `count` items exist; returns the exit status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "prepare", "--recipe", str(recipe)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(items(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    return process.wait(timeout=60)


def test_a_run_that_is_killed_while_it_encodes_leaves_whole_items_and_the_next_goes_on(
    clips: Path, tmp_path: Path, make_recipe, runtime: Runtime
) -> None:
    recipe = make_recipe(clips, tmp_path / "cache")
    write_recipe(recipe, tmp_path / "recipe.toml")
    total = len(RECORDINGS) + len({path.read_text() for path in clips.glob("*.txt")})
    for count in (2, total - 8):
        before = items(tmp_path / "cache")
        assert kill_when(tmp_path / "recipe.toml", tmp_path / "cache", count) == -signal.SIGKILL
        after = items(tmp_path / "cache")
        assert count <= len(after) < total
        assert before.items() <= after.items()
        assert all(load_file(tmp_path / "cache" / name) for name in after)

    prepared = prepare(recipe, open_family(recipe), runtime)
    whole = items(tmp_path / "cache")
    assert after.items() <= whole.items()
    assert (len(prepared.train), len(whole)) == (len(RECORDINGS), total)
    assert list((tmp_path / "cache").rglob(".partial-*")) == []
    assert len((tmp_path / "cache" / "files.jsonl").read_text().splitlines()) >= len(RECORDINGS)
