"""Datasets with captions and names that cannot be used, through `check` and through training on two processes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from trainings import rows

Finetune = Callable[..., CompletedProcess]

GOOD = 4


def side_cars(folder: Path, videos: list[Path]) -> list[str]:
    """Good clips in a linked folder, and bad captions and names beside it. Returns what must be said of them."""
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").mkdir()
    for number, video in enumerate(videos):
        shutil.copy(video, folder.parent / "elsewhere")
        if number % 2:
            shutil.copy(video.with_suffix(".txt"), folder.parent / "elsewhere")
        else:
            (folder.parent / "elsewhere" / video.name).with_suffix(".json").write_text('{"captions": ["one", "two"]}')
    captions = {
        "latin": b"caf\xe9",
        "half": b'{"caption": "\\ud800"}',
        "deep": b"[" * 100_000,
        "blank": b"\xe2\x80\x8b",
    }
    for name, text in captions.items():
        shutil.copy(videos[0], folder / f"{name}.mp4")
        (folder / f"{name}{'.json' if name in ('half', 'deep') else '.txt'}").write_bytes(text)
    for name in (b"caf\xe9", b"\x1b[2Jclear"):
        for video in (videos[0], videos[0].with_suffix(".txt")):
            shutil.copy(video, os.path.join(os.fsencode(folder), name + os.fsencode(video.suffix)))
    (folder / "\x1b[2Jclear.txt").write_text("")
    os.mkfifo(folder / "fifo.mp4")
    (folder / "broken.mp4").symlink_to("nowhere")
    (folder / ".Trash-1000").mkdir()
    shutil.copy(videos[0], folder / ".Trash-1000")
    return [
        "latin.txt (of latin.mp4): the caption is not UTF-8 text (byte 0xe9)",
        "half.json (of half.mp4): the caption has half a character (\\ud800)",
        "deep.json (of deep.mp4): not valid JSON: nested too deeply, line 1",
        "blank.txt (of blank.mp4): the caption is empty",
        "caf\\xe9.mp4: the name is not UTF-8 text (byte 0xe9)",
        "\\x1b[2Jclear.txt (of \\x1b[2Jclear.mp4): the caption is empty",
        "fifo.mp4: this is a FIFO, not a regular file",
        "broken.mp4: a link to a file that does not exist",
    ]


def table(folder: Path, videos: list[Path]) -> list[str]:
    """A JSONL file with good rows between bad ones. Returns what must be said of them."""
    good = [{"file_name": video.name, "caption": ["one", "two"], "n": 1} for video in videos]
    for video in videos:
        shutil.copy(video, folder)
    bad: list[dict | str] = [
        {"file_name": "x" * 5000 + ".mp4", "caption": "x"},
        {"file_name": "~nosuchuser/x.mp4", "caption": "x"},
        {"file_name": "a\0.mp4", "caption": "x"},
        {"file_name": videos[0].name, "caption": 7, "n": 1},
        {"file_name": videos[0].name, "caption": "x", "n": 2},
        "[" * 100_000,
    ]
    lines = [*good, *bad]
    (folder / "metadata.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return [
        f"{'x' * 5000}.mp4 (from metadata.jsonl, line 5): cannot be opened (File name too long)",
        "metadata.jsonl, line 6: there is no user 'nosuchuser'",
        "a\\x00.mp4 (from metadata.jsonl, line 7): the path has a NUL character",
        f"metadata.jsonl, line 8 ({videos[0].name}): the column 'caption' is not text: 7",
        f"metadata.jsonl, line 9 ({videos[0].name}): metadata.jsonl, line 1 has the same video with another 'n'",
        "metadata.jsonl, line 10: not valid JSON: nested too deeply",
    ]


@pytest.mark.parametrize("write", [side_cars, pytest.param(table, marks=pytest.mark.full)])
def test_bad_captions_and_names_are_refused_by_name_or_skipped(
    finetune: Finetune, clips: Path, small_recipe: Callable[[Path], Path], tmp_path: Path, write: Callable
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    told = write(folder, sorted(clips.glob("*.mp4"))[:GOOD])
    recipe = small_recipe(tmp_path)
    settings = [part for each in (f"data.path={folder}", "train.steps=1") for part in ("--set", each)]

    refused = finetune("check", "--recipe", recipe, *settings)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert f"error: {len(told)} problems:" in refused.stderr
    assert [each for each in told if f"{each}\n    -> " not in refused.stderr] == []
    assert "\x1b" not in refused.stderr

    trained = finetune("--recipe", recipe, *settings, "--set", "data.bad_clips=skip", processes=2)
    assert trained.returncode == 0, trained.stderr
    assert "\x1b" not in trained.stderr
    assert [each for each in told if trained.stderr.count(each) != 1] == []
    assert len(rows(tmp_path / "run")) == 1
    assert f"{folder}: {GOOD} clips" in trained.stderr
