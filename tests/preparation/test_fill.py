"""The cache is filled by ranks that do not wait for each other, and by encoders that do not wait for decoders."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, Finetune

from finetune.checks.model import open_family
from finetune.data.cache import Cache, content_hash, digest
from finetune.data.clip import VIDEO_SUFFIXES
from finetune.data.sources import Source
from finetune.preparation.encode import prepare
from finetune.preparation.fill import Encoding, fill
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError

COUNT = 12  # items of each scenario of fill_worker.py


# Two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What fill_worker.py says of each scenario, by rank. No torchrun, which would end rank 0 itself when rank 1 is killed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/preparation/fill_worker.py", folder / "out", folder / "cache"],
            env={**os.environ, **common, "PYTHONPATH": paths, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=(folder / f"{rank}.log").open("w"),
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].wait(120) == 0, (folder / "0.log").read_text()
        ranks[1].wait(10)
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"out.{rank}.json").read_text()) for rank in range(2)]


def test_a_slow_rank_takes_fewer_items_and_holds_up_no_other(two_ranks: list[dict[str, dict]]) -> None:
    first, second = (rank["one is slow"] for rank in two_ranks)
    assert sorted(first["seen"] + second["seen"]) == list(range(COUNT))
    assert len(second["seen"]) == 2
    assert (first["error"], first["written"]) == ("{}", COUNT)


def test_items_that_cannot_be_encoded_are_told_to_all_ranks_and_the_others_are_encoded(
    two_ranks: list[dict[str, dict]],
) -> None:
    first, second = (rank["bad clips"] for rank in two_ranks)
    assert first["error"] == second["error"]
    assert [f"clip {number}: the sound is empty" in first["error"] for number in range(COUNT)] == [
        number in second["seen"] for number in range(COUNT)
    ]
    assert first["written"] == COUNT - len(second["seen"]) < COUNT


@pytest.mark.parametrize(
    "scenario, there, elsewhere",
    [
        ("disk is full", "OSError: [Errno 28]", "LostPeer: rank 1 failed: OSError(28, 'No space left on device')"),
        ("out of memory", "OutOfMemoryError: CUDA out of memory", "LostPeer: rank 1 failed: OutOfMemoryError"),
    ],
)
def test_an_error_on_one_rank_ends_all_after_the_item_that_each_is_at(
    two_ranks: list[dict[str, dict]], scenario: str, there: str, elsewhere: str
) -> None:
    first, second = (rank[scenario] for rank in two_ranks)
    assert second["error"].startswith(there)
    assert first["error"].startswith(elsewhere)
    assert len(second["seen"]) == 1


def test_an_item_may_take_longer_than_ranks_wait_for_each_other(two_ranks: list[dict[str, dict]]) -> None:
    for rank in two_ranks:
        assert (rank["longer than the timeout"]["error"], rank["longer than the timeout"]["written"]) == ("{}", COUNT)


def test_reading_files_may_take_longer_than_ranks_wait_for_each_other(two_ranks: list[dict[str, dict]]) -> None:
    first, second = (rank["slow disk"] for rank in two_ranks)
    assert first["error"] == second["error"] == str(COUNT)
    assert len(first["seen"]) == COUNT - 1
    assert len(second["seen"]) == 1


def test_a_rank_that_is_killed_is_missed(two_ranks: list[dict[str, dict]]) -> None:
    first, second = two_ranks
    assert "killed" not in second
    assert first["killed"]["error"].startswith("LostPeer: rank 0 waits for others in vain: rank 1 (on ")
    assert first["killed"]["written"] == len(first["killed"]["seen"]) >= COUNT - 2


# One


class Clip:
    """What is decoded of a clip, which can be counted while it is in memory."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_the_next_clip_is_read_while_one_is_encoded_and_no_further_one(runtime: Runtime, tmp_path: Path) -> None:
    begun = [threading.Event() for _ in range(6)]
    alive: weakref.WeakSet[Clip] = weakref.WeakSet()
    most = []

    def read(number: int) -> Clip:
        begun[number].set()
        clip = Clip(number)
        alive.add(clip)
        return clip

    def encode(clip: Clip) -> dict[str, torch.Tensor]:
        if clip.number < 5:
            assert begun[clip.number + 1].wait(30), "it is not read before this one is encoded"
        assert clip.number > 3 or not begun[clip.number + 2].is_set()
        most.append(len(alive))
        return {"mean": torch.ones(1)}

    work = [Encoding("video", digest(k), str(k), (Source((), lambda k=k: read(k)),)) for k in range(6)]
    assert fill(work, "video", lambda: encode, Cache(tmp_path / "cache"), runtime) == {}
    assert len(most) == 6
    assert max(most) <= 2


def test_an_encoder_may_overwrite_what_it_has_returned(runtime: Runtime, tmp_path: Path) -> None:
    """As one does that runs as a CUDA graph, while the item before is being written."""
    buffer = torch.empty(2, 500_000)

    def encode(number: int) -> dict[str, torch.Tensor]:
        return {"mean": buffer.fill_(number), "turned": buffer.T}

    work = [Encoding("video", digest(k), str(k), (Source((), lambda k=k: k),)) for k in range(8)]
    cache = Cache(tmp_path / "cache")
    assert fill(work, "video", lambda: encode, cache, runtime) == {}
    for k, item in enumerate(work):
        stored = cache.read("video", item.key)
        assert torch.equal(stored["mean"], torch.full((2, 500_000), float(k)))
        assert torch.equal(stored["turned"], torch.full((500_000, 2), float(k)))


