"""The table of methods: one declaration a method, found by name or alias, built from named arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import isfinite

from polygraft.grafts.spec import Slot, SpecError

Build = Callable[..., tuple[Slot, ...]]
_MODULES = ("adapters", "bitfit", "dora", "ia3", "lora", "prefix")


@dataclass(frozen=True, slots=True)
class Method:
    """A PEFT method: how its arguments become slots, where it was published, and the learning rate to start a search
    from."""

    name: str
    paper: str
    learning_rate: float
    slots: Build
    aliases: tuple[str, ...] = ()

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.slots, eval_str=True).parameters

    def positional(self, index: int) -> str:
        """Name of the argument at `index`; raises SpecError past the last."""
        names = list(self.arguments)
        if index >= len(names):
            raise SpecError(f"peft: {self.name} takes at most {len(names)} arguments: {', '.join(names)}")
        return names[index]

    def build(self, arguments: Mapping[str, str]) -> tuple[Slot, ...]:
        """Slots for textual arguments; raises SpecError for an unknown name or a value of the wrong type."""
        known = self.arguments
        values: dict[str, object] = {}
        for key, text in arguments.items():
            if key not in known:
                raise SpecError(f"peft: {self.name} has no argument {key!r}; choices: {', '.join(known) or 'none'}")
            values[key] = _convert(f"{self.name}.{key}", text, known[key].annotation)
        return self.slots(**values)


def methods() -> Mapping[str, Method]:
    """Every method by its name, in alphabetical order."""
    table: dict[str, Method] = {}
    for module in _MODULES:
        for method in import_module(f"polygraft.grafts.methods.{module}").METHODS:
            for name in (method.name, *method.aliases):
                assert not any(name in (other.name, *other.aliases) for other in table.values()), (
                    f"{name} is declared twice"
                )
            table[method.name] = method
    return dict(sorted(table.items()))


def find(name: str) -> Method:
    """The method called `name`; raises SpecError that lists the choices."""
    table = methods()
    for method in table.values():
        if name in (method.name, *method.aliases):
            return method
    raise SpecError(f"peft: unknown method {name!r}; choices: {', '.join(table)}")


def _convert(field: str, text: str, kind: object) -> object:
    try:
        if kind is int:
            return int(text)
        if kind is float:
            value = float(text)
            if isfinite(value):
                return value
            raise ValueError
    except ValueError:
        raise SpecError(f"peft: {field}: {text!r} is not {'an integer' if kind is int else 'a number'}") from None
    return text
