"""Tests that are imported and collected once. In a fork of that process a fault in a function is planted in the
function itself, and one in a constant that only functions read in its module, so that it costs a fork and its tests,
and no import.

What a fault changes before a test begins cannot be planted so: other constants, defaults, classes, functions that ran
while the tests were imported. Those are imported anew (`trial.py`).
"""

from __future__ import annotations

import ast
import gc
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from time import process_time
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

import pytest

from tests.mutation.constants import constant_of, replant
from tests.mutation.covering import ROOT, Covered
from tests.mutation.faults import Fault

NOT_PLANTED = 71
"""The exit code where the fault's function is none that a test could call."""

_FIXTURES_S = 4.0  # what tests share is made by whichever comes first


def collected(files: Sequence[Path], act: Callable[[Warm], None]) -> None:
    """Act amid pytest's run of the files, in place of their tests."""
    names = [str(file) for file in files]
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", *names], plugins=[_InPlaceOfTests(act)])


class _InPlaceOfTests:
    def __init__(self, act: Callable[[Warm], None]) -> None:
        self._act = act

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._act(Warm(session))
        return True


class Place(NamedTuple):
    """A function: its source, its name with those of its classes, its first line (a decorator's, if it has any)."""

    path: str
    name: str
    line: int


@dataclass(frozen=True, slots=True)
class Span:
    """A function's place and the lines of its body."""

    place: Place
    body: range


class Warm:
    """Tests and functions of this process."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._items = {item.nodeid: item for item in session.items}
        self._functions: dict[Place, list[FunctionType]] = defaultdict(list)
        gc.unfreeze()  # what conftest.py has frozen is no object that the collector knows
        for one in gc.get_objects():
            if isinstance(one, FunctionType):
                self._functions[_place(one.__code__)].append(one)
        files = {name: getattr(one, "__file__", None) for name, one in sys.modules.items() if "mutation" not in name}
        self._modules = {_inside(file): sys.modules[name] for name, file in files.items() if file}
        gc.freeze()  # else a child's first collection copies all of it

    def knows(self, fault: Fault, source: str, covering: Iterable[Covered]) -> bool:
        """Whether the fault is in a function that tests call, and that nothing called while they were imported, or in a
        constant that nothing read then and no other module has taken over."""
        on_import = {line for one in covering for line in one.imported.get(fault.path, ())}
        if (constant := constant_of(fault, source)) is not None:
            module = self._modules.get(fault.path)
            return module is not None and on_import.isdisjoint(constant.readers) and _alone(module, constant.name)
        span = around(fault, source)
        return span is not None and span.place in self._functions and on_import.isdisjoint(span.body)

    def run(self, fault: Fault, source: str, tests: Mapping[str, float]) -> int:
        """Plant the fault for good, and run tests until one fails. Each has so many seconds of processor time as it
        takes without the fault, or a few times that; who takes more is ended by SIGXCPU."""
        if not all(test in self._items for test in tests):
            return NOT_PLANTED
        if (constant := constant_of(fault, source)) is not None:
            replant(constant, self._modules[fault.path], fault.planted(source))
        elif not self._replace(fault, source):
            return NOT_PLANTED
        return self._ask(tests)

    def _replace(self, fault: Fault, source: str) -> bool:
        """Give the function that the fault is in the changed code."""
        if (span := around(fault, source)) is None:
            return False
        planted = compile(fault.planted(source), str(ROOT / fault.path), "exec", dont_inherit=True)
        if (code := next((code for code in _codes(planted) if _place(code) == span.place), None)) is None:
            return False
        for function in self._functions[span.place]:
            if len(function.__code__.co_freevars) != len(code.co_freevars):
                return False
            function.__code__ = code
        return True

    def _ask(self, tests: Mapping[str, float]) -> int:
        items = [self._items[test] for test in tests]
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        for item, following in zip_longest(items, items[1:]):
            limit = process_time() + 3 * tests[item.nodeid] + _FIXTURES_S
            resource.setrlimit(resource.RLIMIT_CPU, (min(int(limit) + 1, most), most))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._session.testsfailed:
                return int(pytest.ExitCode.TESTS_FAILED)
        return int(pytest.ExitCode.OK)


def around(fault: Fault, source: str) -> Span | None:
    """The outermost function whose body the fault is in."""
    return next((span for span in _all_spans(source, fault.path) if fault.line in span.body), None)


def _alone(module: ModuleType, name: str) -> bool:
    """Whether no other module has imported the value by its name."""
    value, others = vars(module)[name], [one for one in sys.modules.values() if one is not module]
    return not any(getattr(one, "__dict__", {}).get(name) is value for one in others)


def _place(code: CodeType) -> Place:
    return Place(_inside(code.co_filename), code.co_qualname, code.co_firstlineno)


@cache
def _inside(path: str) -> str:
    real = Path(path).resolve()
    return real.relative_to(ROOT).as_posix() if real.is_relative_to(ROOT) else path


def _codes(code: CodeType) -> Iterator[CodeType]:
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one
            yield from _codes(one)


@cache
def _all_spans(source: str, path: str) -> tuple[Span, ...]:
    return tuple(_spans(ast.parse(source), path))


def _spans(tree: ast.AST, path: str, within: str = "") -> Iterator[Span]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            body = range(node.body[0].lineno, node.end_lineno + 1)
            yield Span(Place(path, within + node.name, first), body)
        elif isinstance(node, ast.ClassDef):
            yield from _spans(node, path, f"{within}{node.name}.")
        elif not isinstance(node, ast.expr):
            yield from _spans(node, path, within)
