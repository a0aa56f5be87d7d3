"""Write a recipe for your clips from one of those that come with this program."""

import argparse
import os
from difflib import get_close_matches
from pathlib import Path

from finetune.commands.common import folder_named
from finetune.recipe.load import TEMPLATES
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say, tell

EXAMPLES = """\
finetune new --list
finetune new ltx_lora mine.toml --data clips
finetune new wan_14b_lora mine.toml --data clips/table.csv --output runs/mine --model /models/Wan2.1-T2V-14B-Diffusers
"""

SCHEMA = "recipe.schema.json"
_NOT_FOR_USERS = "quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("template", nargs="?", help="one of --list")
    parser.add_argument("file", nargs="?", type=Path, help="the recipe to write, mine.toml say")
    parser.add_argument("--data", help="your clips: a folder, or a table of them")
    parser.add_argument("--output", help="folder of the run; runs/ and the recipe's name if not given")
    parser.add_argument(
        "--model", help="the base model, where it is not to be fetched from the Hub: a diffusers folder"
    )
    parser.add_argument("--list", action="store_true", help="list the recipes that there are")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if arguments.list:
        _list()
        return 0
    if arguments.template is None or arguments.file is None:
        raise UserError("name a template and the file to write", "finetune new ltx_lora mine.toml --data clips", "new")
    template = _template(arguments.template)
    file = folder_named(str(arguments.file))
    if file.is_dir():
        raise UserError("this is a folder", f"name a file in it: {file / 'mine.toml'}", str(file))
    if file.exists():
        raise UserError("this file is there already", "name another one, or remove it", str(file))
    text = written(template, file, arguments.data, arguments.output, arguments.model)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    missing = "" if arguments.data else " Set data.path in it, then:"
    say(f"wrote {file}.{missing}\n    finetune check {file}\n    finetune train {file}", is_result=True)
    return 0


def written(template: Path, file: Path, data: str | None, output: str | None, model: str | None) -> str:
    """A template's text for a recipe at `file`, with its comments and the way from there to the schema."""
    import tomlkit

    lines = template.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and lines[0].startswith("#:schema"):
        lines[0] = f"#:schema {_way_to_schema(template.parent.resolve(), file)}\n"
    recipe = tomlkit.parse("".join(lines))
    recipe["output"] = output or f"runs/{file.stem}"
    if data:
        recipe["data"]["path"] = data
    if model:
        recipe["model"]["path"] = model
    return tomlkit.dumps(recipe)


def names() -> list[str]:
    """The templates' names."""
    return sorted(path.stem for path in TEMPLATES.glob("*.toml") if path.stem != _NOT_FOR_USERS)


def _template(name: str) -> Path:
    if name in names():
        return TEMPLATES / f"{name}.toml"
    near = get_close_matches(name, names(), 3, 0.5)
    cure = f"did you mean {' or '.join(near)}?" if near else "finetune new --list names them"
    raise UserError(f"there is no template {name!r}", cure, "new")


def _way_to_schema(templates: Path, file: Path) -> str:
    """From the recipe's folder to the schema: relative where both are in one checkout, so that it may be moved as a whole."""
    schema, folder = templates / SCHEMA, file.absolute().parent
    is_beside = folder.resolve().is_relative_to(templates.parent)
    return os.path.relpath(schema, folder.resolve()) if is_beside else str(schema)


def _list() -> None:
    from finetune.recipe import load_recipe

    width = max(map(len, names()))
    for name in names():
        recipe = load_recipe(TEMPLATES / f"{name}.toml")
        shapes = ", ".join(map(str, recipe.data.buckets))
        tell(f"{name:<{width}}  {recipe.model.path}  {shapes}")
