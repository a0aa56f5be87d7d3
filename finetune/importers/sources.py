"""Reads the files that are to be imported: scripts, TOML, JSON and YAML."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from finetune.importers.draft import Draft
from finetune.importers.shell import Script, read_script
from finetune.recipe.text import decoded, load_json, read_utf8
from finetune.runtime.errors import UserError

_LARGEST = 4_000_000  # bytes; settings are some thousands


@dataclass
class SettingsFile:
    """A file to import.

    Attributes:
        file: its path, for messages.
        data: what TOML, JSON or YAML says; None for a script.
        script: what a script would start; None for other files.
        is_used: whether an importer has read it.
    """

    file: str
    data: Any = None
    script: Script | None = None
    is_used: bool = False


@dataclass
class Command:
    """A command of a script that starts a trainer: the launcher's words before the trainer's name, and the options behind it."""

    source: SettingsFile
    launcher: list[str]
    name: str
    arguments: list[str] = field(default_factory=list)


def read_source(path: str) -> SettingsFile:
    """Read a file, "-" for the standard input. Raises UserError that names it if it cannot be read."""
    try:
        text = decoded(sys.stdin.buffer.read(_LARGEST)) if path == "-" else _text(Path(path))
    except FileNotFoundError:
        raise UserError("no such file", "give the script or the config file of the other trainer", path) from None
    except IsADirectoryError:
        raise UserError("this is a folder", "give the files in it that have the settings", path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot be read ({reason})", "give a script, or a TOML, JSON or YAML file", path) from None
    if not text.strip():
        raise UserError("the file is empty", "give the script or the config file of the other trainer", path)
    return parse(path, text)


def _text(path: Path) -> str:
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.stat().st_size / 1e6:.0f} MB, which is no file of settings")
    return read_utf8(path)


def parse(path: str, text: str) -> SettingsFile:
    """A text as a source, by the ending of its name, or by how it begins. Raises UserError if it is not valid."""
    if "\0" in text:
        raise UserError("it is no text", "give a script, or a TOML, JSON or YAML file", path)
    kinds: dict[str, tuple[str, Callable[[str], Any]]] = {
        ".toml": ("TOML", tomli.loads),
        ".json": ("JSON", load_json),
        ".yaml": ("YAML", _yaml),
        ".yml": ("YAML", _yaml),
    }
    ending = Path(path).suffix.lower()
    if path == "-" and text.lstrip().startswith(("{", "[{", "[\n")):
        ending = ".json"
    if ending not in kinds:
        return SettingsFile(path, script=read_script(text))
    name, reader = kinds[ending]
    try:
        return SettingsFile(path, reader(text))
    except (ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise UserError(f"not valid {name}: {first}", "mend the file", path) from None


def _yaml(text: str) -> Any:
    import yaml  # of the Hub's client; only this kind of file needs it

    class Plain(yaml.SafeLoader):
        """Reads 1e-4 as a number, as YAML 1.2 does."""

    Plain.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader=Plain)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def commands(sources: Sequence[SettingsFile], script: str, needs: str = "") -> list[Command]:
    """Commands that start a script whose name fits a pattern, and have an option that begins with `needs`."""
    found = []
    for source in sources:
        for words in source.script.commands if source.script else []:
            if words[0] in ("echo", "printf", "cat"):
                continue
            for position, word in enumerate(words):
                if re.fullmatch(script, word.rpartition("/")[2]) and (
                    not needs or any(each.startswith(needs) for each in words[position:])
                ):
                    found.append(Command(source, words[:position], word, words[position + 1 :]))
                    break
    return found


def one_command(draft: Draft, found: Sequence[Command]) -> Command:
    """The command to import; says if there are others, and what of the script only running it would tell."""
    command = found[0]
    others = [each for each in found[1:] if each.arguments != command.arguments]
    if others:
        draft.todo.append(f"{command.source.file} starts {len(others) + 1} trainings; the first was taken")
    script = command.source.script
    if script is not None:
        text = " ".join(command.arguments)
        for words in script.commands:
            if words[0].startswith("--"):
                draft.todo.append(
                    f'a line begins with {words[0]}, and the one before it does not end with "\\": bash leaves it out, as here'
                )
        for name, values in script.loops.items():
            draft.todo.append(
                f"the script's loop gives ${name} {len(values)} values ({', '.join(values[:4])}); the first was taken"
            )
        for unknown in script.open:
            if unknown in text:
                draft.todo.append(
                    f"only running the script would tell what {unknown} is: it stands in the recipe as it is"
                )
    command.source.is_used = True
    return command


def beside(sources: Sequence[SettingsFile], path: str, origin: str) -> SettingsFile | None:
    """A file that another one names: one of those given, or one that lies there; None if it is not to be had.

    Raises:
        UserError: it is there, but cannot be read.
    """
    from finetune.importers.settings import existing

    name = path.rpartition("/")[2]
    for source in sources:
        if source.file.rpartition("/")[2] == name and source.data is not None:
            source.is_used = True
            return source
    if found := existing(path, origin):
        source = read_source(str(found))
        source.is_used = True
        return source
    return None
