"""Text in pictures: wrapped to a width, and each character from a font that has it."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

from PIL import ImageDraw

from finetune.runtime.errors import harmless
from finetune.tracking.drawing import TEXT, fonts

_NO_GLYPH = "\U0010fffe"  # which no font has
MISSING = "□"  # stands for a character that no font of this machine has


def line_height(size: int) -> int:
    """Pixels from one line to the next, of letters of `size` pixels."""
    return round(1.35 * size)


def wrapped(text: str, width: int, size: int, most: int = 3) -> list[str]:
    """A text in lines of at most `width` pixels, broken at spaces, beside Chinese, Japanese and Korean letters, and inside words
    that are too long. Of more than `most` lines the last ends in an ellipsis.
    """
    lines, line = [], ""
    for token in _tokens(" ".join(harmless(text).split())):
        if text_width((line + token).rstrip(), size) <= width:
            line += token
            continue
        if line.strip():
            lines.append(line.strip())
        line = token.lstrip()
        while line and text_width(line.rstrip(), size) > width and len(lines) <= most:
            fits = next(
                count for count in range(len(line), 0, -1) if count == 1 or text_width(line[:count], size) <= width
            )
            lines.append(line[:fits])
            line = line[fits:]
        if len(lines) > most:
            break
    if line.strip():
        lines.append(line.strip())
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and text_width(f"{last}…", size) > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last.rstrip()}…"]


def draw_text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str = TEXT) -> None:
    """Draw one line of text with its upper left corner at a place; its letters stand on one base line."""
    x, y = at
    for font, run in _runs(text, size):
        draw.text((x, y + size), run, fill=colour, font=font, anchor="ls")
        x += font.getlength(run)


def text_width(text: str, size: int) -> float:
    """The width of a line in pixels."""
    return sum(font.getlength(run) for font, run in _runs(text, size))


def _runs(text: str, size: int) -> Iterator[tuple[Any, str]]:
    """Pieces of a text, each with the font that has all of it."""
    places = [(_font_of(character, size), character) for character in text]
    for place, run in groupby(places, key=lambda each: each[0]):
        letters = "".join(character for _, character in run)
        if place is None:
            yield _of_missing(size), MISSING * len(letters)
        else:
            yield fonts(size)[place], letters


@lru_cache(maxsize=20_000)
def _font_of(character: str, size: int) -> int | None:
    """Which of the fonts has a character; None if none has."""
    if character == " ":
        return 0
    for place, font in enumerate(fonts(size)):
        if bytes(font.getmask(character)) != _without(place, size):
            return place
    return None


@lru_cache
def _without(place: int, size: int) -> bytes:
    """What a font draws of a character that it does not have."""
    return bytes(fonts(size)[place].getmask(_NO_GLYPH))


def _of_missing(size: int) -> Any:
    place = _font_of(MISSING, size)
    return fonts(size)[0 if place is None else place]


def _tokens(text: str) -> Iterator[str]:
    """The pieces between which a line may end: words with the space behind them, and single letters of scripts without spaces."""
    word = ""
    for character in text:
        if _stands_alone(character):
            if word:
                yield word
            word = ""
            yield character
        elif character == " ":
            yield f"{word} "
            word = ""
        else:
            word += character
    if word:
        yield word


def _stands_alone(character: str) -> bool:
    return (
        "\u2e80" <= character <= "\u9fff"
        or "\uac00" <= character <= "\ud7af"
        or "\U00020000" <= character <= "\U0003ffff"
    )
