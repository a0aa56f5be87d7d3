"""Reads text files and JSON that people write. Imports no torch."""

import json
from pathlib import Path
from typing import Any

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_utf8(path: Path) -> str:
    """A file's text with "\\n" between lines, without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8 text; names the byte and its line.
    """
    data = path.read_bytes()
    if data.startswith(_UTF16):
        raise ValueError("not UTF-8 text (it is UTF-16)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_json(text: str) -> Any:
    """What a JSON text says. Raises JSONDecodeError, also if it is nested too deeply or has numbers too long for Python."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None