def test_an_item_that_is_not_finite_is_named_and_the_others_are_written(runtime: Runtime, tmp_path: Path) -> None:
    work = [Encoding("video", digest(k), f"clip {k}", (Source((), lambda k=k: k),)) for k in range(4)]
    cache = Cache(tmp_path / "cache")

    def encode(number: int) -> dict[str, torch.Tensor]:
        return {"mean": torch.tensor([1.0, float("nan") if number in (1, 3) else 0.0])}

    found = fill(work, "video", lambda: encode, cache, runtime)
    assert {key: [problem.where for problem in problems] for key, problems in found.items()} == {
        work[k].key: [f"clip {k}"] for k in (1, 3)
    }
    assert [cache.has("video", item.key) for item in work] == [True, False, True, False]


def test_an_item_that_cannot_be_written_ends_the_work(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    work = [Encoding("video", digest(k), str(k), (Source((), lambda: 0),)) for k in range(3)]
    with pytest.raises(UserError, match="cannot be written"):
        fill(work, "video", lambda: lambda _: {"mean": torch.ones(1)}, Cache(tmp_path / "cache"), runtime)


def test_an_interrupt_ends_the_work_and_its_threads(runtime: Runtime, tmp_path: Path) -> None:
    def interrupt(_: int) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGINT)
        return {"mean": torch.ones(1)}

    work = [Encoding("video", digest(k), str(k), (Source((), lambda: 0),)) for k in range(3)]
    with pytest.raises(KeyboardInterrupt):
        fill(work, "video", lambda: interrupt, Cache(tmp_path / "cache"), runtime)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "write"))] == []


def test_the_same_work_can_be_tried_again(runtime: Runtime, tmp_path: Path) -> None:
    """Numbers that were taken in vain are there again."""
    work = [Encoding("video", digest(k), str(k), (Source((), lambda: 0),)) for k in range(3)]
    cache = Cache(tmp_path / "cache")
    with pytest.raises(ZeroDivisionError):
        fill(work, "video", lambda: lambda _: {"mean": torch.ones(1 // 0)}, cache, runtime)
    assert fill(work, "video", lambda: lambda _: {"mean": torch.ones(1)}, cache, runtime) == {}
    assert all(cache.has("video", item.key) for item in work)


# Copies of a clip that breaks after some frames


def break_after(frames: int, clip: Path, target: Path) -> None:
    """Copy a clip, with the data of its later frames overwritten: their places and times are as they were."""
    with av.open(str(clip)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(container.streams.video[0]) if packet.size]
    data = bytearray(clip.read_bytes())
    for start, size in places[frames:]:
        data[start : start + size] = b"\xff" * size
    target.write_bytes(data)


@pytest.fixture
def copies(recipe_file: Path, few_clips: Path, tmp_path: Path) -> list[str]:
    """Overrides of the small recipe: five clips, and two copies of a broken one with captions of their own."""
    folder = Path(shutil.copytree(few_clips, tmp_path / "clips"))
    break_after(5, folder / "wide.mp4", folder / "broken.mp4")
    shutil.copy(folder / "broken.mp4", folder / "copy.mp4")
    for name in ("broken", "copy"):
        (folder / f"{name}.txt").write_text(f"a {name} clip")
    return [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}", "train.steps=4"]


def test_copies_of_a_broken_clip_are_skipped_by_name_and_the_training_goes_on(
    recipe_file: Path, copies: list[str], finetune: Finetune
) -> None:
    settings = [*copies, "data.bad_clips=skip", "validation.heldout_clips=1", "train.micro_batch_size=1"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = finetune("--recipe", recipe_file, *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("broken.mp4", "copy.mp4"):
        assert len(re.findall(rf"^skipped .*/{name}: ", done.stderr, re.MULTILINE)) == 1


def test_where_all_clips_that_are_held_out_are_skipped_others_are_held_out(
    recipe_file: Path, copies: list[str], runtime: Runtime, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(copies[0].removeprefix("data.path="))
    hashes = {path.name: content_hash(path) for path in folder.iterdir() if path.suffix in VIDEO_SUFFIXES}
    order = [sorted(hashes.values(), key=lambda each, seed=seed: digest("heldout", seed, each)) for seed in range(99)]
    seed = next(seed for seed, drawn in enumerate(order) if drawn[0] == hashes["broken.mp4"])
    settings = [*copies, "data.bad_clips=skip", "validation.heldout_clips=1", f"train.seed={seed}"]
    recipe = load_recipe(recipe_file, settings)
    prepared = prepare(recipe, open_family(recipe), runtime)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("held out")]
    assert "broken.mp4" in said[0]
    assert "copy.mp4" in said[0]
    assert [str(item.path) in said[1] for item in prepared.heldout] == [True]
    assert len(prepared.train) == 4


def test_copies_of_a_broken_clip_are_refused_by_name(recipe_file: Path, copies: list[str], runtime: Runtime) -> None:
    recipe = load_recipe(recipe_file, copies)
    with pytest.raises(UserError, match="2 clips cannot be encoded") as error:
        prepare(recipe, open_family(recipe), runtime)
    assert all(f"/{name}: " in str(error.value) for name in ("broken.mp4", "copy.mp4"))


def test_a_prompt_that_cannot_be_encoded_is_an_error_where_clips_are_skipped(
    recipe_file: Path, runtime: Runtime, tiny_model: Callable[..., Path], tmp_path: Path, few_clips: Path
) -> None:
    """The image's token in a text is what this family refuses."""
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(image)
    prompt = f'{{text = "an <image> of a ball", image = "{image}"}}'
    settings = [
        "model.family=hunyuan_i2v",
        f"model.path={tiny_model('hunyuan_i2v')}",
        f"data.path={few_clips}",
        f"validation.prompts=[{prompt}]",
        "data.bad_clips=skip",
    ]
    recipe = load_recipe(recipe_file, settings)
    with pytest.raises(UserError, match="image's token"):
        prepare(recipe, open_family(recipe), runtime)
