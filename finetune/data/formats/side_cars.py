"""A folder of videos, each with a caption beside it: surf.mp4 and surf.txt."""

from pathlib import Path

from finetune.data.clip import VIDEO_SUFFIXES, Clip
from finetune.data.formats.format import Columns, DatasetFormat, read_text
from finetune.runtime.errors import Problem, UserError


def _locate(path: Path, _: Columns) -> Path | None:
    return path if path.is_dir() else None


def _read(folder: Path, _: Columns) -> list[Clip]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    problems = []
    clips = []
    for video in videos:
        caption = captions.pop(video.with_suffix(""), None)
        if caption is None:
            problems.append(
                Problem("video without a caption", str(video), f"write {video.with_suffix('.txt').name} beside it")
            )
            continue
        text = " ".join(read_text(caption).split())
        if text:
            clips.append(Clip(video, text, caption.name))
        else:
            problems.append(Problem("the caption is empty", str(caption), "write what the video shows"))
    for caption in captions.values():
        problems.append(
            Problem("caption without a video", str(caption), "add the video of the same name, or remove the text")
        )
    if problems:
        raise UserError.of(problems, f"{folder}: {len(problems)} of its files have no partner:")
    return clips


FORMAT = DatasetFormat(_locate, _read)
