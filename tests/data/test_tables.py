"""Tables of clips: each format, several captions, further columns, the Hub's folders, and rows that are wrong."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from finetune.data.clip import Clip
from finetune.data.manifest import Manifest, read_manifest
from finetune.runtime.errors import Problem, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty files, since only their names matter here."""
    for name in ("a.mp4", "b.mp4", "c.mp4", "m.png"):
        (tmp_path / name).touch()
    return tmp_path


def read(path: Path, video: str = "video", caption: str = "caption", token: str = "") -> Manifest:
    return read_manifest(path, video, caption, token)


def clips(path: Path, video: str = "video", caption: str = "caption") -> list[tuple[str, tuple[str, ...]]]:
    manifest = read(path, video, caption)
    assert manifest.problems == ()
    return [(clip.path.name, clip.captions) for clip in manifest.clips]


def problems(path: Path, video: str = "video", caption: str = "caption") -> list[Problem]:
    try:
        return list(read(path, video, caption).problems)
    except UserError as error:
        return list(error.problems)


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows with the libraries that people write them with."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ALL = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]
LISTS = [".json", ".jsonl", ".parquet"]
ROWS = [
    {"video": "b.mp4", "caption": 'said "hello",\nand\twent', "n": 3},
    {"video": "a.mp4", "caption": "É 猫", "n": 4},
]


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("name", ["metadata", "list"])
def test_every_format_holds_the_same_rows(folder: Path, suffix: str, name: str) -> None:
    path = write_table(folder / f"{name}{suffix}", ROWS)
    manifest = read(folder if name == "metadata" else path)
    found = [(clip.path, clip.caption, clip.columns, clip.folder) for clip in manifest.clips]
    assert found == [(folder / row["video"], row["caption"], {"n": str(row["n"])}, folder) for row in ROWS]
    assert manifest.problems == ()


@pytest.mark.parametrize("suffix", ALL)
def test_file_name_is_the_hubs_column_of_videos(folder: Path, suffix: str) -> None:
    write_table(folder / f"metadata{suffix}", [{"file_name": "a.mp4", "caption": "x"}])
    assert clips(folder) == [("a.mp4", ("x",))]
    (problem,) = problems(folder, video="clip")  # a column that was asked for by name is not replaced
    assert problem.what == "there is no column 'clip'"
    assert 'set data.video_column = "file_name"' in problem.cure


@pytest.mark.parametrize("column", ["text", "prompt"])
def test_the_usual_names_of_captions_are_offered_and_not_taken(folder: Path, column: str) -> None:
    (folder / "metadata.csv").write_text(f"file_name,{column},fps\na.mp4,x,25\n")
    (problem,) = problems(folder)
    assert problem == Problem(
        "there is no column 'caption'",
        str(folder / "metadata.csv"),
        f'set data.caption_column = "{column}" (columns: file_name, {column}, fps)',
    )


def test_missing_columns_are_told_once_and_not_for_each_row(folder: Path) -> None:
    (folder / "metadata.csv").write_text("clip,words\n" + "a.mp4,x\n" * 50)
    assert [problem.what for problem in problems(folder)] == [
        "there is no column 'video'",
        "there is no column 'caption'",
    ]


def test_semicolons_are_seen_for_what_they_are(folder: Path) -> None:
    (folder / "metadata.csv").write_text("video;caption\na.mp4;x\n")
    assert all("separate the fields by commas" in problem.cure for problem in problems(folder))


# --- several captions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", LISTS)
def test_a_list_of_captions(folder: Path, suffix: str) -> None:
    rows = [{"video": "a.mp4", "caption": ["one", " two ", "one"]}, {"video": "b.mp4", "caption": ["three"]}]
    write_table(folder / f"metadata{suffix}", rows)
    assert clips(folder) == [("a.mp4", ("one", "two")), ("b.mp4", ("three",))]


