"""Folders as people have them: links, hidden files, foreign files. Each file is used, or named with the reason."""

import os
import re
import socket
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune.data.clip import MEDIA_SUFFIXES
from finetune.data.manifest import Manifest, describe_unused, read_manifest
from finetune.runtime.errors import UserError


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(path: Path, video: str = "video", caption: str = "caption") -> Manifest:
    return read_manifest(path, video, caption)


def used(folder: Path) -> list[str]:
    """The clips' paths; there are no problems."""
    manifest = read(folder)
    assert manifest.problems == ()
    return [str(clip.path.relative_to(folder)) for clip in manifest.clips]


def reasons(folder: Path) -> dict[str, str]:
    """Why files are not used, by their paths."""
    return {os.path.relpath(each.where, folder): each.what for each in read(folder).unused}


def wrong(folder: Path) -> dict[str, tuple[str, str]]:
    """(what is wrong, cure) by path."""
    return {os.path.relpath(p.where, folder): (p.what, p.cure) for p in read(folder).problems}


PAIR = {"a.mp4": "", "a.txt": "x"}


@pytest.mark.parametrize(
    "name",
    [
        *(".Trash-1000/files/b.mp4", ".ipynb_checkpoints/b.mp4", "__MACOSX/b.mp4", "@eaDir/b.mp4", "sub/.hidden/b.mp4"),
        *("._a.mp4", "._a.txt", ".DS_Store", "Thumbs.db", "desktop.ini", ".b.txt"),
    ],
)
def test_what_is_hidden_or_of_the_system_is_neither_trained_on_nor_in_the_way(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, {**PAIR, name: "x"})
    assert used(folder) == ["a.mp4"]
    ((where, why),) = reasons(folder).items()
    assert Path(name).is_relative_to(where)
    assert why == "hidden, or written by the system"


def test_a_dataset_may_lie_in_a_hidden_folder(tmp_path: Path) -> None:
    assert used(write(tmp_path / ".cache" / "clips", PAIR)) == ["a.mp4"]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {**PAIR, "real/b.mp4": "", "real/b.txt": "x"})
    elsewhere = write(tmp_path / "elsewhere", {"c.mp4": "", "c.txt": "x", "deep/d.mp4": "", "deep/d.txt": "x"})
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")  # is read before linked/deep, as it comes first
    (folder / "alias").symlink_to("real")
    (elsewhere / "back").symlink_to(folder)
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to("..")
    assert used(folder) == ["a.mp4", "again/d.mp4", "linked/c.mp4", "real/b.mp4"]
    another, circle = "a folder that is read under another path", "a link to a folder that it lies in"
    assert reasons(folder) == {
        **{"alias": another, "linked/deep": another, "linked/back": circle},
        **{"loop": circle, "up": circle},
    }


def test_a_link_to_a_file_is_a_clip_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, "b.txt": "y"})
    (folder / "b.mp4").symlink_to("a.mp4")
    assert used(folder) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("suffix", [".wmv", ".flv", ".m2ts", ".mts", ".3gp", ".ogv", ".mxf", ".vob", ".MOV"])
def test_suffixes_of_videos(tmp_path: Path, suffix: str) -> None:
    assert used(write(tmp_path, {f"a{suffix}": "", "a.txt": "x"})) == [f"a{suffix}"]


def test_files_of_no_use_are_named_with_the_reason(tmp_path: Path) -> None:
    names = [
        "README.txt",
        "readme.md",
        "license.txt",
        "clips.zip",
        "Makefile",
        "other.csv",
        "sub/metadata.csv",
        "b.json",
    ]
    folder = write(tmp_path, {**PAIR, **dict.fromkeys(names, "x")})
    assert used(folder) == ["a.mp4"]
    text, table = "a text about the dataset", "a table that is not read"
    assert reasons(folder) == {
        **{
            "README.txt": text,
            "readme.md": "unknown suffix .md",
            "license.txt": text,
            "clips.zip": "unknown suffix .zip",
        },
        **{
            "Makefile": "no suffix",
            "other.csv": table,
            "sub/metadata.csv": table,
            "b.json": "JSON without a clip of that name",
        },
    }
    cures = {Path(each.where).name: each.cure for each in read(folder).unused}
    assert cures["other.csv"] == "to read it, name it metadata.csv"
    assert cures["metadata.csv"] == f'to read it, set data.path = "{folder}/sub/metadata.csv"'


def test_the_summary_counts_by_reason(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, **{f"{n}.zip": "" for n in range(9)}, "sub/.x": ""})
    assert describe_unused(read(folder).unused, folder) == [
        f"{folder}: not used: 0.zip, 1.zip, 2.zip and 6 more: unknown suffix .zip",
        f"{folder}: not used: sub/.x: hidden, or written by the system",
    ]


