"""Settings of a source by name: each is taken once, with its type, and whatever is left is named."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from finetune.importers.draft import Draft
from finetune.runtime.errors import UserError

T = TypeVar("T")
D = TypeVar("D")


class Settings:
    """Settings by name.

    Args:
        values: name -> value: strings of a command line, lists of them, True for a flag, or what TOML, JSON or YAML has.
        file: where they stand, for errors.
        prefix: what stands before a name: "--" for a command line, or "table." for a table.
        trainer: whose settings they are.
    """

    def __init__(self, values: Mapping[str, Any], file: str, trainer: str, prefix: str = "") -> None:
        self.values = dict(values)
        self.file, self.trainer, self.prefix = file, trainer, prefix
        self.taken: set[str] = set()
        self.said: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def spelled(self, name: str) -> str:
        """A setting as its source writes it, for the one line on it; what is secret is left out."""
        self.said.add(name)
        value = (
            "..." if re.search("token$|api_key|password|secret", name) and "id_token" not in name else self.values[name]
        )
        if self.prefix == "--":
            words = [] if value is True else value if isinstance(value, list) else [value]
            text = " ".join([f"--{name}", *(_short(word) for word in words)])
        else:
            text = f"{self.prefix}{name} = {_short(value)}"
        return text.replace("\n", " ")

    def take(self, name: str, kind: Callable[[Any], T], default: D) -> T | D:
        """A setting's value; `default` if it is not set, or set to nothing. Raises UserError if it is not of this kind."""
        self.taken.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        try:
            return kind(value)
        except (ValueError, TypeError, OverflowError):
            what = (
                f"{_short(value)} is no {kind.__doc__}"
                if value is not True
                else f"it has no value; it takes {kind.__doc__}"
            )
            cure = (
                "mend it there; a variable of the shell must be set in the script itself"
                if "$" in str(value)
                else "mend it there"
            )
            raise UserError(what, cure, f"{self.file}: {self.prefix}{name}") from None

    def table(self, name: str) -> "Settings":
        """A table in the settings; empty if there is none."""
        value = self.take(name, table, {})
        return Settings(value, self.file, self.trainer, f"{self.prefix}{name}.")

    def tables(self, name: str) -> list["Settings"]:
        """The tables in a list of them."""
        values = self.take(name, tables, [])
        return [
            Settings(
                value,
                self.file,
                self.trainer,
                f"{self.prefix}{name}[{number}]." if len(values) > 1 else f"{self.prefix}{name}.",
            )
            for number, value in enumerate(values)
        ]

    def move(self, draft: Draft, names: Mapping[str, tuple[str, Callable[[Any], Any]]]) -> None:
        """Take what means the same in a recipe: name -> (key, kind)."""
        for name, (key, kind) in names.items():
            if self.values.get(name) is not None and (value := self.take(name, kind, None)) is not None:
                draft.move(self.spelled(name), key, value)

    def drop(self, draft: Draft, reasons: Mapping[str, str]) -> None:
        """Name what has no place in a recipe, with the reason."""
        for name, why in reasons.items():
            if name in self.values and name not in self.said:
                self.taken.add(name)
                draft.drop(self.spelled(name), why)

    def name_the_rest(self, draft: Draft) -> None:
        """Name whatever has no line so far: what nobody has taken as unknown, and what made no difference."""
        lines = " ".join(note.setting for note in draft.notes)
        for name, value in self.values.items():
            if name not in self.taken:
                self.taken.add(name)
                draft.unknown(self.spelled(name))
            elif (
                name not in self.said
                and not isinstance(value, dict)
                and not re.search(rf"\b{re.escape(name)}\b", lines)
            ):
                draft.drop(self.spelled(name), "it makes no difference beside the other settings")


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


# The kinds of values. Their docstrings are parts of sentences: "x is no whole number".


def integer(value: Any) -> int:
    """whole number"""
    number_ = float(value) if not isinstance(value, bool) else float("nan")
    if number_ != int(number_):
        raise ValueError
    return int(number_)


def number(value: Any) -> float:
    """number"""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else float(value)


def text(value: Any) -> str:
    """text"""
    if isinstance(value, bool | list | dict):
        raise ValueError
    return str(value)


def flag(value: Any) -> bool:
    """true or false"""
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (word := str(value).lower()) not in known:
        raise ValueError
    return known[word]


def words(value: Any) -> list[str]:
    """list of words"""
    if isinstance(value, bool | dict):
        raise ValueError
    return [str(each) for each in value] if isinstance(value, list) else str(value).split()


def numbers(value: Any) -> list[float]:
    """list of numbers"""
    return [number(each) for each in (value if isinstance(value, list) else [value])]


def integers(value: Any) -> list[int]:
    """list of whole numbers"""
    return [integer(each) for each in (value if isinstance(value, list) else [value])]


def table(value: Any) -> dict[str, Any]:
    """table"""
    if not isinstance(value, dict):
        raise ValueError
    return value


def tables(value: Any) -> list[dict[str, Any]]:
    """list of tables"""
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise ValueError
    return values


def anything(value: Any) -> Any:
    """value"""
    return value


def from_arguments(arguments: Sequence[str], file: str, trainer: str) -> Settings:
    """The options of a command line, behind the script's name: `--name value ...` or `--name=value`; `-` in names is `_`."""
    values: dict[str, Any] = {}
    name = ""
    found: list[str] = []
    for word in [*arguments, "--"]:
        if word.startswith("--"):
            if name:
                values[name] = True if not found else found[0] if len(found) == 1 else list(found)
            elif found:
                values["(before the first option)"] = list(found)
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found = [value] if equals else []
        else:
            found.append(word)
    return Settings(values, file, trainer, "--")


def existing(path: str, beside: str) -> Path | None:
    """A file that a source names: from here, or from the folder of the source or one above it; None if it is not there."""
    written = Path(path).expanduser() if not path.startswith("~") or path.startswith("~/") else Path(path)
    places = [Path(), *Path(beside).resolve().parents] if not written.is_absolute() else [Path("/")]
    for place in places:
        try:
            if (place / written).is_file():
                return place / written
        except OSError:  # a name that is too long, or a folder that may not be read
            continue
    return None
