"""The commands and programs of a document's code blocks, and the marks by which a document says that one is not run here."""

import re
from dataclasses import dataclass
from pathlib import Path

# What a reader sees at the end of a command's comment, in parentheses: `pip install -e .    # (installs)`.
MARKS = frozenset(
    {"installs", "downloads", "uploads", "needs a GPU", "needs a cluster", "needs an account", "takes minutes"}
)
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"`(?:python -m )?finetune ([a-z][^`]*)`")
_IN_PARENTHESES = re.compile(r"\(([^()]*)\)$")


@dataclass(frozen=True)
class Code:
    """A command of a bash block, or a whole python block.

    Attributes:
        comment: what stands behind the command, or in the block's first line.
    """

    language: str
    text: str
    comment: str
    line: int

    @property
    def is_marked(self) -> bool:
        """Whether the document says that it is not run here."""
        found = _IN_PARENTHESES.search(self.comment)
        return bool(found) and set(found[1].split(", ")) <= MARKS


def code_of(document: Path) -> list[Code]:
    """The commands and programs of a document, from top to bottom."""
    text = document.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        first = text[: block.start(3)].count("\n") + 1
        if block[2] == "python":
            comment = block[3].partition("\n")[0]
            found.append(Code("python", block[3], comment if comment.startswith("#") else "", first))
        elif block[2] in ("bash", "sh", "shell", "console"):
            found += [Code("bash", *_parted(line), first + place) for place, line in _joined(block[3])]
    return found


def named_in_text(document: Path) -> list[list[str]]:
    """The words of each command of the program that a document's sentences name, after `finetune`."""
    text = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    return [each.split() for each in _NAMED.findall(text)]


def _joined(block: str) -> list[tuple[int, str]]:
    """Lines of a shell, with those that a backslash continues; each with its place."""
    found: list[tuple[int, str]] = []
    goes_on = False
    for place, line in enumerate(block.splitlines()):
        if goes_on:
            found[-1] = (found[-1][0], found[-1][1].removesuffix("\\").rstrip() + " " + line.strip())
        elif line.strip() and not line.lstrip().startswith("#"):
            found.append((place, line.strip()))
        goes_on = line.endswith("\\")
    return found


def _parted(line: str) -> tuple[str, str]:
    """A command and its comment: what follows the first # that has a space before it and is in no quotes."""
    quote = ""
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#" and line[:place].endswith(" "):
            return line[:place].rstrip(), line[place + 1 :].strip()
    return line, ""
