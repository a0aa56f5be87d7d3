"""Captions beside clips: the kinds of side-cars, several captions, and those that cannot be used."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune.data.manifest import Manifest, read_manifest


@pytest.fixture
def dataset(tmp_path: Path):
    """Write files beside a.mp4 and read the dataset."""

    def read(files: Mapping[str, str | bytes], caption: str = "caption") -> Manifest:
        (tmp_path / "a.mp4").touch()
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_manifest(tmp_path, "video", caption)

    return read


@pytest.mark.parametrize(
    "name, content, captions",
    [
        ("a.txt", "one\n two\n", ("one two",)),
        ("a.TXT", "one", ("one",)),
        ("a.caption", "one\n two\n", ("one two",)),
        ("a.captions.txt", "one\n\n  two\r\nthree and  more\none\n", ("one", "two", "three and  more")),
        ("a.json", '{"caption": " one "}', ("one",)),
        ("a.json", '{"captions": ["one", "two"]}', ("one", "two")),
        ("a.json", '{"caption": ["one", "two"]}', ("one", "two")),
        ("a.json", '["one", "two"]', ("one", "two")),
        ("a.json", '"one"', ("one",)),
        ("a.json", b'\xef\xbb\xbf{"caption": "one"}', ("one",)),
    ],
)
def test_kinds_of_side_cars(dataset, name: str, content: str | bytes, captions: tuple[str, ...]) -> None:
    manifest = dataset({name: content})
    assert [(clip.path.name, clip.captions, clip.where) for clip in manifest.clips] == [("a.mp4", captions, name)]
    assert manifest.problems == manifest.unused == ()


def test_other_keys_of_json_are_columns(dataset, tmp_path: Path) -> None:
    content = {"caption": "x", "score": 0.5, "mask": " masks/a.png ", "tags": ["b"], "none": None, "empty": ""}
    (clip,) = dataset({"a.json": json.dumps(content)}).clips
    assert clip.columns == {"score": "0.5", "mask": "masks/a.png", "tags": '["b"]'}
    assert clip.file("mask") == tmp_path / "masks" / "a.png"


def test_the_key_of_captions_is_the_recipes(dataset) -> None:
    (clip,) = dataset({"a.json": '{"caption": "x", "prompt": "y"}'}, caption="prompt").clips
    assert (clip.captions, clip.columns) == (("y",), {"caption": "x"})


def test_side_cars_that_agree_are_both_used(dataset) -> None:
    (clip,) = dataset({"a.txt": "x\n", "a.json": '{"caption": "x", "score": 3}'}).clips
    assert (clip.captions, clip.columns, clip.where) == (("x",), {"score": "3"}, "a.json and a.txt")


@pytest.mark.parametrize(
    "other", [("a.caption", "y"), ("a.json", '{"caption": "y"}'), ("a.TXT", "y"), ("a.captions.txt", "x\ny")]
)
def test_side_cars_that_differ_are_a_problem(dataset, other: tuple[str, str]) -> None:
    manifest = dataset({"a.txt": "x", other[0]: other[1]})
    (problem,) = manifest.problems
    assert manifest.clips == ()
    assert problem.what == f"{' and '.join(sorted(['a.txt', other[0]]))} have different captions for it"
    assert problem.cure == "keep one of them; a file a.captions.txt may have several"


def test_json_about_something_else_is_named_and_not_in_the_way(dataset) -> None:
    manifest = dataset({"a.txt": "x", "a.json": '{"fps": 25}', "a.info.json": "{}"})
    assert [clip.captions for clip in manifest.clips] == [("x",)]
    assert {Path(each.where).name: each.what for each in manifest.unused} == {
        "a.json": "no 'caption' in it",
        "a.info.json": "JSON without a clip of that name",
    }


@pytest.mark.parametrize("content", ['{"fps": 25}', "[]", "null", "7", "[[1, 2], [3, 4]]", '["x", 3]'])
def test_json_without_a_caption_is_none(dataset, content: str) -> None:
    assert [clip.captions for clip in dataset({"a.json": content, "a.txt": "x"}).clips] == [("x",)]
    Path(dataset({}).clips[0].path).with_suffix(".txt").unlink()
    (problem,) = dataset({}).problems
    assert problem.what == "video without a caption"
    assert problem.cure == 'write "caption": "..." in a.json, or a.txt beside it'


def test_a_video_may_be_called_captions(dataset) -> None:
    manifest = dataset({"a.txt": "x", "a.captions.mp4": "", "a.captions.txt": "one\ntwo"})
    assert [(clip.path.name, clip.captions) for clip in manifest.clips] == [
        ("a.captions.mp4", ("one two",)),
        ("a.mp4", ("x",)),
    ]


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.txt", b"caf\xe9", "the caption is not UTF-8 text (byte 0xe9)"),
        ("a.txt", "x".encode("utf-16"), "cannot be read (it is UTF-16)"),
        ("a.txt", b"", "the caption is empty"),
        ("a.caption", "\u200b \n", "the caption is empty"),
        ("a.captions.txt", "\n\n", "the caption is empty"),
        ("a.txt", "x" * 2**20, "the caption has 1,048,576 characters; the most is 50,000"),
        ("a.txt", b"x" * (2**24 + 1), "the file has 16,777,217 bytes, too many for a caption"),
        ("a.json", '{"caption": "\\ud800"}', "the caption has half a character (\\ud800)"),
        ("a.json", '{"caption": 3}', "the caption is not text: 3"),
        ("a.json", '{"caption": null}', "the caption is empty"),
        ("a.json", '{"captions": []}', "the caption is empty"),
        ("a.json", '["x", ""]', "the caption is empty"),
        ("a.json", '{"caption": "x"', "not valid JSON: Expecting ',' delimiter, line 1"),
        ("a.json", "[" * 100_000, "not valid JSON: nested too deeply, line 1"),
        ("a.json", '{"caption": "x", "n": ' + "9" * 5000 + "}", "not valid JSON: a number has too many digits, line 1"),
    ],
)
def test_a_caption_that_cannot_be_used_is_named_and_the_rest_is_used(
    dataset, tmp_path: Path, name: str, content: str | bytes, what: str
) -> None:
    manifest = dataset({name: content, "b.mp4": "", "b.txt": "x"})
    assert [(p.where, p.what) for p in manifest.problems] == [(f"{tmp_path / name} (of a.mp4)", what)]
    assert all(problem.cure for problem in manifest.problems)
    assert [clip.path.name for clip in manifest.clips] == ["b.mp4"]


def test_all_captions_that_are_not_utf8_are_named(dataset, tmp_path: Path) -> None:
    for name in "bcd":
        (tmp_path / f"{name}.mp4").touch()
    manifest = dataset({f"{name}.txt": "é".encode("latin-1" if name in "bd" else "utf-8") for name in "abcd"})
    assert [Path(problem.where).name for problem in manifest.problems] == ["b.txt (of b.mp4)", "d.txt (of d.mp4)"]
