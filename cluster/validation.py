"""What a failed pydantic validation tells a person: the field's path, the value, and what is allowed there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel, ValidationError

_SHOWN = 120
_TYPES = frozenset({"bool", "dict", "float", "int", "none", "str"})


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """Path and message of the first thing wrong; an unknown field outranks what it may have caused elsewhere."""
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    unknown = first["type"] == "extra_forbidden"
    # What a client calls a field may look like a union's member, or like no name at all.
    location = (*_location(first["loc"][:-1]), first["loc"][-1]) if unknown else _location(first["loc"])
    path = ".".join(map(str, location))
    match first["type"]:
        case "extra_forbidden":
            choices = ", ".join(_choices(model, location[:-1]))
            return path, f"{path}: unknown field (got {shown(first['input'])}); choices: {choices}"
        case "missing":
            return path, f"{path}: required, but missing"
        case "value_error" if path:
            return path, f"{path}: {first['ctx']['error']}"
        case "value_error":  # of the whole body: its text begins with the field to blame
            text = str(first["ctx"]["error"])
            return text.partition(":")[0], text
        case _:
            wanted = "; or: ".join(dict.fromkeys(one["msg"] for one in errors if _location(one["loc"]) == location))
            return path, f"{path or 'body'}: {wanted} (got {shown(first['input'])})"


def shown(value: object) -> str:
    """`value` as a message repeats it: quoted, cut to a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _location(parts: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where the error is, without the parts that name the tried member of a union: "int", "literal['auto']"."""
    return tuple(part for part in parts if isinstance(part, int) or (part.isidentifier() and part not in _TYPES))


def _choices(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    members: list[type[BaseModel]] = []
    for part in path:
        if not isinstance(part, str):  # the items of a list have the choices that the list has
            continue
        if part in model.model_fields:
            members = list(_models(model.model_fields[part].annotation))
            model = next(iter(members), model)
        else:  # the tag of a union's member
            model = next((one for one in members if part in _tags(one)), model)
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _tags(model: type[BaseModel]) -> frozenset[str]:
    """What tells a union's member from the others: the literals of its fields."""
    return frozenset(
        value for one in model.model_fields.values() for value in get_args(one.annotation) if isinstance(value, str)
    )


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The models among what a field may hold, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in get_args(annotation):
        yield from _models(member)
