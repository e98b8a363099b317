"""Read what users write for a graft: a union such as `prefix(10) + parallel(64)@0-5 + lora(r=4, at=attn.*)`, or a
PEFT config.

union := term ("+" term)*      term := method ["(" [argument ("," argument)*] ")"] ["@" layers]
argument := [key "="] value    layers := number | number "-" number, joined by ","
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polygraft.grafts.methods.configs import arguments, flat, layout_of, names
from polygraft.grafts.methods.registry import find
from polygraft.grafts.spec import DeclRef, GraftSpec, Layers, Slot, SpecError
from polygraft.grafts.text.plain_json import JsonError, load

_TERM = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*(?:@([0-9,\- ]+))?\s*", re.ASCII)
_LIMIT = 2000
_LAST_LAYER = 9999


@dataclass(frozen=True, slots=True)
class Term:
    """One method of a union, as it is written."""

    name: str
    arguments: Mapping[str, str]
    layers: Layers = None

    def __str__(self) -> str:
        where = "" if self.layers is None else f"@{','.join(map(str, self.layers))}"
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.arguments.items())}){where}"


def parse(text: str) -> GraftSpec:
    """The graft that `text` describes: a union, or a JSON object with PEFT's fields. Raises SpecError with the
    choices."""
    if len(text) > _LIMIT:
        raise SpecError(f"peft: {len(text)} characters; at most {_LIMIT}")
    if text.lstrip().startswith("{"):
        return from_peft_config(_object(text))
    return union(terms(text), text.strip())


def terms(text: str) -> tuple[Term, ...]:
    """The methods of a union; raises SpecError for text that is none."""
    found: list[Term] = []
    position = 0
    while True:
        term = _TERM.match(text, position)
        if term is None:
            raise SpecError(f"peft: cannot read {text[position:]!r}; write method(arguments)@layers joined by +")
        found.append(Term(term[1], _arguments(term[1], term[2] or ""), _layer_list(term[3])))
        position = term.end()
        if position == len(text):
            return tuple(found)
        if text[position] != "+":
            raise SpecError(f"peft: cannot read {text[position:]!r} after {text[:position].strip()!r}; expected +")
        position += 1


def union(members: Sequence[Term], text: str | None = None) -> GraftSpec:
    """The graft of all members together."""
    slots: list[Slot] = []
    hooks: list[DeclRef] = []
    for member in members:
        own, called = find(member.name).build(member.arguments)
        slots, hooks = [*slots, *_at_layers(own, member.layers)], [*hooks, *called]
    return GraftSpec(" + ".join(map(str, members)) if text is None else text, tuple(slots), tuple(hooks))


def pinned(text: str, versions: Mapping[str, str]) -> str:
    """The union with the grafts that it is made over (`of`) under other names."""

    def named(of: str) -> str:
        return "|".join(versions.get(name.strip(), name.strip()) for name in of.split("|"))

    found = []
    for term in terms(text):
        changed = {key: named(value) if key == "of" else value for key, value in term.arguments.items()}
        found.append(str(replace(term, arguments=changed)))
    return " + ".join(found)


def from_peft_config(config: Mapping[str, object]) -> GraftSpec:
    """The graft of a PEFT config (adapter_config.json or its essential fields), where no folder goes with it.

    Raises SpecError for a field that is not read here and not at its default: it may change what the graft is.
    """
    config = flat(config)
    layout = layout_of(config, stored=False)
    values = arguments(layout, config, stored=False)
    listed = {ours: set(names(config, key)) for ours, (key, _) in layout.sides.items()}
    whole = next(iter(layout.sides), None)
    if whole is not None and listed[whole]:
        for ours, (key, default) in [*layout.sides.items()][1:]:
            named = set(default) if config.get(key) is None else listed[ours]
            listed[ours], listed[whole] = listed[whole] & named, listed[whole] - named
        values |= {ours: "|".join(sorted(found)) for ours, found in listed.items()}
    layers = _chosen(config.get("layers_to_transform"))
    return union([Term(layout.method, {key: str(value) for key, value in values.items()}, layers)])


def learning_rate(spec: GraftSpec) -> float:
    """The rate to start from: the smallest of the union's methods' own, since one must suit them all."""
    return min(find(term.name).learning_rate for term in terms(spec.method))


def _chosen(layers: object) -> Layers:
    if layers is None:
        return None
    found = layers if isinstance(layers, list | tuple) else [layers]
    if not found or not all(type(layer) is int and 0 <= layer <= _LAST_LAYER for layer in found):
        raise SpecError(f"layers_to_transform: {repr(layers)[:200]} is not a list of layer numbers")
    return tuple(found)


def _object(text: str) -> Mapping[str, object]:
    try:
        value = load(text)
    except JsonError as error:
        raise SpecError(f"peft: {error}") from None
    if not isinstance(value, dict):
        raise SpecError("peft: expected a JSON object with peft_type")
    return value


def _arguments(name: str, inside: str) -> Mapping[str, str]:
    method = find(name)
    found: dict[str, str] = {}
    for index, argument in enumerate(part.strip() for part in inside.split(",") if part.strip()):
        key, equals, value = argument.partition("=")
        if not equals:
            key, value = method.positional(index), argument
        if key.strip() in found:
            raise SpecError(f"peft: {name}: {key.strip()!r} is given twice")
        found[key.strip()] = value.strip()
    return found


def _at_layers(slots: tuple[Slot, ...], layers: Layers) -> tuple[Slot, ...]:
    return slots if layers is None else tuple(replace(slot, layers=layers) for slot in slots)


def _layer_list(text: str | None) -> Layers:
    if text is None:
        return None
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        if (
            not first.isdecimal()
            or (dash and not last.isdecimal())
            or not int(first) <= int(last or first) <= _LAST_LAYER
        ):
            raise SpecError(f"layers: cannot read {part[:40]!r}; write 3 or 0-5, joined by commas")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
