"""What the tables of a recipe are made of: a strict base class, keys that may change on resume, tables of several kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

FREE_ON_RESUME = "free on resume"


class Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # TOML has both, and no key has a use for them
    )


def Free(default: Any, **constraints: Any) -> Any:
    """A key that may change when a run is resumed; arguments as of pydantic's `Field`."""
    return Field(default, json_schema_extra={FREE_ON_RESUME: True}, **constraints)


@dataclass(frozen=True, eq=False)
class ByName:
    """Marks a table of which there are several kinds: its key `name` says which class reads it.

    A kind has the keys that it reads, and no others: a key of another kind is an unknown key. Kinds may be added to the
    dictionary at any time. Write `Annotated[SerializeAsAny[Base], ByName(kinds, "default")]`.

    Attributes:
        kinds: name -> class, a subclass of the annotated one with `name: Literal[...]`. A class may have several names.
        default: the name of a table that has none.
    """

    kinds: dict[str, type[Table]]
    default: str

    def kind(self, values: Any) -> type[Table]:
        """The class that reads a table; the default's where the name is unknown."""
        name = values.get("name") if isinstance(values, dict) else None
        return self.kinds.get(name if isinstance(name, str) else self.default, self.kinds[self.default])

    @property
    def classes(self) -> list[type[Table]]:
        """Every kind once."""
        return list(dict.fromkeys(self.kinds.values()))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # Not "oneOf": a table without a name would fit several.
        return {"anyOf": [handler(kind.__pydantic_core_schema__) for kind in self.classes]}

    def _read(self, value: Any, validate: Callable[[Any], Any]) -> Any:
        if not isinstance(value, dict):
            return validate(value)  # a table that was read already; all else is refused as for any table
        name = value.get("name", self.default)
        if not isinstance(name, str) or name not in self.kinds:
            *names, last = map(repr, self.kinds)
            expected = f"{', '.join(names)} or {last}" if names else last
            detail = InitErrorDetails(type="literal_error", loc=("name",), input=name, ctx={"expected": expected})
            raise ValidationError.from_exception_data("table", [detail])
        return self.kinds[name].model_validate(value)


def tables_of(field: FieldInfo, values: Any = None) -> list[type[BaseModel]]:
    """The classes that may read a key's table, or the tables in its list; none if it holds no table.

    Args:
        values: the table as it was written; of several kinds, the one that reads it comes first.
    """
    for mark in field.metadata:
        if isinstance(mark, ByName):
            return list(dict.fromkeys([mark.kind(values), *mark.classes]))
    found = _table_in(field.annotation)
    return [found] if found else []


def _table_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = map(_table_in, getattr(annotation, "__args__", ()))
    return next((each for each in found if each), None)
