"""A folder of videos and images, each with a caption beside it: surf.mp4 and surf.txt.

Besides .txt and .caption, which hold one caption, there are .captions.txt with a caption on each line, and .json.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from finetune.data.clip import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip
from finetune.data.formats.format import (
    Columns,
    DatasetFormat,
    Manifest,
    distinct_captions,
    name_order,
    normalised,
    read_text,
)
from finetune.data.formats.listing import is_media, list_files
from finetune.data.formats.rows import other_columns
from finetune.data.formats.text_columns import lists_files
from finetune.recipe.text import load_json
from finetune.runtime.errors import Problem, UserError

_SUFFIXES = frozenset({".txt", ".caption", ".json"})
_MANY = ".captions.txt"
_OF_A_BAD_CLIP = "the caption of a clip that cannot be used"
_LARGEST = 16 * 2**20  # bytes of a side-car
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
_ABOUT = frozenset(
    {"readme", "license", "licence", "copying", "notice", "changelog", "authors", "credits", "citation", "requirements"}
)


@dataclass
class _Found:
    clips: list[Clip] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)

    def leave_out(self, files: Sequence[Path], what: str, cure: str = "") -> None:
        self.unused += [Problem(what, str(file), cure) for file in files]


def _locate(path: Path, _: Columns) -> Path | None:
    return path if path.is_dir() else None


def _read(folder: Path, columns: Columns) -> Manifest:
    listing = list_files(folder, columns.leave_out)
    listed = sorted([*listing.files, *listing.bad], key=name_order)
    media: dict[Path, list[Path]] = defaultdict(list)
    for file in filter(is_media, listed):
        media[file.with_suffix("")].append(file)
    side_cars = _side_cars(listed, media)
    found = _Found(problems=listing.problems, unused=listing.unused)
    has_image_captions = any(stem in media and all(map(_is_image, media[stem])) for stem in side_cars)
    takes_images = has_image_captions or not any(file.suffix.lower() in VIDEO_SUFFIXES for file in listed)
    for stem, files in media.items():
        cars = side_cars.pop(stem, [])
        bad = [file for file in files if file in listing.bad]
        found.problems += [listing.bad[file] for file in bad]
        good = _videos_first([file for file in files if file not in bad], takes_images or bool(cars), found)
        if good:
            _add_clips(good, cars, listing.bad, columns, found)
        elif cars:
            found.leave_out(cars, _OF_A_BAD_CLIP)
    for stem, cars in side_cars.items():
        _add_orphans(stem, cars, media, found)
    others = (file for file in listed if not is_media(file) and file.suffix.lower() not in _SUFFIXES)
    found.unused += [_of_no_use(file, folder) for file in others]
    clips = sorted(found.clips, key=lambda clip: name_order(clip.path))
    return Manifest(tuple(clips), tuple(found.problems), tuple(found.unused), frozenset(found.files))


def _side_cars(listed: Sequence[Path], media: Mapping[Path, Sequence[Path]]) -> dict[Path, list[Path]]:
    """The side-cars by the path of their clip, less its suffix."""
    found: dict[Path, list[Path]] = defaultdict(list)
    for file in listed:
        if file.suffix.lower() in _SUFFIXES:
            stem = file.with_suffix("")
            if stem not in media and _has_many(file):
                stem = stem.with_suffix("")
            found[stem].append(file)
    # File systems and archives differ in how they write accents, so a name may be NFC here and NFD there.
    waiting = {normalised(str(stem)): stem for stem in media if stem not in found}
    for stem in [stem for stem in found if stem not in media]:
        if clip := waiting.pop(normalised(str(stem)), None):
            found[clip] = found.pop(stem)
    return found


def _has_many(file: Path) -> bool:
    return file.name.lower().endswith(_MANY)


def _videos_first(files: Sequence[Path], takes_images: bool, found: _Found) -> list[Path]:
    """The clips of one name. A video's image of the same name is its thumbnail, or a frame of it."""
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    images = [file for file in files if file not in videos]
    if videos:
        found.leave_out(images, "image with the name of a video", "give it another name and a caption to train on it")
    elif not takes_images:
        found.leave_out(images, "image without a caption, as all images here", "give it a caption to train on it")
    return videos or (images if takes_images else [])


