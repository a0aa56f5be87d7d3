"""Paths as people write them. Imports no torch."""

from pathlib import Path


class NoSuchHome(ValueError):
    """A path begins with the home folder of nobody; what is wrong, and what to write instead."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}: {cure}")
        self.what, self.cure = what, cure


def expanded(written: str) -> Path:
    """A path with the home folder in place of "~" or "~user". Raises NoSuchHome."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        user = written.split("/")[0]
        what = f"there is no user {user[1:]!r}" if user[1:] else "there is no home folder"
        raise NoSuchHome(what, f"write the folder in place of {user}") from None


def looked_in(path: Path) -> str:
    """For an error about a path that is not there: in which folder a relative one was looked for. Empty for an absolute one."""
    return "" if path.is_absolute() else f" (looked for in {Path.cwd()}, where the command was started)"
