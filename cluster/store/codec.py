"""Records and events as JSON text: {"type", "schema", fields...}, decoded strictly. Never pickle.

The encoding follows the dataclasses' annotations; a mapping of records becomes the list of its values, since each
knows its id, any other one an object. A change of a record's fields raises its schema number here; `upgrades.py` has
the way from the old one.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from math import isfinite
from types import MappingProxyType
from typing import Literal, Union, cast, get_args, get_origin, get_type_hints

from polygraft.cluster.events import Event
from polygraft.cluster.model import Record
from polygraft.cluster.store.base import JSON, Key, R
from polygraft.cluster.store.keys import record_type
from polygraft.cluster.store.upgrades import UPGRADES

SCHEMA = 1  # of every type that SCHEMAS does not name
SCHEMAS: Mapping[str, int] = {
    "BackboneUnloading": 2,
    "DeviceJoined": 2,
    "Graft": 2,
    "GraftPublished": 2,
    "Job": 6,
    "JobStarted": 2,
    "JobSubmitted": 6,
    "JobSucceeded": 2,
    "Pack": 2,
    "PackOpening": 2,
    "Replica": 2,
    "ReplicaOpened": 2,
    "Snapshot": 9,
}


class CodecError(ValueError):
    """Text that is no record of this version; the message names the type and the field."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How values of one annotation become JSON and come back."""

    encode: Callable[[object], JSON]
    decode: Callable[[JSON, str], object]


def encode_record(key: Key[Record], value: Record) -> str:
    """Raises CodecError for a record of another kind than the key's."""
    _check_kind(key, value)
    return _encode(value)


def encode_event(event: Event) -> str:
    return _encode(event)


def decode_record(key: Key[R], text: str | bytes) -> R:
    """The record at `key`. Raises CodecError, also for a record of another kind than the key's."""
    value = _decode(text, key)
    _check_kind(key, value)
    return cast(R, value)


def decode_event(text: str | bytes) -> Event:
    """Raises CodecError."""
    value = _decode(text, "event")
    if not isinstance(value, Event):
        raise CodecError(f"expected an event, found a {type(value).__name__}")
    return value


def encode_entry(entry: Mapping[str, JSON]) -> str:
    """A stream entry; numbers that are not finite become null, however deep they lie."""
    return _dump({name: _finite(value) for name, value in entry.items()})


def decode_entry(text: str | bytes) -> Mapping[str, JSON]:
    return MappingProxyType(json.loads(text))


def _check_kind(key: str, value: object) -> None:
    if not isinstance(value, record_type(key)):
        raise CodecError(f"{key}: expected a {record_type(key).__name__}, found a {type(value).__name__}")


def _encode(value: Record | Event) -> str:
    name = type(value).__name__
    body = cast(Mapping[str, JSON], _form(cast(type, type(value))).encode(value))
    try:
        return _dump({"type": name, "schema": _schema(name), **body})
    except ValueError:
        raise CodecError(f"{name}: a number is not finite; write None instead: {value}") from None


def _decode(text: str | bytes, at: str) -> object:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise CodecError(f"{at}: not JSON: {error}") from None
    if not isinstance(body, dict):
        raise CodecError(f"{at}: expected an object, found {type(body).__name__}")
    name, schema = body.pop("type", None), body.pop("schema", None)
    if name not in _types():
        raise CodecError(f"{at}: unknown type {name!r}; another version of polygraft wrote it")
    known = _schema(name)
    while schema != known:
        upgrade = UPGRADES.get((name, schema)) if isinstance(schema, int) else None
        if upgrade is None:
            raise CodecError(f"{at}: {name} of schema {schema!r}, not {known}; another version of polygraft wrote it")
        body, schema = upgrade(body), schema + 1
    return _form(_types()[name]).decode(body, name)