def test_the_summary_stays_short(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, **{f"x.{n}": "" for n in range(500)}, **{f"{n}.csv": "" for n in range(500)}})
    lines = describe_unused(read(folder).unused, folder)
    assert len(lines) == 11
    assert lines[-1] == f"{folder}: not used: 491 more, for 491 other reasons"


# --- which caption is whose -------------------------------------------------------------------------------------------


def test_video_txt_beside_video_mp4_is_its_caption(tmp_path: Path) -> None:
    folder = write(tmp_path, {"video.mp4": "", "video.txt": "a video\n", "b.mp4": "", "b.txt": "x"})
    assert [(clip.path.name, clip.caption) for clip in read(folder).clips] == [("b.mp4", "x"), ("video.mp4", "a video")]


def test_a_column_file_is_one_that_lists_files(tmp_path: Path) -> None:
    folder = write(tmp_path, {"video.mp4": "", "video.txt": "video.mp4\n", "prompts.txt": "from the column\n"})
    assert [(clip.path.name, clip.caption) for clip in read(folder).clips] == [("video.mp4", "from the column")]


@pytest.mark.parametrize("video, caption", [("videos.txt", "prompts.txt"), ("videos", "prompts"), ("video", "caption")])
def test_names_of_column_files_may_be_written_with_their_suffix(tmp_path: Path, video: str, caption: str) -> None:
    folder = write(tmp_path, {"v/a.mp4": "", "videos.txt": "v/a.mp4\n", "prompts.txt": "x\n"})
    assert [clip.caption for clip in read(folder, video, caption).clips] == ["x"]


def test_a_list_of_videos_by_another_name_is_not_to_be_deleted(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, "clips.txt": "a.mp4\n"})
    assert wrong(folder)["clips.txt"] == ("caption without a video", 'it lists videos: set data.video_column = "clips"')