@pytest.mark.parametrize("suffix", ALL)
def test_repeated_rows_are_captions_of_one_clip(folder: Path, suffix: str) -> None:
    rows = [("a.mp4", "one", 1), ("b.mp4", "x", 2), ("./a.mp4", "two", 1), ("a.mp4", "one", 1)]
    write_table(folder / f"metadata{suffix}", [{"video": v, "caption": c, "n": n} for v, c, n in rows])
    assert clips(folder) == [("a.mp4", ("one", "two")), ("b.mp4", ("x",))]
    (repeated,) = [each for each in read(folder).unused if each.what == "repeats an earlier row"]
    assert repeated.where.startswith(f"metadata{suffix}, ")


def test_rows_with_some_new_captions_add_those(folder: Path) -> None:
    rows = [["one", "two"], ["two", "three"], ["three", "one"], ["four"], ["two"]]
    write_table(folder / "metadata.jsonl", [{"video": "a.mp4", "caption": captions} for captions in rows])
    assert clips(folder) == [("a.mp4", ("one", "two", "three", "four"))]
    repeated = [each.where for each in read(folder).unused if each.what == "repeats an earlier row"]
    assert repeated == ["metadata.jsonl, line 3", "metadata.jsonl, line 5"]


def test_repeated_rows_with_other_masks_are_no_captions_of_one_clip(folder: Path) -> None:
    (folder / "metadata.csv").write_text("video,caption,mask\na.mp4,one,m.png\na.mp4,two,other.png\n")
    (problem,) = problems(folder)
    assert problem.where == "metadata.csv, line 3 (a.mp4)"
    assert problem.what == "metadata.csv, line 2 has the same video with another 'mask'"


def test_repeated_lines_of_text_files_are_captions_of_one_clip(folder: Path) -> None:
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\na.mp4\n")
    (folder / "prompts.txt").write_text("one\nx\ntwo\n")
    assert clips(folder) == [("a.mp4", ("one", "two")), ("b.mp4", ("x",))]


def test_the_trigger_word_is_put_in_front_of_each(folder: Path) -> None:
    write_table(folder / "metadata.json", [{"video": "a.mp4", "caption": ["one", "two"]}])
    (clip,) = read(folder, token="afkx").clips
    assert clip.captions == ("afkx one", "afkx two")
    assert clip.caption == "afkx one"


@pytest.mark.parametrize(
    "caption, what",
    [
        ([], "is empty"),
        (["x", ""], "is empty"),
        (None, "is empty"),
        (["x", None], "is empty"),
        ([["x"]], "is not text: ['x']"),
        (7, "is not text: 7"),
        (True, "is not text: True"),
        ({"en": "x"}, "is not text: {'en': 'x'}"),
        (" \u200b\u00a0\ufeff\u2060", "is empty"),
        ("x" * 2**20, "has 1,048,576 characters; the most is 50,000"),
    ],
)
def test_captions_that_are_none(folder: Path, caption: object, what: str) -> None:
    write_table(folder / "metadata.jsonl", [{"video": "a.mp4", "caption": caption}, {"video": "b.mp4", "caption": "x"}])
    assert [(p.where, p.what) for p in problems(folder)] == [
        ("metadata.jsonl, line 1 (a.mp4)", f"the column 'caption' {what}")
    ]
    assert [clip.path.name for clip in read(folder).clips] == ["b.mp4"]


# --- fields that do not add up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, separator, name", [(".csv", ",", "a comma"), (".tsv", "\t", "a tab")])
def test_a_caption_is_not_cut_at_a_separator(folder: Path, suffix: str, separator: str, name: str) -> None:
    rows = [["video", "caption"], ["a.mp4", "a cat", " asleep"], ["b.mp4", "x"], ["c.mp4"]]
    (folder / f"metadata{suffix}").write_text("\n".join(map(separator.join, rows)) + "\n\n")
    assert problems(folder) == [
        Problem(
            "3 fields for 2 columns (video, caption)",
            f"metadata{suffix}, line 2",
            f'put the caption in quotes, "like this": {name} separates fields',
        ),
        Problem(
            "1 field for 2 columns (video, caption)",
            f"metadata{suffix}, line 4",
            "write all of them; an empty field is two separators in a row",
        ),
    ]
    assert [clip.path.name for clip in read(folder).clips] == ["b.mp4"]