def _finite(value: JSON) -> JSON:
    match value:
        case float():
            return value if isfinite(value) else None
        case Mapping():
            return {name: _finite(one) for name, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
    return value


def _dump(body: Mapping[str, JSON]) -> str:
    return json.dumps(body, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def _schema(name: str) -> int:
    return SCHEMAS.get(name, SCHEMA)


@cache
def _types() -> Mapping[str, type]:
    return {member.__name__: member for member in (*get_args(Record), *get_args(Event))}


@cache
def _form(kind: Hashable) -> _Form:
    """Compiled once a type from its annotation."""
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "__supertype__"):  # NewType
        return _form(kind.__supertype__)
    if origin in (types.UnionType, Union):
        return _optional(arguments)
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple:
        return _sequence(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _by_id(arguments[1]) if is_dataclass(arguments[1]) else _by_name(arguments[1])
    if isinstance(kind, type):
        if is_dataclass(kind):
            return _object(kind)
        if issubclass(kind, StrEnum):
            return _enum(kind)
        if kind in (str, int, bool, float):
            return _plain(kind)
    raise TypeError(f"{kind!r} has no JSON form; give the field another type")


def _plain(kind: type) -> _Form:
    def check(value: object, at: str) -> object:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise CodecError(f"{at}: expected {kind.__name__}, found {value!r}")
        return value

    def plain(value: object) -> JSON:
        """Values of subclasses (an enum's member, a NumPy float) are written as what they are derived from."""
        derived = isinstance(value, kind) and not isinstance(value, bool)
        return cast(JSON, check(kind(value) if derived else value, kind.__name__))

    return _Form(plain, check)


def _enum(kind: type[StrEnum]) -> _Form:
    def back(value: JSON, at: str) -> object:
        try:
            return kind(value)  # type: ignore[arg-type]  # anything that is not a member raises
        except ValueError:
            raise CodecError(f"{at}: {value!r} is not one of {', '.join(kind)}") from None

    return _Form(lambda value: str(value), back)


def _one_of(choices: tuple[object, ...]) -> _Form:
    def back(value: JSON, at: str) -> object:
        if value not in choices:
            raise CodecError(f"{at}: {value!r} is not one of {choices}")
        return value

    return _Form(lambda value: cast(JSON, value), back)


def _optional(members: tuple[object, ...]) -> _Form:
    inner = _form(next(member for member in members if member is not type(None)))
    assert len(members) == 2 and type(None) in members, f"only X | None has a JSON form, not {members}"
    return _Form(
        lambda value: None if value is None else inner.encode(value),
        lambda value, at: None if value is None else inner.decode(value, at),
    )


def _sequence(members: tuple[object, ...]) -> _Form:
    inner = _form(members[0])
    length = None if members[-1] is Ellipsis else len(members)
    assert all(member in (members[0], Ellipsis) for member in members), f"a tuple of one type, not {members}"

    def back(value: JSON, at: str) -> object:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise CodecError(f"{at}: expected {length or 'any number of'} items, found {value!r}")
        return tuple(inner.decode(item, f"{at}.{index}") for index, item in enumerate(value))

    return _Form(lambda value: [inner.encode(item) for item in cast(tuple[object, ...], value)], back)


def _by_id(member: object) -> _Form:
    inner = _form(member)

    def back(value: JSON, at: str) -> object:
        if not isinstance(value, list):
            raise CodecError(f"{at}: expected a list, found {value!r}")
        found = (inner.decode(item, f"{at}.{index}") for index, item in enumerate(value))
        return MappingProxyType({item.id: item for item in found})  # type: ignore[attr-defined]

    return _Form(lambda value: [inner.encode(item) for item in cast(Mapping[object, object], value).values()], back)


def _by_name(member: object) -> _Form:
    inner = _form(member)

    def back(value: JSON, at: str) -> object:
        if not isinstance(value, dict):
            raise CodecError(f"{at}: expected an object, found {value!r}")
        return MappingProxyType({name: inner.decode(item, f"{at}.{name}") for name, item in value.items()})

    return _Form(lambda value: {str(k): inner.encode(v) for k, v in cast(Mapping[object, object], value).items()}, back)


def _object(kind: type) -> _Form:
    hints = get_type_hints(kind)
    forms = {field.name: _form(hints[field.name]) for field in fields(kind)}

    def back(value: JSON, at: str) -> object:
        if not isinstance(value, dict) or value.keys() != forms.keys():
            found = sorted(value) if isinstance(value, dict) else value
            raise CodecError(f"{at}: expected the fields {', '.join(forms)}; found {found!r}")
        return kind(**{name: form.decode(value[name], f"{at}.{name}") for name, form in forms.items()})

    return _Form(lambda value: {name: form.encode(getattr(value, name)) for name, form in forms.items()}, back)
