"""The tables of all that the files in the folders of families declare, found by name or alias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from polygraft.grafts.methods.declare import Hook, Method, Parametrization, Start
from polygraft.grafts.methods.exchange import Peft
from polygraft.grafts.methods.refused import REFUSED
from polygraft.grafts.spec import SpecError

T = TypeVar("T", Parametrization, Start, Hook)
# The survey's families (section III), a folder each.
FAMILIES = ("additive", "selective", "reparameterised", "hybrid", "composition", "compressed")


@cache
def methods() -> Mapping[str, Method]:
    """Every method by its name, in alphabetical order."""
    table: dict[str, Method] = {}
    names: set[str] = set()
    for method in _declared("METHODS"):
        assert isinstance(method, Method)
        for name in (method.name, *method.aliases):
            assert name not in names, f"{name} is declared twice"
            names.add(name)
        table[method.name] = method
    return dict(sorted(table.items()))


def find(name: str) -> Method:
    """The method called `name`; raises SpecError that lists the choices, or says why it is not one of them."""
    for method in methods().values():
        if name in (method.name, *method.aliases):
            return method
    if name in REFUSED:
        raise SpecError(f"peft: {name!r} is not here: {REFUSED[name]}")
    raise SpecError(f"peft: unknown method {name!r}; choices: {', '.join(methods())}")


def form(name: str) -> Parametrization:
    return _found(Parametrization, "PARAMETRIZATIONS", name)


def start(name: str) -> Start:
    return _found(Start, "STARTS", name)


def known_start(name: str) -> Start | None:
    """The start that a file of this folder declares, None for those of `grafts/init.py`."""
    found = _table("STARTS").get(name)
    return found if isinstance(found, Start) else None


def hook(name: str) -> Hook:
    return _found(Hook, "HOOKS", name)


@cache
def layouts() -> tuple[Peft, ...]:
    """How PEFT keeps methods; of one `peft_type` first the layouts that ask for most."""
    found = [layout for layout in _declared("PEFT") if isinstance(layout, Peft)]
    return tuple(sorted(found, key=lambda layout: (layout.kind, -len(layout.fixed), layout.method)))


def _found(kind: type[T], plural: str, name: str) -> T:
    """Raises SpecError for a name that nobody declares, as a file from elsewhere may bring one."""
    table = _table(plural)
    if name not in table:
        raise SpecError(f"{kind.__name__.lower()}: {name!r} is unknown; choices: {', '.join(table)}")
    declared = table[name]
    assert isinstance(declared, kind)
    return declared


@cache
def _table(plural: str) -> Mapping[str, Parametrization | Start | Hook]:
    found = [one for one in _declared(plural) if isinstance(one, Parametrization | Start | Hook)]
    former = [(one.formerly, one) for one in found if not isinstance(one, Start) and one.formerly is not None]
    table = dict([*((one.name, one) for one in found), *former])
    assert len(table) == len(found) + len(former), f"{plural}: a name is declared twice"
    return dict(sorted(table.items()))


def _declared(plural: str) -> Iterator[object]:
    for family in FAMILIES:
        package = f"{__package__}.{family}"
        for module in sorted(found.name for found in iter_modules(import_module(package).__path__)):
            yield from getattr(import_module(f"{package}.{module}"), plural, ())
