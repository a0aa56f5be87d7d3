"""Errors that a user can fix: what is wrong, where, and what to do instead. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is a file, line, key or clip; `cure` is what to do instead."""

    what: str
    where: str = ""
    cure: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    -> {self.cure}" if self.cure else head


class UserError(Exception):
    """An error that the user can fix. It is printed without a traceback and ends the run with exit status 2."""

    def __init__(self, what: str, cure: str = "", where: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, cure),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Sequence[Problem], title: str = "") -> "UserError":
        """Combine several problems into one error, so that the user sees all of them at once."""
        error = cls("")
        error.problems = tuple(problems)
        lines = [str(problem) for problem in problems]
        if len(problems) > 1:
            lines.insert(0, title or f"{len(problems)} problems:")
        error.args = ("\n".join(lines),)
        return error


class LostPeer(UserError):
    """Another process of the run ended or stopped answering; what is on disk stays valid.

    `is_main_lost`: whether rank 0 is one of them, which otherwise says what happens.
    """

    def __init__(self, what: str, cure: str = "", where: str = "", is_main_lost: bool = False) -> None:
        super().__init__(what, cure, where)
        self.is_main_lost = is_main_lost
