"""Finding clips and captions: every layout of a dataset, and everything that can be wrong with one."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune.data.manifest import read_manifest
from finetune.runtime.errors import UserError


@pytest.fixture
def dataset(tmp_path: Path):
    """Write files by name; the text of a video does not matter here."""

    def write(files: Mapping[str, str | bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


@pytest.mark.parametrize("part", ["", "train/"])
def test_of_several_tables_none_is_taken_before_one_is_named(dataset, part: str) -> None:
    table = "video,caption\na.mp4,x\n"
    folder = dataset({f"{part}a.mp4": "", f"{part}metadata.csv": table, f"{part}metadata.jsonl": ""})
    with pytest.raises(UserError) as caught:
        pairs(folder)
    (problem,) = caught.value.problems
    assert problem.what == "there are 2 tables: metadata.csv, metadata.jsonl"
    assert problem.where == str(folder / part)
    assert f"data.path, such as {folder / part / 'metadata.csv'}" in problem.cure
    assert pairs(folder / part / "metadata.csv") == [("a.mp4", "x")]


def pairs(path: Path, video: str = "video", caption: str = "caption", token: str = "") -> list[tuple[str, str]]:
    """(path inside the dataset, caption) of each clip."""
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(path, video, caption, token)
    assert manifest.problems == ()
    return [(clip.path.relative_to(folder).as_posix(), clip.caption) for clip in manifest.clips]


def refusal(path: Path) -> list[tuple[str, str, str]]:
    """(where, what, cure) of everything that is wrong, with the dataset's folder left out."""
    try:
        problems = read_manifest(path, "video", "caption").problems
    except UserError as error:
        problems = error.problems
    folder = str(path if path.is_dir() or not path.suffix else path.parent)
    return [(p.where.replace(folder + "/", ""), p.what, p.cure) for p in problems]


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_videos_with_captions_beside_them_in_order_of_their_names(dataset) -> None:
    folder = dataset(
        {"b.mp4": "", "b.txt": "second", "a.webm": "", "a.txt": "first\n", "sub/c.MOV": "", "sub/c.txt": "3"}
    )
    assert pairs(folder) == [("a.webm", "first"), ("b.mp4", "second"), ("sub/c.MOV", "3")]


def test_lines_of_a_caption_are_joined(dataset) -> None:
    assert pairs(dataset({"a.mp4": "", "a.txt": "one\n  two\r\n\nthree \n"})) == [("a.mp4", "one two three")]


def test_hidden_and_foreign_files_are_left_alone(dataset) -> None:
    folder = dataset({"a.mp4": "", "a.txt": "x", "._a.mp4": "", "notes.md": "", "a.json": "{}", ".hidden.txt": "y"})
    assert pairs(folder) == [("a.mp4", "x")]


def test_a_byte_order_mark_is_no_part_of_a_caption(dataset) -> None:
    assert pairs(dataset({"a.mp4": "", "a.txt": b"\xef\xbb\xbfcaption"})) == [("a.mp4", "caption")]


@pytest.mark.parametrize("captions", ["caption.txt", "captions.txt", "prompts.txt"])
@pytest.mark.parametrize("videos", ["video.txt", "videos.txt"])
def test_a_text_file_of_videos_and_one_of_captions(dataset, videos: str, captions: str) -> None:
    folder = dataset({"v/a.mp4": "", "b.mp4": "", videos: "v/a.mp4\nb.mp4\n\n", captions: "first\nsecond\n"})
    assert pairs(folder) == [("v/a.mp4", "first"), ("b.mp4", "second")]


ROWS = [
    {"video": "v/b.mp4", "caption": 'said "hello", and\nwent', "score": "3"},
    {"video": "a.mp4", "caption": "a\u2028line separator, \x0b and \x85 too", "score": "4"},
]


