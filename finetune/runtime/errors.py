"""Errors that a user can fix: what is wrong, where, and what to do instead. Imports no torch."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

_MOST_PRINTED = 50  # entries of one error
_MOST_ALIKE = 8  # more problems of one kind are printed as one entry, with the places of so many
_OF_ONE_CLIP = re.compile(r"\S*/\S*|\d+(\.\d+)?")
"""Paths and numbers, which do not make it another kind of problem."""
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, what reverses the direction of text, and lone surrogates."""


def harmless(text: str) -> str:
    """Text as it may be printed on a terminal: escape codes and bytes that are not UTF-8 are spelled out, like \\x1b."""
    return _HARMFUL.sub(_spelled, text)


def one_line(name: str) -> str:
    """A file's name as a line may show it: line feeds in it are spelled out."""
    return name.replace("\n", "\\n")


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is a file, line, key or clip; `cure` is what to do instead."""

    what: str
    where: str = ""
    cure: str = ""

    def __str__(self) -> str:
        where = one_line(self.where)
        head = f"{where}: {self.what}" if where else self.what
        return harmless(f"{head}\n    -> {self.cure}" if self.cure else head)


class UserError(Exception):
    """An error that the user can fix. It is printed without a traceback and ends the run with exit status 2."""

    def __init__(self, what: str, cure: str = "", where: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, cure),)
        self.is_short = False
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Sequence[Problem], title: str = "") -> Self:
        """Combine several problems into one error, so that the user sees all of them at once.

        Many of one kind are one entry of its text, which counts them and names the first. Of very many entries it has the first 50,
        and says how many problems the others are. `problems` has each, and `is_short` is whether the text has not.
        """
        error = cls("")
        error.problems = tuple(problems)
        entries = _entries(problems)
        lines = [_text(entry) for entry in entries[:_MOST_PRINTED]]
        if rest := sum(map(len, entries[_MOST_PRINTED:])):
            lines.append(f"and {rest} more")
        error.is_short = bool(rest) or any(len(entry) > _MOST_ALIKE for entry in entries)
        if len(problems) > 1:
            lines.insert(0, harmless(title) or f"{len(problems)} problems:")
        error.args = ("\n".join(lines),)
        return error


def _entries(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems, those of one kind together if they are many and each in a place of its own; else each by itself."""
    kinds: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[_OF_ONE_CLIP.sub("", problem.what), _OF_ONE_CLIP.sub("", problem.cure)].append(problem)
    entries: list[list[Problem]] = []
    for alike in kinds.values():
        is_one = len(alike) > _MOST_ALIKE and all(problem.where for problem in alike)
        entries += [alike] if is_one else [[problem] for problem in alike]
    return entries


def _text(alike: Sequence[Problem]) -> str:
    """A problem as text, or many of one kind, which are counted."""
    first = alike[0]
    if len(alike) == 1:
        return str(first)
    folders = {problem.where.rpartition("/")[0] for problem in alike}
    folder = os.path.commonpath(folders) if all(each.startswith("/") for each in folders) or len(folders) == 1 else ""
    names = ", ".join(
        one_line(problem.where.removeprefix(f"{folder}/" if folder else "")) for problem in alike[:_MOST_ALIKE]
    )
    there = f"in {one_line(folder)}: " if folder else ""
    which = "" if all((problem.what, problem.cure) == (first.what, first.cure) for problem in alike) else "the first: "
    places = f"{there}{names} and {len(alike) - _MOST_ALIKE} more"
    return str(Problem(f"{which}{first.what} ({places})", f"{len(alike)} times", first.cure))


class Unreadable(UserError):
    """The system could not read a file, which says nothing about its content: an I/O error, no memory, too many open files."""


class LostPeer(UserError):
    """Another process of the run ended or stopped answering; what is on disk stays valid.

    `is_main_lost`: whether rank 0 is one of them, which otherwise says what happens.
    """

    def __init__(self, what: str, cure: str = "", where: str = "", is_main_lost: bool = False) -> None:
        super().__init__(what, cure, where)
        self.is_main_lost = is_main_lost
