"""A recipe in the making, and what became of each setting of its source."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["kept", "renamed", "changed", "default", "read", "dropped", "unknown"]


@dataclass(frozen=True)
class Note:
    """What became of one setting.

    Attributes:
        outcome: "kept" and "renamed" mean the same as before; "changed" means something else here, or has another value; "default"
            was not set, and the other trainer's default differs from a recipe's; "read" says how others are to be read; "dropped"
            has no place here; "unknown" is a name that the importer has never heard of.
        setting: as its source writes it, with its value.
        target: the key of a recipe with its value; "" if there is none.
        text: how, or why; "" if there is nothing to say.
    """

    outcome: Outcome
    setting: str
    target: str = ""
    text: str = ""

    def __str__(self) -> str:
        target = f" -> {self.target}" if self.target else ""
        return f"{self.outcome:8} {self.setting}{target}{': ' + self.text if self.text else ''}"


@dataclass
class Draft:
    """Values of a recipe as `table.key` -> value, and the notes on where they come from.

    Attributes:
        trainer: whose settings they were.
        gpus: the GPUs, as many as read the data apart from each other.
        clips: how many clips there are, if the user says so.
        todo: what the user has to look at before the recipe can be used.
    """

    trainer: str = ""
    gpus: int = 1
    clips: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, comment: str = "") -> str:
        """Set a key, perhaps with a comment behind its line; returns both as text."""
        self.values[key] = value
        if comment:
            self.comments[key] = comment
        return f"{key} = {shown(value)}"

    def move(self, setting: str, key: str, value: Any) -> None:
        """A setting that means the same here, under the same name or another."""
        name = setting.split("=")[0].split()[0].lstrip("-").rpartition(".")[2]
        outcome: Outcome = "kept" if name == key.rpartition(".")[2] else "renamed"
        self.notes.append(Note(outcome, setting, self.put(key, value)))

    def change(self, setting: str, key: str, value: Any, text: str, comment: str = "") -> None:
        """A setting that means something else here, or whose value had to be another."""
        self.notes.append(Note("changed", setting, self.put(key, value, comment), text))

    def default(self, setting: str, key: str, value: Any, text: str) -> None:
        """A setting that is not in the source, whose default there differs from a recipe's."""
        self.notes.append(Note("default", setting, self.put(key, value), text))

    def read(self, setting: str, text: str) -> None:
        """A setting that says how others are to be read, and has gone into their keys."""
        self.notes.append(Note("read", setting, text=text))

    def drop(self, setting: str, why: str) -> None:
        """A setting that no key of a recipe stands for."""
        self.notes.append(Note("dropped", setting, text=why))

    def unknown(self, setting: str) -> None:
        """A setting that this importer does not know."""
        self.notes.append(Note("unknown", setting, text=f"no setting of {self.trainer} that is known here; look it up"))

    def take_back(self, key: str, why: str) -> None:
        """A key that would have no effect beside the others; its setting is dropped."""
        if key in self.values:
            del self.values[key]
            self.notes = [
                Note("dropped", each.setting, text=why) if each.target.startswith(f"{key} =") else each
                for each in self.notes
            ]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key so far."""
        return self.values.get(key, default)

    @property
    def family(self) -> str:
        """The model family, once it is known."""
        return str(self.values.get("model.family", ""))

    @property
    def method(self) -> str:
        """How it is trained."""
        return str(self.values.get("train.method", "lora"))


def shown(value: Any) -> str:
    """A value as a recipe writes it, cut to what a line can show."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {shown(each)}" for key, each in value.items()) + "}"
    elif isinstance(value, Sequence):
        if value and isinstance(value[0], dict):
            return f"{len(value)} table{'s' if len(value) > 1 else ''}"
        text = "[" + ", ".join(shown(each) for each in value) + "]"
    else:
        text = f"{value:g}" if isinstance(value, float) and f"{value:g}" == str(value) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."
