"""How the code is laid out. Which room may import which is held by lint-imports."""

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

from processes import ROOT

import finetune

PACKAGE = ROOT / "finetune"
LONGEST = 400  # lines


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_no_file_is_longer_than_its_subject_needs() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert len(lines) > 50
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


def test_a_class_name_is_one_class() -> None:
    places = defaultdict(list)
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 50
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_nothing_but_the_command_line_lies_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


def test_every_room_has_its_floor_in_the_import_contract() -> None:
    """A room that the contract does not name may import anything."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (floors,) = [contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers"]
    named = {re.sub(r"^finetune\.", "", name) for floor in floors for name in floor.split(" | ")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == rooms | {"__main__", "cli"}


def test_the_newest_release_of_the_changelog_is_the_one_version_number() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "finetune.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == finetune.__version__
