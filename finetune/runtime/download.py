"""Downloads from the Hub, shown: what, how large and where to, and then how far they are. What is cached is not spoken of."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.runtime.logging import is_main, say
from finetune.runtime.progress import Polled, ProgressLine, in_hours
from finetune.runtime.units import counted, in_decimal_words

_SECONDS_TO_ASK = 10.0  # for the list of a repository's files


class _Missing(NamedTuple):
    """What of a repository is not in the Hub's cache: how many files, their bytes, and the repository's folder in the cache."""

    files: int
    size: int
    folder: Path


def snapshot(repository: str, revision: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    """The folder of a repository in the Hub's cache, with the files of some patterns. Raises what the Hub's client raises."""
    from huggingface_hub import snapshot_download

    with _shown(repository, revision, wanted, unwanted):
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
        )
    return Path(found)


def one_file(repository: str, file: str) -> Path:
    """A file of a repository in the Hub's cache. Raises what the Hub's client raises."""
    from huggingface_hub import hf_hub_download

    with _shown(repository, "main", [file], []):
        return Path(hf_hub_download(repository, file))


@contextlib.contextmanager
def _shown(repository: str, revision: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Iterator[None]:
    """Show the download inside the block, on rank 0, if there is anything to download."""
    missing = _missing(repository, revision, wanted, unwanted) if is_main() else None
    if missing is None or not missing.files:
        yield
        return
    size = in_decimal_words(missing.size)
    say(f"downloading {repository}: {counted(missing.files, 'file')}, {size}, to {missing.folder}")
    before, start = _bytes_in(missing.folder, with_begun=False), time.monotonic()  # what was begun before goes on
    line = ProgressLine("downloading", max(missing.size, 1), amount=in_decimal_words, patience=1.0)

    def text() -> str:
        return f"{in_decimal_words(int(line.done / max(time.monotonic() - start, 1e-3)))}/s"

    with Polled(line, lambda: _bytes_in(missing.folder) - before, text):
        yield
    say(f"downloaded {size} in {in_hours(time.monotonic() - start)}")


def _missing(repository: str, revision: str, wanted: Sequence[str], unwanted: Sequence[str]) -> _Missing | None:
    """What the Hub has of some patterns, and its cache has not; None if the Hub does not say, or may not be asked."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_SECONDS_TO_ASK)
    except Exception:  # the download itself meets the same, and explains it
        return None
    files = {each.rfilename: each.size or 0 for each in info.siblings or []}
    needed = filter_repo_objects(files, allow_patterns=list(wanted), ignore_patterns=list(unwanted) or None)
    absent = [
        name for name in needed if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)
    ]
    folder = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repository, repo_type="model")
    return _Missing(len(absent), sum(files[name] for name in absent), folder)


def _bytes_in(folder: Path, with_begun: bool = True) -> int:
    """Bytes of the contents that a repository has in the cache, and of those that are still coming in."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder / "blobs"):
            if entry.name.endswith(".incomplete") and not with_begun:
                continue
            with contextlib.suppress(OSError):
                found = entry.stat()
                total += min(
                    found.st_size, 512 * found.st_blocks
                )  # a file may have its whole length before its contents
    return total