def test_two_videos_of_one_name_need_a_caption_each(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.mp4": "", "a.webm": "", "a.txt": "x", "b.mp4": "", "b.txt": "y"})
    what = "the caption may belong to each of a.mp4, a.webm, a.txt"
    cure = "rename the others, each with its own caption"
    assert wrong(folder) == {"a.mp4": (what, cure), "a.webm": (what, cure)}
    assert [clip.path.name for clip in read(folder).clips] == ["b.mp4"]


def test_a_caption_with_the_videos_whole_name(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.mp4": "", "a.mp4.txt": "x"})
    assert wrong(folder)["a.mp4.txt"] == ("caption without a video", "name it a.txt")


@pytest.mark.parametrize("video, caption", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_match_in_any_unicode_form(tmp_path: Path, video: str, caption: str) -> None:
    name = "Café/über"
    clip, text = unicodedata.normalize(video, name), unicodedata.normalize(caption, name)
    parent = clip.split("/")[0]
    write(tmp_path / "side", {f"{clip}.mp4": "", f"{parent}/{text.split('/')[1]}.txt": "x"})
    assert used(tmp_path / "side") == [f"{clip}.mp4"]
    write(tmp_path / "table", {f"{clip}.mp4": "", "metadata.csv": f"video,caption\n{text}.mp4,x\n"})
    assert used(tmp_path / "table") == [f"{clip}.mp4"]
    assert reasons(tmp_path / "table") == {}


def test_the_order_is_the_same_in_any_unicode_form(tmp_path: Path) -> None:
    names = ["zebra", "über", "uz", "ua", "éa", "e", "f"]
    orders = []
    for form in ("NFC", "NFD"):
        files = {f"{unicodedata.normalize(form, name)}{suffix}": "x" for name in names for suffix in (".mp4", ".txt")}
        orders.append([unicodedata.normalize("NFC", name) for name in used(write(tmp_path / form, files))])
    assert orders[0] == orders[1] == sorted(f"{name}.mp4" for name in names)


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_with_captions_are_clips(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPEG", "c.png", "d.webp", "e.avif", "f.mp4"]
    folder = write(tmp_path, dict.fromkeys(names, "") | {f"{name[0]}.txt": name for name in names})
    clips = read(folder).clips
    assert [(clip.path.name, clip.caption, clip.is_image) for clip in clips] == [(n, n, n != "f.mp4") for n in names]


def test_an_image_of_a_videos_name_is_its_thumbnail(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, "a.jpg": ""})
    assert used(folder) == ["a.mp4"]
    assert reasons(folder) == {"a.jpg": "image with the name of a video"}
    write(folder, {"a.k.mp4": "", "a.k.txt": "y", "cover.png": ""})
    assert used(folder) == [
        "a.k.mp4",
        "a.mp4",
    ]  # in the order of the videos' names, and without a caption for the cover


def test_images_without_a_caption_are_missed_only_where_images_have_captions(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, "cover.jpg": ""})
    assert used(folder) == ["a.mp4"]
    assert reasons(folder) == {"cover.jpg": "image without a caption, as all images here"}
    write(folder, {"b.png": "", "b.txt": "x"})
    assert wrong(folder) == {"cover.jpg": ("image without a caption", "write cover.txt beside it")}
    assert set(wrong(write(tmp_path / "images", {"c.png": ""}))) == {"c.png"}


# --- files that are none ----------------------------------------------------------------------------------------------


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {**PAIR, "folder.mp4/b.mp4": "", "folder.mp4/b.txt": "x"})
    os.mkfifo(folder / "fifo.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "broken.mp4").symlink_to("nowhere")
    (folder / "circle.mp4").symlink_to("circle.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s.mp4"))
    (folder / "fifo.txt").write_text("x")
    os.mkfifo(folder / "a.fifo")
    assert {name: what for name, (what, _) in wrong(folder).items()} == {
        "fifo.mp4": "this is a FIFO, not a regular file",
        "device.mp4": "this is a device, not a regular file",
        "broken.mp4": "a link to a file that does not exist",
        "circle.mp4": "cannot be opened (Too many levels of symbolic links)",
        "s.mp4": "this is a socket, not a regular file",
    }
    assert [clip.path.name for clip in read(folder).clips] == ["a.mp4", "b.mp4"]
    assert reasons(folder) == {
        "fifo.txt": "the caption of a clip that cannot be used",
        "a.fifo": "unknown suffix .fifo",
    }


def test_a_caption_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(write(tmp_path, {"a.mp4": ""}) / "a.txt")
    ((where, (what, _)),) = wrong(tmp_path).items()
    assert (where, what) == ("a.txt (of a.mp4)", "this is a FIFO, not a regular file")


@pytest.fixture
def nobody():
    """A folder that everybody may enter, and a user who is not root."""
    if os.geteuid():
        yield Path(tempfile.mkdtemp())
        return
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_named_and_the_rest_is_used(nobody: Path) -> None:
    root = os.getuid() == 0
    if root:
        os.seteuid(0)
    names = ["a", "video", "text", "closed/c", "listed/d"]
    folder = write(nobody, {f"{name}{suffix}": "x" for name in names for suffix in (".mp4", ".txt")})
    for name, mode in {"video.mp4": 0, "text.txt": 0, "closed": 0, "listed": 0o744}.items():
        (folder / name).chmod(mode)
    if root:
        os.seteuid(65534)
    found = {name: what for name, (what, _) in wrong(folder).items()}
    assert [clip.path.name for clip in read(folder).clips] == ["a.mp4"]
    assert found["closed"] == "the folder cannot be read (Permission denied)"
    assert found["text.txt (of text.mp4)"] == "cannot be read (Permission denied)"
    assert found["video.mp4 (from video.txt)"] == "cannot be read (permission denied)"
    if root:
        os.seteuid(0)
    folder.chmod(0o700)
    (folder / "listed").chmod(0o755)
    if root:
        os.seteuid(65534)
        with pytest.raises(UserError, match="Permission denied"):
            read(folder)


# --- everything at once -----------------------------------------------------------------------------------------------


def one_of_everything(folder: Path) -> Path:
    names = [
        "a.mp4",
        "a.txt",
        "sub/b.webm",
        "sub/b.caption",
        "c.mov",
        "c.json",
        "d.mkv",
        "d.captions.txt",
        "e.png",
        "e.txt",
    ]
    names += ["bare.mp4", "alone.txt", "empty.mp4", "twins.mp4", "twins.webm", "twins.txt", "bare.jpg", "lone.png"]
    names += [".DS_Store", "._a.mp4", ".git/objects/pack.mp4", "__MACOSX/a.mp4", "Thumbs.db", "README.txt", "LICENSE"]
    names += [
        "notes.md",
        "sound.wav",
        "other.csv",
        "sub/metadata.jsonl",
        "a.info.json",
        "two.mp4",
        "two.txt",
        "two.caption",
    ]
    names += [
        "latin.mp4",
        "caf\udce9.mp4",
        "caf\udce9.txt",
        "x\x1b[31m.mp4",
        "x\x1b[31m.txt",
        "line\nfeed.mp4",
        "line\nfeed.txt",
    ]
    write(folder, {os.fsencode(name).decode(errors="surrogateescape"): f"caption of {name!a}" for name in names})
    write(folder, {"c.json": '{"caption": "x", "score": 3}', "empty.txt": " \n", "latin.txt": b"caf\xe9"})
    os.mkfifo(folder / "fifo.mp4")
    os.mkfifo(folder / "fifo.txt")
    (folder / "broken.mp4").symlink_to("nowhere")
    (folder / "linked").symlink_to("sub")
    return folder


@pytest.mark.parametrize("kind", ["side-cars", "table", "text columns", "splits"])
def test_every_file_is_used_or_named(tmp_path: Path, kind: str) -> None:
    folder = one_of_everything(tmp_path)
    if kind == "table":
        write(folder, {"metadata.csv": "video,caption,mask\na.mp4,x,c.mov\nsub/b.webm,,\nmissing.mp4,x,\n"})
    elif kind == "text columns":
        write(folder, {"videos.txt": "a.mp4\nsub/b.webm\n", "prompts.txt": "x\ny\n"})
    elif kind == "splits":
        clips = [each for each in folder.iterdir() if each.suffix in MEDIA_SUFFIXES or each.name in ("sub", "linked")]
        (folder / "test").mkdir()
        for each in clips:
            each.rename(folder / "test" / each.name)
        write(folder, {"train/t.mp4": "", "train/metadata.csv": "video,caption\nt.mp4,x\n", "train/left.mp4": ""})
    manifest = read(folder)
    assert manifest.clips
    assert manifest.problems or kind in ("text columns", "splits")
    entries = [*manifest.problems, *manifest.unused]
    assert len({each.where for each in entries}) == len(entries), "a file is named twice"
    told = [f"{each.where} {each.what}" for each in entries]
    for clip in manifest.clips:
        told += [f"{clip.path} ", *(str(clip.path.parent / name) for name in clip.where.split(" and "))]
        told += [str(clip.file(column)) for column in clip.columns if column == "mask"]
    told += [str(folder / name) for name in ("metadata.csv", "videos.txt", "prompts.txt", "train/metadata.csv")]
    words = " ".join(told)
    hidden = [folder / ".git", folder / "__MACOSX", folder / "linked", folder / "test" / "linked"]
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    for path in paths:
        parent = next((each for each in hidden if path.is_relative_to(each)), None)
        partner = re.search(
            rf"(?<![^\s(]){re.escape(path.name)}(?![^\s),])", words
        )  # named with the file it belongs to
        assert str(parent or path) in words or partner, path


@pytest.mark.parametrize("kind", ["side-cars", "table", "splits"])
def test_folders_that_a_run_writes_into_are_no_part_of_the_dataset(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    write(data, {"run/samples/step_1/00.mp4": "", "run/samples/step_1/sheet.png": "", "cache/x.mp4": ""})
    (data / "latest").symlink_to("run/samples")
    if kind == "side-cars":
        write(data, {"a.mp4": "", "a.txt": "x"})
    else:
        folder = "train/" if kind == "splits" else ""
        write(data, {f"{folder}a.mp4": "", f"{folder}metadata.csv": "video,caption\na.mp4,x\n"})
    found = read_manifest(data, "video", "caption", leave_out=[data / "run", data / "cache", data / "later"])
    assert [clip.captions for clip in found.clips] == [("x",)]
    assert found.problems == ()
    own = {problem.where for problem in found.unused if problem.what == "written by the run itself"}
    assert own == {str(data / name) for name in ("run", "cache", "latest")}
    assert len(found.unused) == 3


def test_other_runs_in_a_dataset_s_folder_are_no_part_of_it(tmp_path: Path) -> None:
    """Of one expert or two; not so a folder that has a recipe and no run, nor a run whose own folder is the dataset."""
    clip = {"00.mp4": "", "00.txt": "x"}
    for run, left in (
        ("old", "checkpoints/step_00000010/trainer.json"),
        ("begun", "starts/after_step_00000000.toml"),
        ("both", "high/starts/after_step_00000000.toml"),
    ):
        write(tmp_path / run, {"recipe.toml": "", left: "", **{f"samples/{name}": text for name, text in clip.items()}})
    write(tmp_path, {"a.mp4": "", "a.txt": "x", "more/recipe.toml": "", "more/b.mp4": "", "more/b.txt": "y"})
    assert used(tmp_path) == ["a.mp4", "more/b.mp4"]
    runs = dict.fromkeys(("begun", "both", "old"), "written by another run")
    assert {where: why for where, why in reasons(tmp_path).items() if where in runs} == runs
    assert used(tmp_path / "old") == ["samples/00.mp4"]


def test_a_dataset_in_a_run_s_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"run/clips/a.mp4": "", "run/clips/a.txt": "x", "run/clips/samples/b.mp4": ""})
    run = tmp_path / "run"
    found = read_manifest(run / "clips", "video", "caption", leave_out=[run, run / "clips", run / "clips" / "samples"])
    assert [clip.path for clip in found.clips] == [run / "clips" / "a.mp4"]
    assert [problem.where for problem in found.unused] == [str(run / "clips" / "samples")]