def _add_clips(
    files: Sequence[Path], cars: Sequence[Path], bad: Mapping[Path, Problem], columns: Columns, found: _Found
) -> None:
    """Add the clip of a name, or what is wrong: no caption, several that differ, or several clips for one."""
    if len(files) > 1 and cars:
        names = ", ".join(file.name for file in [*files, *cars])
        what, cure = f"the caption may belong to each of {names}", "rename the others, each with its own caption"
        found.problems += [Problem(what, str(file), cure) for file in files]
        return
    texts: dict[tuple[str, ...], list[Path]] = {}
    others: dict[str, str] = {}
    problems = []
    for car in cars:
        try:
            if car in bad:
                raise UserError.of([bad[car]])
            captions, more = _content(car, files[0], columns)
        except UserError as error:
            problems += [Problem(p.what, f"{car} (of {files[0].name})", p.cure) for p in error.problems]
            continue
        if captions is None:
            found.leave_out([car], f"no {columns.caption!r} in it", "name it so, if it is the caption of a clip")
        else:
            texts.setdefault(captions, []).append(car)
            others |= more
    if problems:
        found.problems += problems
        found.leave_out([car for used in texts.values() for car in used], _OF_A_BAD_CLIP)
    elif not texts:
        what, cure = (
            f"{'image' if _is_image(files[0]) else 'video'} without a caption",
            _cure_of_none(files[0], cars, columns),
        )
        found.problems += [Problem(what, str(file), cure) for file in files]
    elif len(texts) > 1:
        names = " and ".join(car.name for each in texts.values() for car in each)
        what = f"{names} have different captions for it"
        found.problems.append(
            Problem(what, str(files[0]), f"keep one of them; a file {files[0].stem}{_MANY} may have several")
        )
    else:
        ((captions, used),) = texts.items()
        found.files |= {files[0], *used}
        found.clips.append(Clip(files[0], captions, " and ".join(car.name for car in used), others, files[0].parent))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _cure_of_none(file: Path, cars: Sequence[Path], columns: Columns) -> str:
    if cars:
        return f'write "{columns.caption}": "..." in {cars[0].name}, or {file.with_suffix(".txt").name} beside it'
    return f"write {file.with_suffix('.txt').name} beside it"


def _content(car: Path, clip: Path, columns: Columns) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """The captions of a side-car, None if it has none, and other columns. Raises UserError for captions that cannot be used."""
    text = read_text(car, _LARGEST)
    others: dict[str, str] = {}
    if car.suffix.lower() == ".json":
        written, others = _of_json(car, text, columns)
        if written is None:
            return None, {}
    elif _has_many(car) and normalised(car.stem) != normalised(clip.stem):  # not of a.captions.mp4
        written = [line for line in text.split("\n") if line.strip()] or [None]
    else:
        written = [" ".join(text.split())]
    return distinct_captions(written, str(car)), others


def _of_json(car: Path, text: str, columns: Columns) -> tuple[list | None, dict[str, str]]:
    try:
        content = load_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}, line {error.lineno}", "mend the line", str(car)) from None
    if isinstance(content, str):
        return [content], {}
    if not isinstance(content, dict):
        is_captions = isinstance(content, list) and content and all(isinstance(each, str) for each in content)
        return (content if is_captions else None), {}
    names = (columns.caption, f"{columns.caption}s")
    name = next((name for name in names if name in content), None)
    if name is None:
        return None, {}
    captions = content[name]
    return (captions or [None] if isinstance(captions, list) else [captions]), other_columns(content, names)


def _add_orphans(stem: Path, cars: Sequence[Path], media: Mapping[Path, Sequence[Path]], found: _Found) -> None:
    """Captions without a video, and texts that are no captions."""
    for car in cars:
        if stem.name.split(".")[0].lower() in _ABOUT:
            found.leave_out([car], "a text about the dataset")
        elif car.suffix.lower() == ".json":
            found.leave_out([car], "JSON without a clip of that name")
        else:
            cure = "add the video of the same name, or remove the text"
            if any(stem in files for files in media.values()):
                cure = f"name it {stem.with_suffix('').name}{car.suffix}"
            elif lists_files(car):
                cure = f'it lists videos: set data.video_column = "{car.stem}"'
            elif beside := [file.name for file in car.parent.glob(f"{escape(stem.name)}.*") if file not in cars]:
                cure = f"{beside[0]} beside it is of a kind that is not read: convert it to MP4, PNG or JPEG"
            found.problems.append(Problem("caption without a video", str(car), cure))


def _of_no_use(file: Path, folder: Path) -> Problem:
    suffix = file.suffix.lower()
    if suffix in _TABLES:
        cure = (
            f"to read it, name it metadata{suffix}"
            if file.parent == folder
            else f'to read it, set data.path = "{file}"'
        )
        return Problem("a table that is not read", str(file), cure)
    return Problem(f"unknown suffix {suffix}" if suffix else "no suffix", str(file))


FORMAT = DatasetFormat(_locate, _read)