@pytest.mark.parametrize("columns", ["{v}{s}{c}", "{c}{s}{v}", "{v}{s}{c}{s}n", "n{s}{c}{s}{v}"])
@pytest.mark.parametrize("suffix, separator", [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("between", [0, 1, 3])
def test_quotes_of_two_captions_do_not_make_one_row_of_all_between(
    folder: Path, columns: str, suffix: str, separator: str, between: int
) -> None:
    captions = ['"Hello there.', *(f"number {n}" for n in range(between)), 'He says hello."']
    rows = [columns.format(v="video", c="caption", s=separator)]
    rows += [columns.format(v="a.mp4", c=caption, s=separator) for caption in captions]
    rows += [columns.format(v="b.mp4", c="good", s=separator)]
    (folder / f"metadata{suffix}").write_text("\n".join(rows) + "\n")
    (problem,) = problems(folder)
    assert problem.where == f"metadata{suffix}, line 2"
    assert problem.what.startswith(f"a quote opens a field here that is closed on line {between + 3}, ")
    assert [clip.path.name for clip in read(folder).clips] == ["b.mp4"]


def test_captions_of_several_lines_are_no_rows(folder: Path) -> None:
    captions = [
        "Two people,\nboth old, talk.\n\nOne, who smiles,",
        "Like a.mp4,\nbut,\n, longer",
        'He says: "Hi,\nyou"',
    ]
    for suffix in (".csv", ".tsv"):
        rows = [{"video": f"{name}.mp4", "caption": text} for name, text in zip("abc", captions, strict=True)]
        path = write_table(folder / f"own{suffix}", rows)
        assert [found for _, (found,) in clips(path)] == captions


def test_a_space_after_the_comma_is_no_part_of_a_field(folder: Path) -> None:
    (folder / "metadata.csv").write_text('video, caption\na.mp4, "one, two"\nb.mp4, three\n')
    assert clips(folder) == [("a.mp4", ("one, two",)), ("b.mp4", ("three",))]


def test_a_quote_after_a_space_in_tsv_is_text(folder: Path) -> None:
    (folder / "metadata.tsv").write_text('video\tcaption\na.mp4\t "One" and two\n')
    assert clips(folder) == [("a.mp4", ('"One" and two',))]


def test_a_column_that_is_there_twice(folder: Path) -> None:
    (folder / "metadata.csv").write_text("video,caption,caption\na.mp4,x,y\n")
    assert [problem.what for problem in problems(folder)] == ["the column 'caption' is there twice"]


def test_a_long_caption_in_csv_is_a_problem_of_its_row(folder: Path) -> None:
    (folder / "metadata.csv").write_text(f"video,caption\na.mp4,{'x' * 2**20}\nb.mp4,y\n")
    assert [problem.where for problem in problems(folder)] == ["metadata.csv, line 2 (a.mp4)"]
    assert csv.field_size_limit() == 131072  # of other code in the process


def test_captions_that_are_not_utf8_are_named_all_at_once(folder: Path) -> None:
    text = "video,caption\na.mp4,café\nb.mp4,cafe\nc.mp4,thé\n"
    (folder / "metadata.csv").write_bytes(text.encode("latin-1"))
    assert [(problem.where, problem.what) for problem in problems(folder)] == [
        ("metadata.csv, line 2 (a.mp4)", "the column 'caption' is not UTF-8 text (byte 0xe9)"),
        ("metadata.csv, line 4 (c.mp4)", "the column 'caption' is not UTF-8 text (byte 0xe9)"),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_column(folder: Path, suffix: str) -> None:
    path = write_table(folder / f"metadata{suffix}", [{"video": "a.mp4", "caption": "x"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert clips(folder) == [("a.mp4", ("x",))]


def test_a_row_that_is_no_json_does_not_stop_the_rest(folder: Path) -> None:
    good = '{"video": "a.mp4", "caption": "x"}'
    (folder / "metadata.jsonl").write_text(f'{good}\n{{"video": \n{"[" * 100_000}\n{{"video": {"9" * 5000}}}\nNaN\n')
    assert [(problem.where, problem.what) for problem in problems(folder)] == [
        ("metadata.jsonl, line 2", "not valid JSON: Expecting value"),
        ("metadata.jsonl, line 3", "not valid JSON: nested too deeply"),
        ("metadata.jsonl, line 4", "not valid JSON: a number has too many digits"),
        ("metadata.jsonl, line 5", "not an object with named columns"),
    ]
    assert [clip.path.name for clip in read(folder).clips] == ["a.mp4"]


def test_a_key_that_an_object_has_twice_is_named_with_its_line(folder: Path) -> None:
    good = '{"video": "a.mp4", "caption": "x", "note": {"video": "{"}}'
    twice = '{"video": "a.mp4", "caption": "x", "note": [{"\\"": 1}], "c\\u0061ption": "y"}'
    (folder / "metadata.jsonl").write_text(f"{good}\n{twice}\n")
    (problem,) = problems(folder)
    assert problem.where == "metadata.jsonl, line 2"
    assert problem.what == "not valid JSON: the key 'caption' is there twice"
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.json").write_text(f"[\n{good},\n{twice}\n]")
    with pytest.raises(UserError, match=r"metadata\.json, line 3: not valid JSON: the key 'caption' is there twice"):
        read(folder)


# --- further files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ALL)
def test_masks_and_controls_are_relative_to_the_table(folder: Path, suffix: str) -> None:
    row = {"video": "a.mp4", "caption": "x", "mask": "m.png", "control": "c.mp4", "reference": ""}
    write_table(folder / f"metadata{suffix}", [row])
    (clip,) = read(folder).clips
    assert clip.columns == {"mask": "m.png", "control": "c.mp4"}
    assert (clip.file("mask"), clip.file("control")) == (folder / "m.png", folder / "c.mp4")
    unused = {Path(each.where).name: each.what for each in read(folder).unused}
    assert unused == {"b.mp4": f"not in metadata{suffix}"}


# --- the Hub's folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ALL)
def test_train_is_trained_on_and_test_is_offered_for_the_heldout_loss(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.mp4").touch()
        write_table(tmp_path / split / f"metadata{suffix}", [{"file_name": "a.mp4", "caption": split}])
    manifest = read(tmp_path)
    assert manifest.clips == (
        Clip(tmp_path / "train/a.mp4", ("train",), manifest.clips[0].where, {}, tmp_path / "train"),
    )
    cure = f'to measure the held-out loss on it, set validation.heldout = "{tmp_path}/test"'
    assert set(manifest.unused) == {
        Problem("in test/, which is not trained on", str(tmp_path / "test" / name), cure)
        for name in ("a.mp4", f"metadata{suffix}")
    }
    assert [clip.caption for clip in read(tmp_path / "test").clips] == ["test"]


def test_a_clip_of_train_that_no_row_names_is_told_with_the_table(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "train" / name).touch()
    write_table(tmp_path / "train" / "metadata.csv", [{"video": "a.mp4", "caption": "x"}])
    unused = Problem("not in train/metadata.csv", str(tmp_path / "train" / "b.mp4"))
    assert read(tmp_path).unused == (unused,)


def test_clips_beside_train_are_trained_on_with_their_captions(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a.mp4", "train/b.mp4"):
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text("x")
    write_table(tmp_path / "train" / "metadata.csv", [{"video": "b.mp4", "caption": "of the table"}])
    assert clips(tmp_path) == [("a.mp4", ("x",)), ("b.mp4", ("x",))]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_videos_inside_of_parquet_are_not_read(folder: Path) -> None:
    write_table(folder / "metadata.parquet", [{"video": {"bytes": b"x" * 1000, "path": "a.mp4"}, "caption": "x"}])
    (problem,) = problems(folder)
    assert problem.what == "there is no column 'video'"
    assert "columns of bytes are not read: save videos as files" in problem.cure


def write_columns(folder: Path, **columns: object) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"video": ["a.mp4", "b.mp4"], "caption": ["x", "y"], **columns}), folder / "metadata.parquet"
    )


@pytest.mark.parametrize(
    "kind, values",
    [
        ("timestamp[us]", [10**18, 0]),  # the year 33,658
        ("timestamp[s]", [10**15, 0]),
        ("timestamp[us, tz=Not/AZone]", [10, 0]),
        ("list<timestamp[us]>", [[10**18], []]),
    ],
)
@pytest.mark.parametrize("column", ["when", "caption"])
def test_a_column_that_python_cannot_hold_is_named_and_only_missed_where_it_is_used(
    folder: Path, kind: str, values: list, column: str
) -> None:
    import pyarrow

    of = {"s": pyarrow.timestamp("s"), "u": pyarrow.timestamp("us", tz="Not/AZone" if "tz" in kind else None)}
    unit = of[kind.removeprefix("list<").removeprefix("timestamp[")[0]]
    write_columns(folder, **{column: pyarrow.array(values, pyarrow.list_(unit) if "list" in kind else unit)})
    if column == "caption":
        (problem,) = problems(folder)
    else:
        assert clips(folder) == [("a.mp4", ("x",)), ("b.mp4", ("y",))]
        problem = next(each for each in read(folder).unused if "cannot be read" in each.what)
    assert problem.what.startswith(f"the column {column!r} cannot be read: ")
    assert problem.where == str(folder / "metadata.parquet")


def test_a_field_whose_name_says_binary_holds_no_bytes(folder: Path) -> None:
    write_columns(folder, labels=[{"binary_label": 1}, {"binary_label": 2}])
    assert [clip.columns for clip in read(folder).clips] == [
        {"labels": '{"binary_label": 1}'},
        {"labels": '{"binary_label": 2}'},
    ]


def test_identifiers_are_text(folder: Path) -> None:
    import pyarrow

    write_columns(folder, id=pyarrow.array([bytes(range(16)), None], pyarrow.uuid()))
    first, second = read(folder).clips
    assert first.columns == {"id": '"00010203-0405-0607-0809-0a0b0c0d0e0f"'}
    assert second.columns == {}


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "fixed", "list", "map", "dictionary"])
def test_columns_of_bytes_are_of_any_kind(folder: Path, kind: str) -> None:
    import pyarrow

    values = pyarrow.array([b"12", b"34"])
    columns = {
        "fixed": lambda: values.cast(pyarrow.binary(2)),
        "list": lambda: pyarrow.array([[b"12"], [b"34"]]),
        "map": lambda: pyarrow.array([[("k", b"1")], []], pyarrow.map_(pyarrow.string(), pyarrow.binary())),
        "dictionary": values.dictionary_encode,
    }
    film = columns[kind]() if kind in columns else values.cast(getattr(pyarrow, kind)())
    write_columns(folder, film=film, score=[1, 2], still=film)
    found = read(folder)
    assert [clip.columns for clip in found.clips] == [{"score": "1"}, {"score": "2"}]
    (named,) = [each for each in found.unused if "bytes" in each.what]
    assert named.what == "columns of bytes are not read: 'film', 'still'"
    assert named.where == str(folder / "metadata.parquet")


@pytest.mark.parametrize("column", ["caption", "n", "film"])
def test_a_column_that_is_there_twice_in_parquet(folder: Path, column: str) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"video": ["a.mp4"], "caption": ["x"], "n": [1], "film": [b"0"]}
    names = [*columns, column]
    table = pyarrow.Table.from_arrays([pyarrow.array(columns[name]) for name in names], names)
    parquet.write_table(table, folder / "metadata.parquet")
    (problem,) = problems(folder)
    assert problem.what == f"the column {column!r} is there twice"
    assert problem.where == str(folder / "metadata.parquet")


def test_a_file_that_is_no_parquet(folder: Path) -> None:
    (folder / "metadata.parquet").write_bytes(b"PAR1 and no more")
    (problem,) = problems(folder)
    assert problem.what.startswith("not valid Parquet: ")


def test_without_pyarrow_parquet_says_what_to_install(folder: Path) -> None:
    write_table(folder / "metadata.parquet", [{"video": "a.mp4", "caption": "x"}])
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from finetune.data.manifest import read_manifest\n"
        "from finetune.runtime.errors import UserError\n"
        "try: read_manifest(Path(sys.argv[1]), 'video', 'caption')\n"
        "except UserError as error: print(error)"
    )
    run = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert "pyarrow is not installed" in done.stdout
    assert 'pip install -e ".[parquet]"' in done.stdout