def table(path: Path, rows: list[dict]) -> Path:
    """Write rows with Python's own csv and json."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.json", "metadata.jsonl"])
def test_a_table_in_the_folder(dataset, name: str) -> None:
    folder = dataset({"v/b.mp4": "", "a.mp4": ""})
    table(folder / name, ROWS)
    assert pairs(folder) == [(row["video"], row["caption"]) for row in ROWS]


@pytest.mark.parametrize("name", ["list.csv", "list.json", "list.jsonl", "LIST.CSV"])
def test_a_table_by_its_own_path(dataset, name: str) -> None:
    folder = dataset({"v/b.mp4": "", "a.mp4": ""})
    path = table(folder / name.lower(), ROWS).rename(folder / name)
    assert pairs(path) == [(row["video"], row["caption"]) for row in ROWS]


def test_columns_may_have_other_names(dataset) -> None:
    folder = dataset({"a.mp4": "", "metadata.csv": "file_name,text\na.mp4,hello\n"})
    assert pairs(folder, "file_name", "text") == [("a.mp4", "hello")]


def test_absolute_paths_are_kept(dataset, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a.mp4"
    elsewhere.touch()
    folder = dataset({"metadata.csv": f"video,caption\n{elsewhere},x\n"})
    assert [clip.path for clip in read_manifest(folder, "video", "caption").clips] == [elsewhere]


def test_a_caption_line_with_unusual_separators_is_one_line(dataset) -> None:
    folder = dataset(
        {"a.mp4": "", "b.mp4": "", "videos.txt": "a.mp4\nb.mp4\n", "prompts.txt": "one\u2028line\ntwo\x0c\n"}
    )
    assert pairs(folder) == [("a.mp4", "one\u2028line"), ("b.mp4", "two")]


def test_the_trigger_word_is_put_in_front(dataset) -> None:
    assert pairs(dataset({"a.mp4": "", "a.txt": "a cat"}), token="afkx") == [("a.mp4", "afkx a cat")]


def test_one_video_may_have_several_captions(dataset) -> None:
    folder = dataset({"a.mp4": "", "metadata.csv": "video,caption\na.mp4,one\na.mp4,two\n"})
    (clip,) = read_manifest(folder, "video", "caption").clips
    assert clip.captions == ("one", "two")


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_a_dataset_that_does_not_exist(tmp_path: Path) -> None:
    (found,) = refusal(tmp_path / "nowhere")
    assert found[1:] == (
        "the dataset does not exist",
        "set data.path, or `path` in [[data.sources]], to a folder of videos or a manifest file",
    )


@pytest.mark.parametrize(
    "files", [{}, {"metadata.csv": "video,caption\n"}, {"metadata.jsonl": "\n"}, {"readme.md": "x"}]
)
def test_an_empty_dataset_says_what_to_put_there(dataset, files: dict) -> None:
    (found,) = refusal(dataset(files))
    assert found[1] == "the dataset is empty"
    assert ".mp4" in found[2]


def test_all_files_without_a_partner_are_named(dataset) -> None:
    folder = dataset({"a.mp4": "", "b.txt": "x", "c.mp4": "", "c.txt": " \n", "d.mp4": "", "d.txt": "fine"})
    assert refusal(folder) == [
        ("a.mp4", "video without a caption", "write a.txt beside it"),
        ("c.txt (of c.mp4)", "the caption is empty", "write what the video shows"),
        ("b.txt", "caption without a video", "add the video of the same name, or remove the text"),
    ]


def test_all_missing_videos_are_named_with_their_lines(dataset) -> None:
    folder = dataset({"a.mp4": "", "metadata.csv": "video,caption\nx.mp4,1\na.mp4,2\ny.mp4,3\n"})
    assert refusal(folder) == [
        ("x.mp4 (from metadata.csv, line 2)", "no such video file", "mend the path or remove the line"),
        ("y.mp4 (from metadata.csv, line 4)", "no such video file", "mend the path or remove the line"),
    ]


def test_columns_of_different_length(dataset) -> None:
    (found,) = refusal(dataset({"videos.txt": "a.mp4\nb.mp4\n", "prompts.txt": "one\n"}))
    assert found[0] == "prompts.txt and videos.txt"
    assert found[1] == "1 caption for 2 videos"


def test_a_blank_line_in_a_column_would_shift_the_rest(dataset) -> None:
    (found,) = refusal(dataset({"videos.txt": "a.mp4\nb.mp4\nc.mp4\n", "prompts.txt": "one\n\nthree\n"}))
    assert found == ("prompts.txt, line 2", "empty line", "fill it in")


def test_a_column_of_videos_without_one_of_captions(dataset) -> None:
    (found,) = refusal(dataset({"videos.txt": "a.mp4\n"}))
    assert found[0] == "videos.txt"
    assert "add prompts.txt" in found[2]


def test_a_wrong_column_suggests_the_nearest(dataset) -> None:
    found = refusal(dataset({"a.mp4": "", "metadata.csv": "video_path,caption\na.mp4,x\n"}))
    assert found == [
        (
            "metadata.csv",
            "there is no column 'video'",
            'set data.video_column = "video_path" (columns: video_path, caption)',
        )
    ]


@pytest.mark.parametrize(
    "text, where, what",
    [
        ("video,caption\na.mp4,x\na.mp4,\n", "metadata.csv, line 3 (a.mp4)", "the column 'caption' is empty"),
        ("video,caption\na.mp4,x\na.mp4\n", "metadata.csv, line 3", "1 field for 2 columns (video, caption)"),
        (
            '[ROW, {"video": "a.mp4", "caption": 7}]',
            "metadata.json, entry 2 (a.mp4)",
            "the column 'caption' is not text: 7",
        ),
        (
            'ROW\n\n{"video": "a.mp4", "caption": ""}\n',
            "metadata.jsonl, line 3 (a.mp4)",
            "the column 'caption' is empty",
        ),
        ('ROW\n{"video": "a.mp4"}\n', "metadata.jsonl, line 2 (a.mp4)", "there is no column 'caption'"),
    ],
)
def test_a_row_without_a_caption_is_named_and_the_rest_is_used(dataset, text: str, where: str, what: str) -> None:
    text = text.replace("ROW", '{"video": "a.mp4", "caption": "x"}')
    folder = dataset({"a.mp4": "", where.split(",")[0]: text})
    (found,) = refusal(folder)
    assert found[:2] == (where, what)
    assert [clip.captions for clip in read_manifest(folder, "video", "caption").clips] == [("x",)]


@pytest.mark.parametrize(
    "name, text, where, what",
    [
        ("metadata.jsonl", '{"video": "a"\n', "metadata.jsonl, line 1", "not valid JSON"),
        ("metadata.json", '[\n{"video": "a",\n]', "metadata.json, line ", "not valid JSON"),
        ("metadata.json", '{"video": "a"}', "metadata.json", "not a list"),
        ("metadata.jsonl", '["a.mp4", "x"]\n', "metadata.jsonl, line 1", "not an object with named columns"),
        ("metadata.csv", 'video,caption\na.mp4,"x\nb.mp4,y\n', "metadata.csv, line 3", "not valid CSV"),
        ("metadata.csv", b"video,caption\na.mp4,\xff\n", "metadata.csv, line 2", "the column 'caption' is not UTF-8"),
        ("metadata.csv", "video,caption\na.mp4,x\n".encode("utf-16"), "metadata.csv", "cannot be read (it is UTF-16)"),
    ],
)  # fmt: skip
def test_a_broken_table_says_where(dataset, name: str, text: str | bytes, where: str, what: str) -> None:
    (found,) = refusal(dataset({name: text}))
    assert found[0].startswith(where)
    assert found[1].startswith(what)


def test_a_file_that_is_no_table(dataset) -> None:
    (found,) = refusal(dataset({"clips.xlsx": "x"}) / "clips.xlsx")
    assert found[1:] == ("not a manifest", "use a folder, .csv, .json, .jsonl, .parquet or .tsv")
