"""Read a recipe: every problem at once, each with its line, and the nearest key that exists."""

import difflib
import re
import types
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli
import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from finetune.recipe.schema import Recipe, free_keys
from finetune.recipe.table import tables_of
from finetune.recipe.text import read_utf8
from finetune.runtime.errors import Problem, UserError

RECIPE_FILE = "recipe.toml"  # in a run's folder: the effective recipe
Key = tuple[str | int, ...]
_BRANCHES = ("bool", "float", "int", "str")  # what pydantic calls branches of a union, besides what is no key's name


TEMPLATES = Path(__file__).parents[1] / "templates"  # the recipes that come with the package


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a TOML file.
        overrides: `table.key=value` texts, as given to --set; the value is read as the type the schema asks for.
    Raises:
        UserError: names file, line and key of every problem.
    """
    path = Path(path)
    try:
        text = read_utf8(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.5)
        cure = f"did you mean {path.parent / near[0]}?" if near else "give --recipe the path of a .toml file"
        if (TEMPLATES / f"{path.name.removesuffix('.toml')}.toml").is_file():
            cure = f"that is a template: finetune new {path.stem if path.suffix == '.toml' else path.name} mine.toml"
        raise UserError("no such recipe", cure, str(path)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as a recipe ({error})", "give --recipe a TOML text file", str(path)) from None
    try:
        values = tomli.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError, numbers of too many digits, arrays nested too deeply
        raise UserError(f"not valid TOML: {error}", "mend the line; strings need quotes", str(path)) from None

    lines = _key_lines(text)
    origin: dict[Key, str] = {}
    problems: list[Problem] = []
    for override in overrides:
        problems += _apply_override(values, override, origin)
    problems += _validate(values, str(path), lines, origin)
    if problems:
        raise UserError.of(problems, f"{path}: {len(problems)} problems")
    return Recipe.model_validate(values)


def write_recipe(recipe: Recipe, path: Path, heading: str = "The effective recipe of this run.") -> None:
    """Write the effective recipe, with every default spelled out, as TOML that `load_recipe` reads back."""
    path.write_text(f"# {heading}\n\n" + tomli_w.dumps(recipe_values(recipe)), encoding="utf-8")


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values; unset keys are left out (TOML has no null)."""
    return recipe.model_dump(mode="json", exclude_none=True)


def flat_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's plain values as `table.key` -> value."""
    return dict(_flatten(recipe_values(recipe)))


def changes(ours: Recipe, other: Recipe) -> list[str]:
    """Every key whose value differs, as text with both values."""
    return [text for _, text in _changes(flat_values(ours), flat_values(other))]


def differences(ours: Recipe, other: Recipe) -> list[str]:
    """The changes that would make it another training, and so must not happen when a run is resumed."""
    left, right = fixed_values(ours), fixed_values(other)
    if not (ours.data.buckets and other.data.buckets):  # one has yet to find them: `data.area` says as much
        left["data.buckets"] = right["data.buckets"] = None
    return [text for _, text in _changes(left, right)]


def fixed_values(recipe: Recipe) -> dict[str, Any]:
    """What makes it this training, as `table.key` -> value: the plain values that may not change when a run is resumed."""
    free = free_keys(type(recipe))

    def is_free(key: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in free)

    return {key: _fixed(key, value, free) for key, value in flat_values(recipe).items() if not is_free(key)}


def _fixed(key: str, value: Any, free: Collection[str]) -> Any:
    """A value without what may change in it: the free keys of the tables in a list."""
    if not isinstance(value, list):
        return value
    fixed = lambda table: {name: inner for name, inner in table.items() if f"{key}.{name}" not in free}  # noqa: E731
    return [fixed(each) if isinstance(each, dict) else each for each in value]


