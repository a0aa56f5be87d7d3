"""What is wrong with a path that is to be a file, before anything is read of it."""

import os
import stat
from pathlib import Path

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_fault(path: Path, kind: str = "video file") -> tuple[str, str] | None:
    """(what is wrong, cure) of a path that is no file which can be opened; None if it is one. Pipes and devices may block.

    Args:
        kind: what the file is to be, such as "image file" or "file".
    """
    if "\0" in str(path):
        return "the path has a NUL character", "mend the path"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.lexists(path):
            return "a link to a file that does not exist", "mend or remove the link"
        windows = "write / in place of \\ in paths" if "\\" in path.name else ""
        return f"no such {kind}", windows or "mend the path or remove the line"
    except (OSError, ValueError) as error:  # too long a name, no permission, a circle of links; lone surrogates
        return f"cannot be opened ({getattr(error, 'strerror', error)})", "mend the path, or its permissions"
    noun = kind.removesuffix(" file")
    if stat.S_ISDIR(mode):
        return f"this is a folder, not {'an' if noun[0] in 'aeiou' else 'a'} {noun}", "name a file in it"
    if not stat.S_ISREG(mode):
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        return f"this is {found}, not a regular file", f"copy the {noun} to a file"
    if not os.access(path, os.R_OK, effective_ids=True):
        return "cannot be read (permission denied)", "give yourself the right to read it: chmod u+r"
    return None
