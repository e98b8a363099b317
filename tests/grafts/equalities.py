"""Which equalities have a test, method by method: read off the tests that are marked with one and off what they are
given, so that no list of methods is kept by hand.

A test with `@pytest.mark.equality(kind)` shows it of the grafts in its parameter `texts`, by whatever name; with `rows`
of those whose names are its parameters' values. What runs in `make nightly` alone does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from _pytest.mark import Mark, MarkDecorator, ParameterSet

from polygraft.grafts.grammar import terms
from polygraft.grafts.methods.registry import find

TESTS = Path(__file__).parents[1]
KINDS = ("packed", "mixed", "merged", "oracle")
Shown = tuple[str, str]  # where the test is, and the graft that it showed the equality of


@cache
def shown() -> Mapping[str, Mapping[str, tuple[Shown, ...]]]:
    """By kind, then by method: every test with a graft that has the method."""
    found: dict[str, dict[str, list[Shown]]] = {kind: {} for kind in KINDS}
    for path in sorted(TESTS.rglob("test_*.py")):
        if "mark.equality(" in path.read_text():
            place = path.relative_to(TESTS.parent)
            module = import_module(".".join(place.with_suffix("").parts))
            for kind, name, text in _of_module(module):
                for method in {find(term.name).name for term in terms(text)}:
                    found[kind].setdefault(method, []).append((f"{place}::{name}", text))
    return {kind: {method: tuple(tests) for method, tests in own.items()} for kind, own in found.items()}


def _of_module(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Kind, test and text."""
    for name, function in vars(module).items():
        if isinstance(function, FunctionType) and name.startswith("test_") and function.__module__ == module.__name__:
            marks = [*_marks(module), *_marks(function)]
            for mark in (mark for mark in marks if mark.name == "equality"):
                (kind,), rows = mark.args, mark.kwargs.get("rows", {})
                assert kind in KINDS, f"{name}: {kind!r} is not one of {', '.join(KINDS)}"
                if not any(mark.name == "nightly" for mark in marks):
                    yield from ((kind, name, text) for text in dict.fromkeys(_texts(marks, rows)))


def _marks(owner: ModuleType | FunctionType) -> list[Mark]:
    found = getattr(owner, "pytestmark", [])
    return [
        one.mark if isinstance(one, MarkDecorator) else one for one in (found if isinstance(found, list) else [found])
    ]


def _texts(marks: list[Mark], rows: Mapping[str, object]) -> Iterator[str]:
    """The grafts that a test is given by its parameters."""
    parameters = [mark for mark in marks if mark.name == "parametrize"]
    for chosen in product(*(_values(mark) for mark in parameters)):
        for name, value in (pair for pairs in chosen for pair in pairs):
            if name == "texts":
                yield from value.values() if isinstance(value, Mapping) else value  # type: ignore[misc]
            last = value[-1] if isinstance(value, tuple) else value  # a row's name, or one of an architecture
            if isinstance(last, str) and last in rows:
                yield rows[last].text  # type: ignore[attr-defined]


def _values(mark: Mark) -> list[list[tuple[str, object]]]:
    """Every set of values that a `parametrize` gives, by name, without those of the night."""
    names, values = mark.args[0], mark.args[1]
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    found = []
    for value in values:
        given = value if isinstance(value, ParameterSet) else pytest.param(*(value if len(listed) > 1 else [value]))
        if not any(one.name == "nightly" for one in given.marks):
            found.append(list(zip(listed, given.values, strict=True)))
    return found
