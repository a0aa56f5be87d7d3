"""What is known of files is remembered while they do not change: as it is found, and by several processes together."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.data.cache import Cache
from finetune.data.file_facts import FileFacts, content_hash
from finetune.runtime.errors import Problem

PROBLEMS = [Problem("it is cut off after 3 of 9 frames", "clips/a.mp4", "mend it: ffmpeg -i clips/a.mp4 b.mp4")]


@pytest.fixture
def facts(tmp_path: Path) -> FileFacts:
    return FileFacts(tmp_path / "cache" / "files.jsonl")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"one")
    return tmp_path / "a.mp4"


def again(facts: FileFacts) -> FileFacts:
    """As the next start reads them."""
    return FileFacts(facts.path)


def test_facts_are_remembered_until_the_file_changes(facts: FileFacts, video: Path) -> None:
    facts.put(video, frames=5)
    facts.save()
    assert again(facts).get(video)["frames"] == 5
    video.write_bytes(b"other")
    assert again(facts).get(video) is None


def test_a_file_is_known_by_its_resolved_path(facts: FileFacts, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts.put(video, frames=5)
    (video.parent / "folder").symlink_to(video.parent)
    (video.parent / "link.mp4").symlink_to(video)
    monkeypatch.chdir(video.parent)
    for name in ("a.mp4", "./a.mp4", "folder/a.mp4", "link.mp4", str(video)):
        assert facts.get(Path(name))["frames"] == 5
    assert list(facts.entries) == [str(video.resolve())]


def test_a_file_whose_name_is_no_utf_8_is_remembered(facts: FileFacts, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9\n.mp4")
    odd.write_bytes(b"one")
    facts.put(odd, frames=5)
    facts.save()
    assert again(facts).get(odd)["frames"] == 5


def test_a_change_while_a_file_was_read_is_noticed(facts: FileFacts, video: Path) -> None:
    before = facts.state(video)
    video.write_bytes(b"it grows")
    facts.put(video, before, frames=5)
    assert facts.get(video) is None


def test_facts_of_older_versions_are_read(facts: FileFacts, video: Path) -> None:
    state = video.stat()
    facts.path.parent.mkdir()
    entry = {"hash": "ab", "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    facts.path.with_suffix(".json").write_text(json.dumps({str(video.resolve()): entry}))
    assert again(facts).get(video) == entry


def test_a_hash_follows_the_bytes(tmp_path: Path, video: Path) -> None:
    store, copy = Cache(tmp_path / "cache"), tmp_path / "b.mp4"
    before = store.file_hash(video)
    shutil.copy(video, copy)
    video.write_bytes(b"two!")
    assert store.file_hash(copy) == before != store.file_hash(video)


def test_a_file_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert content_hash(tmp_path / "model.safetensors") == "ab" * 32


def test_a_long_name_in_a_folder_called_blobs_is_no_hash(tmp_path: Path) -> None:
    clip = tmp_path / "blobs" / ("a clip of a cat in the snow".ljust(60, "_") + ".mp4")
    clip.parent.mkdir()
    hashes = set()
    for content in (b"one", b"two"):
        clip.write_bytes(content)
        hashes.add(content_hash(clip))
    assert len(clip.name) == 64
    assert len(hashes) == 2


@pytest.mark.parametrize("contents", [b"", b"{", b"\x00", b"\xa6\xff", b"[]", b"[]\n7\n{}\n", b'{"path": 3}\n'])
@pytest.mark.parametrize("name", ["files.json", "files.jsonl"])
def test_damaged_facts_are_learnt_again(facts: FileFacts, video: Path, name: str, contents: bytes) -> None:
    facts.path.parent.mkdir()
    (facts.path.parent / name).write_bytes(contents)
    damaged = again(facts)
    assert damaged.entries == {}
    damaged.put(video, frames=5)
    damaged.save()
    assert again(facts).get(video)["frames"] == 5


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refusal_is_remembered_for_the_file_and_the_code_that_refused_it(facts: FileFacts, video: Path) -> None:
    assert facts.get_refusal(video, "1") is None
    facts.put_refusal(video, "1", PROBLEMS)
    facts.save()
    assert again(facts).get_refusal(video, "1") == PROBLEMS
    assert again(facts).get_refusal(video, "2") is None
    video.write_bytes(b"mended")
    assert again(facts).get_refusal(video, "1") is None


def test_a_refusal_names_the_file_as_it_is_given(
    facts: FileFacts, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts.put_refusal(video, "1", [Problem("cut off", str(video), f"ffmpeg -i {video} b.mp4")])
    monkeypatch.chdir(video.parent)
    assert facts.get_refusal(Path("a.mp4"), "1") == [Problem("cut off", "a.mp4", "ffmpeg -i a.mp4 b.mp4")]


def test_a_refused_file_keeps_its_hash_and_one_that_is_taken_is_refused_no_more(facts: FileFacts, video: Path) -> None:
    facts.put(video, hash="ab")
    facts.put_refusal(video, "1", PROBLEMS)
    assert facts.get(video)["hash"] == "ab"
    facts.put(video, frames=5)
    assert facts.get_refusal(video, "1") is None
    assert facts.get(video)["hash"] == "ab"


# --- several processes, and killed ones -------------------------------------------------------------------------------

PUT = """
import itertools, sys
from pathlib import Path
from finetune.data.file_facts import FileFacts

folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
facts = FileFacts(folder / "cache" / "files.jsonl")
for number in itertools.count() if count < 0 else range(count):
    file = folder / f"{name}_{number}"
    file.write_text(str(number))
    facts.put(file, number=number, name=name, padding="x" * 500)
    if count >= 0:
        facts.save()
"""


def put(folder: Path, name: str, count: int) -> subprocess.Popen:
    """A process that finds facts: about `count` files, each saved at once; or of more and more, until it is killed."""
    return subprocess.Popen([sys.executable, "-c", PUT, str(folder), name, str(count)])


def test_processes_that_share_a_cache_lose_none_of_each_others_facts(facts: FileFacts, tmp_path: Path) -> None:
    processes = [put(tmp_path, name, 300) for name in ("a", "b", "c")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    known = again(facts)
    assert len(known.entries) == 900
    for name in ("a", "b", "c"):
        assert [known.get(tmp_path / f"{name}_{number}")["number"] for number in range(300)] == list(range(300))


def test_a_killed_process_leaves_what_it_had_found(facts: FileFacts, tmp_path: Path) -> None:
    process = put(tmp_path, "a", -1)
    deadline = time.monotonic() + 60
    while len(again(facts).entries) < 20 and time.monotonic() < deadline:
        pass
    process.kill()
    process.wait()
    kept = again(facts)
    assert len(kept.entries) >= 20
    for key, entry in kept.entries.items():
        assert Path(key).name == f"{entry['name']}_{entry['number']}"
        assert kept.get(Path(key)) == entry


def test_what_a_killed_process_left_of_a_line_costs_that_line_alone(facts: FileFacts, video: Path) -> None:
    other = video.with_name("b.mp4")
    other.write_bytes(b"two")
    facts.put(video, frames=5)
    facts.save()
    with facts.path.open("ab") as file:
        file.write(b'{"path": "/clips/c.mp4", "si')
    facts.put(other, frames=7)
    facts.save()
    found = again(facts)
    assert (found.get(video)["frames"], found.get(other)["frames"], len(found.entries)) == (5, 7, 2)


def test_a_compact_file_has_what_still_holds_and_loses_nothing_that_others_add(
    facts: FileFacts, video: Path, tmp_path: Path
) -> None:
    gone, changed = tmp_path / "gone.mp4", tmp_path / "changed.mp4"
    for file in (gone, changed):
        file.write_bytes(b"one")
        facts.put(file, frames=3)
    facts.save()
    for frames in range(50):
        facts.put(video, frames=frames)
        facts.save()
    unmounted = {"path": str(tmp_path / "disk" / "a.mp4"), "size": 1, "mtime_ns": 1, "frames": 7}
    with facts.path.open("a") as file:
        file.write(json.dumps(unmounted) + "\n")
    gone.unlink()
    changed.write_bytes(b"other")
    processes = [put(tmp_path, name, 200) for name in ("a", "b")]
    while any(process.poll() is None for process in processes):
        again(facts).compact()
    assert [process.returncode for process in processes] == [0, 0]
    again(facts).compact()
    kept = again(facts)
    assert len(kept.entries) == 402
    assert facts.path.read_bytes().count(b"\n") == 402
    assert (kept.get(video)["frames"], kept.entries[unmounted["path"]]["frames"]) == (49, 7)
    shutil.rmtree(facts.path.parent)
    assert facts.compact() == 0


def test_facts_that_cannot_be_kept_are_said_once(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    facts = FileFacts(tmp_path / "cache" / "files.jsonl")
    for frames in (5, 6):
        assert facts.put(video, frames=frames)["frames"] == frames
        facts.save()
    assert capsys.readouterr().err.count("is not kept for the next start") == 1


@pytest.mark.parametrize("size", [0, 1, 2**23, 2**23 + 5])
def test_a_hash_is_that_of_the_whole_file(size: int, tmp_path: Path) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "clip.mp4").write_bytes(content[:size])
    assert content_hash(tmp_path / "clip.mp4") == hashlib.blake2b(content[:size], digest_size=20).hexdigest()


def test_hashing_that_takes_long_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.data.file_facts.PATIENCE", 1e-9)
    monkeypatch.setattr("finetune.runtime.progress._SECONDS_BETWEEN_LINES", 0)
    file = tmp_path / "diffusion_pytorch_model-00001-of-00004.safetensors"
    file.write_bytes(bytes(20_000_000))
    content_hash(file)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("hashing diffusion_pyt…4.safetensors 8.4 MB/20.0 MB 42%  ETA 0:00:00")