def _changes(left: dict[str, Any], right: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys whose values differ, of recipes as `table.key` -> value, and text with both values."""
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            yield key, f"{key} = {right.get(key, 'unset')!r} there, {left.get(key, 'unset')!r} here"


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _validate(values: dict, file: str, lines: dict[Key, int], origin: dict[Key, str]) -> list[Problem]:
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return [_problem(detail, values, file, lines, origin) for detail in _merge_unions(error.errors())]
    return []


def _merge_unions(errors: list) -> list:
    """One report for each key: pydantic reports every branch of a union by itself, told apart by a last element."""
    merged: dict[Key, Any] = {}
    for detail in errors:
        key = detail["loc"]
        if detail["type"] != "extra_forbidden":  # there the last element is what the user wrote
            key = tuple(part for part in key if _is_key_part(part))
        if key in merged and merged[key]["type"] != "extra_forbidden":
            merged[key] = {**merged[key], "msg": f"{merged[key]['msg']}, or: {detail['msg']}"}
        else:
            merged[key] = {**detail, "loc": key}
    return list(merged.values())


def _is_key_part(part: str | int) -> bool:
    return isinstance(part, int) or (re.fullmatch(r"[a-z_][a-z0-9_]*", part) is not None and part not in _BRANCHES)


def _problem(detail: Any, values: dict, file: str, lines: dict[Key, int], origin: dict[Key, str]) -> Problem:
    key: Key = detail["loc"]
    dotted = _dotted(key)
    where = _override_of(key, origin) or _at_line(file, key, lines)
    if detail["type"] == "extra_forbidden":
        return Problem(f"unknown key {dotted!r}", where, _suggest(key, values))
    if detail["type"] == "missing":
        table = ".".join(part for part in key[:-1] if isinstance(part, str))
        what = f"missing key {dotted!r}" if table else f"missing table [{dotted}]"
        cure = (
            f"add `{key[-1]} = ...` to its table [{table}]: {_description(key, values)}"
            if table
            else f"add it: {_description(key, values)}"
        )
        return Problem(what, where, cure)
    message = re.sub(r"^(Value error, |Input )", "", detail["msg"]).replace("Input should", "should")
    plain = {
        "is_instance_of": "should be a path, in quotes",
        "model_type": "should be a table",
        "bool_parsing": "should be true or false",
        "bool_type": "should be true or false",
    }
    message = plain.get(detail["type"], message)
    value = detail["input"]
    shown = f"{dotted} = {value!r}" if not isinstance(value, dict) else dotted
    return Problem(f"{shown}: {message}", where, _description(key, values))


def _override_of(key: Key, origin: dict[Key, str]) -> str | None:
    """The --set that wrote a key, the list it is an element of, or something inside it."""
    return next((where for written, where in origin.items() if written[: len(key)] == key[: len(written)]), None)


def _at_line(file: str, key: Key, lines: dict[Key, int]) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in lines:
            return f"{file}, line {lines[key[:length]]}"
    return file


def _dotted(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def _suggest(key: Key, values: dict) -> str:
    """The kind of table that has the key; or the key of that name in another table, else the nearest key of the same table, else
    the nearest anywhere.
    """
    name, tables = str(key[-1]), _tables(key[:-1], values)
    siblings = list(tables[0].model_fields) if tables else []
    if kinds := [repr(kind) for table in tables[1:] if name in table.model_fields for kind in _names(table)]:
        return f"it is a key of {_dotted(key[:-1])}.name = {' or '.join(kinds)}: set that, or remove the key"
    everywhere: dict[str, str] = {}
    for dotted, _ in _all_keys():
        everywhere.setdefault(dotted.rsplit(".", 1)[-1], dotted)
    if name in everywhere:
        return f"did you mean {everywhere[name]!r}?"
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {_dotted((*key[:-1], near[0]))!r}?"
    near = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.7)
    if near:
        return f"did you mean {everywhere[near[0]]!r}?"
    return f"keys here are: {', '.join(siblings)}" if siblings else "remove it"


def _all_keys(table: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in table.model_fields.items():
        yield prefix + name, field
        for nested in tables_of(field):
            yield from _all_keys(nested, f"{prefix}{name}.")


def _tables(key: Key, values: dict) -> list[type[BaseModel]]:
    """The table classes that a key leads to, the one that reads its values first; list indices are passed through."""
    tables: list[type[BaseModel]] = [Recipe]
    written: Any = values
    for part in key:
        written = _inside(written, part)
        if isinstance(part, str):
            field = _field(tables, part)
            tables = tables_of(field, written) if field else []
    return tables


def _inside(values: Any, part: str | int) -> Any:
    """An element of a table or a list; None if there is none."""
    if isinstance(values, dict):
        return values.get(part)
    return values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None


def _field(tables: Sequence[type[BaseModel]], name: str | int) -> FieldInfo | None:
    """A key of the first of the tables that has it."""
    return next((table.model_fields[name] for table in tables if name in table.model_fields), None)


def _names(table: type[BaseModel]) -> tuple[str, ...]:
    """What `name` a kind of table is read by."""
    return get_args(table.model_fields["name"].annotation)


def _description(key: Key, values: dict) -> str:
    while isinstance(key[-1], int):
        key = key[:-1]
    field = _field(_tables(key[:-1], values), key[-1])
    return (field.description or "") if field else ""


def _apply_override(values: dict, override: str, origin: dict[Key, str]) -> list[Problem]:
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    key: Key = tuple(name.strip().split("."))
    if not equals or not all(key):
        return [Problem("not an override", where, "write --set table.key=value")]
    table, known = values, _field(_tables(key[:-1], values), key[-1])
    for part in key[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return [Problem(f"{part!r} is no table", where, "write --set table.key=value")]
    origin[key] = where
    if text.strip() == "none" and known is not None and known.default is None:
        table.pop(key[-1], None)  # TOML has no null: unset is absent
    else:
        table[key[-1]] = _typed(text.strip(), known.annotation if known else Any)
    return []


def _typed(text: str, annotation: Any) -> Any:
    """`text` as a string where the schema wants one, as a TOML value elsewhere."""
    if _wants(annotation, list) and not text.startswith(("[", '"')):
        if any(isinstance(part, type) and issubclass(part, BaseModel) for part in get_args(annotation)):
            return text  # a string that stands for a list of tables
        try:
            value = tomli.loads(f"value = [{text}]")["value"]
        except tomli.TOMLDecodeError:
            return [part.strip() for part in text.split(",")]
        return value[0] if text.startswith("{") and len(value) == 1 else value  # a table in a list's place
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text
    kinds = (int, float) if type(value) is int else (type(value),)  # a float may be written without a point
    if not isinstance(value, str | list) and _wants(annotation, str) and not any(_wants(annotation, k) for k in kinds):
        return text
    return value


def _wants(annotation: Any, kind: type) -> bool:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _wants(get_args(annotation)[0], kind)
    if origin in (Union, types.UnionType):
        return any(_wants(argument, kind) for argument in get_args(annotation))
    if origin is Literal:
        return any(isinstance(argument, kind) for argument in get_args(annotation))
    if kind is str:
        return annotation is str or (isinstance(annotation, type) and issubclass(annotation, Path))
    return (origin or annotation) is kind


def _key_lines(text: str) -> dict[Key, int]:
    """Line number of every table and key of a valid TOML text, for messages."""
    lines: dict[Key, int] = {}
    table: Key = ()
    counts: dict[Key, int] = {}
    inside = ""  # the delimiter that closes a multi-line string
    for number, line in enumerate(text.splitlines(), start=1):
        if inside:
            inside = "" if inside in line else inside
            continue
        if match := re.match(r"\s*\[\[\s*([^\]]+?)\s*\]\]", line):
            name = _split(match[1])
            counts[name] = counts.get(name, -1) + 1
            table = (*name, counts[name])
            lines[table] = number
        elif match := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line):
            table = _split(match[1])
            lines[table] = number
        elif match := re.match(r"""\s*([\w.\-"']+)\s*=""", line):
            key = (*table, *_split(match[1]))
            lines.setdefault(key, number)
            for mark in ('"""', "'''"):
                if line.count(mark) == 1:
                    inside = mark
    return lines


def _split(dotted: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
