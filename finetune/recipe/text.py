"""Reads text files and JSON that people write. Imports no torch."""

import json
import re
from pathlib import Path
from typing import Any

_KEYS = re.compile(r'"(?:[^"\\]|\\.)*"(?P<is_key>\s*:)?|[{}]', re.DOTALL)  # strings and braces of a valid JSON text
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_utf8(path: Path) -> str:
    """A file's text with "\\n" between lines, without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8 text; names the byte and its line.
    """
    try:
        return decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line})") from None
    except ValueError as error:
        raise ValueError(f"not UTF-8 text ({error})") from None


def decoded(data: bytes, errors: str = "strict") -> str:
    """Bytes of UTF-8 as text with "\\n" between lines, without a byte order mark.

    Args:
        errors: what becomes of other bytes, as `bytes.decode` has it.
    Raises:
        ValueError: it is UTF-16; or UnicodeDecodeError with "strict".
    """
    if data.startswith(_UTF16):
        raise ValueError("it is UTF-16")
    return data.decode("utf-8-sig", errors).replace("\r\n", "\n").replace("\r", "\n")


def load_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        JSONDecodeError: it is not valid, is nested too deeply, has numbers too long for Python, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _RepeatedKey:
        key, position = _repeated_key(text)
        raise json.JSONDecodeError(f"the key {key!r} is there twice", text, position) from None
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None


class _RepeatedKey(Exception):
    """An object has a key twice; which one, `_repeated_key` finds."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKey
    return found


def _repeated_key(text: str) -> tuple[str, int]:
    """The first key that an object of a JSON text has twice, and where it is the second time. The text must have one."""
    objects: list[set[str]] = []
    for match in _KEYS.finditer(text):
        if match[0] == "{":
            objects.append(set())
        elif match[0] == "}":
            objects.pop()
        elif match["is_key"]:
            key = json.loads(match[0].removesuffix(match["is_key"]))
            if key in objects[-1]:
                return key, match.start()
            objects[-1].add(key)
    raise AssertionError("no key is repeated")
