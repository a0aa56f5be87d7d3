"""Kinds of datasets are a registry: a new one is a file and a line."""

from pathlib import Path

import pytest

from finetune.data.clip import Clip
from finetune.data.formats import FORMATS
from finetune.data.formats.format import Columns, DatasetFormat, Manifest
from finetune.data.manifest import read_manifest


def test_a_kind_of_dataset_from_outside_is_read(
    tmp_path: Path, few_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list with bars between path and caption, as tools for speech write it."""

    def locate(path: Path, _: Columns) -> Path | None:
        return path if path.suffix == ".list" else None

    def read(path: Path, _: Columns) -> Manifest:
        pairs = [line.split("|") for line in path.read_text().splitlines()]
        return Manifest(tuple(Clip(Path(video), (caption,), path.name) for video, caption in pairs))

    videos = sorted(few_clips.glob("*.mp4"))
    file = tmp_path / "clips.list"
    file.write_text("".join(f"{video}|clip {number}\n" for number, video in enumerate(videos)))
    monkeypatch.setitem(FORMATS, "list", DatasetFormat(locate, read, ".list"))
    found = read_manifest(file, "video", "caption", id_token="TOK").clips
    assert [(clip.path, clip.caption) for clip in found] == [
        (video, f"TOK clip {number}") for number, video in enumerate(videos)
    ]


def test_each_kind_recognises_its_own_files_alone(tmp_path: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl", "metadata.json", "videos.txt", "surf.mp4"):
        (tmp_path / name).touch()
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).touch()
    columns = Columns("video", "caption")
    recognised = {
        name: [kind for kind, form in FORMATS.items() if form.locate(tmp_path / name.replace(".", "_"), columns)]
        for name in ("metadata.csv", "metadata.jsonl", "metadata.json", "videos.txt", "surf.mp4")
    }
    # Every folder may be one of side-cars, which is asked last.
    assert recognised == {
        "metadata.csv": ["csv", "side-cars"],
        "metadata.jsonl": ["jsonl", "side-cars"],
        "metadata.json": ["json", "side-cars"],
        "videos.txt": ["text columns", "side-cars"],
        "surf.mp4": ["side-cars"],
    }
    files = {
        suffix: [k for k, s in FORMATS.items() if s.locate(tmp_path / f"metadata{suffix}", columns)]
        for suffix in (".csv", ".json")
    }
    assert files == {".csv": ["csv"], ".json": ["json"]}
