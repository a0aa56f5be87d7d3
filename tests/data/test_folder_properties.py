"""Any folder: every file is used or named once, in an order that does not depend on when the files were written."""

import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.manifest import Manifest, read_manifest
from finetune.runtime.errors import UserError

STEMS = [
    "a",
    "a",
    "b",
    "é",
    "e\u0301",
    "a.captions",
    "video",
    "videos",
    "prompts",
    "metadata",
    "README",
    "._a",
    "\x1b",
    "caf\udce9",
]
SUFFIXES = [".mp4", ".webm", ".png", ".txt", ".TXT", ".caption", ".json", ".csv", ".jsonl", ".tsv", ".db", ""]
FOLDERS = ["", "", "", "sub/", "sub/deep/", ".hidden/", "train/", "test/", "é-folder/", "e\u0301-folder/"]
PAIRS = {"a.mp4": b"", "a.txt": b"x", "é-folder/é.mp4": b"", "é-folder/é.txt": b"y"}
CONTENTS = [
    *(b"", b"x", b"y\nz", b"caf\xe9", b'{"caption": "x"}', b'["x", "y"]', b'{"caption": 3}', b"{", b"\xff\xfex\0"),
    *(b"a.mp4\nb.mp4", b"a.mp4", b"video,caption\na.mp4,x\n", b'{"video": "a.mp4", "caption": ["x"]}'),
    *(b"file_name\tcaption\na.mp4\tx\tz\nb.webm\ty\n", b'"', b"video,caption\n\xc3\xa9.mp4,x\na.mp4,\n"),
]
some = st.dictionaries(
    st.tuples(st.sampled_from(FOLDERS), st.sampled_from(STEMS), st.sampled_from(SUFFIXES)).map("".join),
    st.sampled_from(CONTENTS),
    max_size=12,
)
files = st.one_of(some, some.map(lambda found: PAIRS | found))


def write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> Manifest | list[str]:
    """The manifest, or what makes the whole dataset unusable."""
    try:
        return read_manifest(folder, "video", "caption")
    except UserError as error:
        return [problem.what for problem in error.problems]


def is_told(path: Path, manifest: Manifest) -> bool:
    """Whether a file is used, or a problem or reason names it, a hidden folder of it, or the file it belongs to."""
    if path in manifest.files or any(path == clip.path for clip in manifest.clips):
        return True
    entries = [*manifest.problems, *manifest.unused]
    if any(each.where == str(path) or path.is_relative_to(each.where) for each in entries):
        return True
    return any(path.name in f"{each.where} {each.what}" for each in manifest.problems)


@settings(max_examples=100, deadline=None)
@given(files, st.randoms(use_true_random=False))
def test_every_file_is_used_or_named(contents: dict[str, bytes], random) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        write(Path(one), contents)
        found = read(Path(one))
        shuffled = random.sample(list(contents.items()), len(contents))
        write(Path(two), dict(shuffled))
        again = read(Path(two))
        if not isinstance(found, Manifest) or not isinstance(again, Manifest):
            assert found == again
            return
        assert [(c.path.relative_to(one), c.captions) for c in found.clips] == [
            (c.path.relative_to(two), c.captions) for c in again.clips
        ]
        paths = [Path(parent) / name for parent, _, names in os.walk(one) for name in names]
        assert [path for path in paths if not is_told(path, found)] == []
        assert all(problem.cure for problem in found.problems)
        wheres = [each.where for each in (*found.problems, *found.unused)]
        assert len(set(wheres)) == len(wheres)
        assert not any(str(clip.path) in wheres for clip in found.clips)
        assert all(str(problem).encode() for problem in (*found.problems, *found.unused))
