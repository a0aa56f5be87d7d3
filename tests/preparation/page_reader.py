"""Reads the page of `check --report` back with Python's own parser of HTML."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "input", "br", "link"}


@dataclass
class Card:
    bucket: str
    texts: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    name: str = ""


class Page(HTMLParser):
    """The cards of a page, all its attributes, and the text of everything that is no script or style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cards: list[Card] = []
        self.attributes: list[tuple[str, str, str]] = []  # (element, attribute, value)
        self.scripts = 0
        self.text = ""
        self.style = ""
        self.refused = ""
        self._open: list[tuple[str, dict[str, str]]] = []
        self._bucket = ""
        self.feed(text)
        assert self._open == [], "elements that nothing closes"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        self.scripts += tag == "script"
        if tag in ("rect", "th"):  # the former close themselves; the page leaves the end of headings out
            return
        if values.get("class") == "group":
            self._bucket = values["id"].removeprefix("b")
        if values.get("class") == "card":
            self.cards.append(Card(self._bucket))
        if self.card and tag == "img":
            (self.card.masks if values.get("class") == "mask" else self.card.pictures).append(values["src"])
        if self.card and "caption" in values.get("class", "").split():
            self.card.captions.append("")
        if self.card and tag == "li" and values.get("class") != "card":
            self.card.tags.append("")
        if tag not in VOID:
            self._open.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "th"):
            return
        assert self._open
        assert self._open.pop()[0] == tag

    @property
    def card(self) -> Card | None:
        return self.cards[-1] if self.cards and self._inside("card") else None

    def _inside(self, name: str) -> bool:
        return any(name in (tag, values.get("class"), values.get("id")) for tag, values in self._open)

    def handle_data(self, data: str) -> None:
        if self._inside("script") or self._inside("style"):
            self.style += data if self._inside("style") else ""
            return
        self.text += data
        if self._inside("refused"):
            self.refused += data
        if self.card is None:
            return
        if self._inside("h4"):
            self.card.name += data
        elif self._inside("caption"):
            self.card.captions[-1] += data
        elif self._inside("tags"):
            if self._open[-1][0] != "ul":
                self.card.tags[-1] += data
        elif data.strip():
            self.card.texts.append(data.strip())

    def by_name(self) -> dict[str, Card]:
        found = {card.name: card for card in self.cards}
        assert len(found) == len(self.cards)
        return found


def read_page(folder: Path) -> Page:
    return Page((folder / "dataset.html").read_text(encoding="utf-8"))
