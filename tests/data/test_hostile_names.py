"""Paths that no file system takes, and manifests of odd bytes: each is named, and none is a traceback."""

import json
from pathlib import Path

import pytest

from finetune.data.manifest import read_manifest
from finetune.runtime.errors import UserError

LONG = "x" * 5000 + ".mp4"
HALF = json.loads('"\\ud800.mp4"')


@pytest.mark.parametrize(
    "video, what",
    [
        (LONG, "cannot be opened (File name too long)"),
        ("sub/" * 3000 + "a.mp4", "cannot be opened (File name too long)"),
        ("a\0b.mp4", "the path has a NUL character"),
        (HALF, "the column 'video' has half a character (\\ud800)"),
        ("~nosuchuser/x.mp4", "there is no user 'nosuchuser'"),
        ("folder.mp4", "this is a folder, not a video"),
        (".", "this is a folder, not a video"),
        ("a.mp4/b.mp4", "cannot be opened (Not a directory)"),
        ("/dev/null", "this is a device, not a regular file"),
        ("https://example.com/a.mp4", "an address, not a file"),
        ("sub\\a.mp4", "no such video file"),
        ("-i.mp4", "no such video file"),
        ("12:30.mp4", "no such video file"),
        ("é.mp4", "no such video file"),
        ("", "the column 'video' is empty"),
        (7, "the column 'video' is not text: 7"),
        (["a.mp4"], "the column 'video' is not text: ['a.mp4']"),
        (None, "the column 'video' is empty"),
    ],
)
def test_a_row_whose_file_cannot_be_used(tmp_path: Path, video: object, what: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    rows = [{"video": video, "caption": "x"}, {"video": "a.mp4", "caption": "x"}]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    manifest = read_manifest(tmp_path, "video", "caption")
    assert [problem.what for problem in manifest.problems] == [what]
    assert "metadata.json, entry 1" in manifest.problems[0].where
    assert manifest.problems[0].cure
    assert [clip.path.name for clip in manifest.clips] == ["a.mp4"]


@pytest.mark.parametrize("value", [HALF, "a" + HALF])
def test_half_a_character_in_another_column(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.json").write_text(json.dumps([{"video": "a.mp4", "caption": "x", "mask": value}]))
    (problem,) = read_manifest(tmp_path, "video", "caption").problems
    assert problem.what == "the column 'mask' has half a character (\\ud800)"


@pytest.mark.parametrize("value", ["~nosuchuser/m.png", LONG, "a\0b"])
def test_the_file_of_another_column_is_a_path_without_an_error(tmp_path: Path, value: str) -> None:
    """Most columns hold no paths, so only those that read one may say what is wrong with it."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.json").write_text(json.dumps([{"video": "a.mp4", "caption": "x", "mask": value}]))
    (clip,) = read_manifest(tmp_path, "video", "caption").clips
    assert clip.file("mask") == tmp_path / value


def test_lines_of_text_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    videos = [LONG.encode(), b"~nosuchuser/x.mp4", b"caf\xe9.mp4", b"a\0.mp4", b"a.mp4", b"a.mp4"]
    (tmp_path / "videos.txt").write_bytes(b"\n".join(videos))
    (tmp_path / "prompts.txt").write_bytes(b"1\n2\n3\n4\nth\xe9\n\xef\xbb\xbfsix")
    manifest = read_manifest(tmp_path, "video", "caption")
    assert sorted(problem.what for problem in manifest.problems) == [
        "cannot be opened (File name too long)",
        "is not UTF-8 text (byte 0xe9)",
        "no such video file",
        "the caption is not UTF-8 text (byte 0xe9)",
        "the path has a NUL character",
    ]
    assert [clip.path.name for clip in manifest.clips] == ["a.mp4"]


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt", b"a.mp4", b"a.txt"):
        (tmp_path / Path(name.decode(errors="surrogateescape"))).write_text("x")
    manifest = read_manifest(tmp_path, "video", "caption")
    (problem,) = manifest.problems
    assert problem.what == "the name is not UTF-8 text (byte 0xe9)"
    assert str(problem).startswith(f"{tmp_path}/caf\\xe9.mp4: ")
    assert [clip.path.name for clip in manifest.clips] == ["a.mp4"]


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nosuchuser/data", "nowhere/clips"])
def test_a_dataset_at_an_odd_path(path: str) -> None:
    with pytest.raises(UserError, match=r"does not exist|cannot be opened"):
        read_manifest(Path(path), "video", "caption")


@pytest.mark.parametrize("column", ["x" * 5000, "a\0b", "../clips", ""])
def test_a_column_of_an_odd_name(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("x")
    assert len(read_manifest(tmp_path, column, column).clips) == 1
