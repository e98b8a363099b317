"""Read what users write for a graft: a union such as `prefix(10) + parallel(64)@0-5 + lora(r=4, at=attn.*)`. (A PEFT
config means one on a backbone: `formats/peft_config.py`.)

union := term ("+" term)*      term := method ["(" [argument ("," argument)*] ")"] ["@" layers]
argument := [key "="] value    layers := number | number "-" number, joined by ","
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polygraft.grafts.methods.configs import LONGEST
from polygraft.grafts.methods.registry import find
from polygraft.grafts.spec import DeclRef, GraftSpec, Layers, Slot, SpecError

_TERM = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*(?:@([0-9,\- ]+))?\s*", re.ASCII)
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
    """The graft that a union describes. Raises SpecError with the choices."""
    if len(text) > LONGEST:
        raise SpecError(f"peft: {len(text)} characters; at most {LONGEST}")
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


def check_backbone(spec: GraftSpec, *, quantised: bool) -> None:
    """Raise SpecError where one of the methods means something on a quantised backbone alone, and this one is not."""
    for term in terms(spec.method):
        if find(term.name).quantised and not quantised:
            raise SpecError(
                f"peft: {term.name} trains beside a quantised backbone, and this one is not: start the service with "
                "`polygraft up --quantise nf4`, or write lora"
            )


def learning_rate(spec: GraftSpec) -> float:
    """The rate to start from: the smallest of the union's methods' own, since one must suit them all."""
    return min(find(term.name).learning_rate for term in terms(spec.method))


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
