"""One fault, and whether a test notices it."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from enum import StrEnum
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import pytest

from tests.mutation.child import TIMED_OUT, Child
from tests.mutation.constants import constant_of
from tests.mutation.covering import ROOT, Covered
from tests.mutation.faults import Fault
from tests.mutation.warm import NOT_PLANTED, Warm

_MOST_S = 30.0  # processor time of the tests that are asked about a fault, while none is in; the quickest are


class Outcome(StrEnum):
    KILLED = "killed"
    TIMEOUT = "timeout"  # noticed, too: the tests went on without end
    SURVIVED = "survived"
    UNTESTED = "untested"  # no test runs the line
    NOT_PLANTED = "not planted"  # its module has to be imported anew

    @property
    def noticed(self) -> bool:
        return self in (Outcome.KILLED, Outcome.TIMEOUT)


class Trial:
    """The tests that cover a fault, run over it in a child until one fails: where `warm` is given those that it has
    collected, over the function that it has imported, else in modules that are imported anew."""

    def __init__(self, fault: Fault, source: str, covering: Iterable[Covered], warm: Warm | None = None) -> None:
        self.fault = fault
        self.seconds = 0.0  # of processor time, once the outcome is known
        self._base = tempfile.mkdtemp(prefix="mutant-")
        self._child: Child | None = None
        constant = constant_of(fault, source)
        tests = _chosen(fault.path, (fault.line,) if constant is None else constant.readers, covering)
        if tests:

            def run() -> int:
                tempfile.tempdir = self._base
                return _run(fault, source, list(tests)) if warm is None else warm.run(fault, source, tests)

            seconds = sum(tests.values())
            self._child = Child(run, cpu_s=3 * seconds + 20, wall_s=20 * seconds + 600, folder=self._base)

    def outcome(self) -> Outcome | None:
        """None while it is not known."""
        if self._child is None:
            found = Outcome.UNTESTED
        elif (code := self._child.ended()) is None:
            return None
        elif code == TIMED_OUT:
            found = Outcome.TIMEOUT
        elif code == NOT_PLANTED:
            found = Outcome.NOT_PLANTED
        else:
            found = Outcome.SURVIVED if code == pytest.ExitCode.OK else Outcome.KILLED
        self.drop()
        return found

    @property
    def asleep(self) -> bool:
        """Whether it leaves the processor to others."""
        return self._child is not None and self._child.asleep

    def drop(self) -> None:
        """End it, and leave nothing behind."""
        if self._child is not None:
            self._child.end()
            self.seconds = self._child.seconds
        shutil.rmtree(self._base, ignore_errors=True)


def try_out(fault: Fault, source: str, covering: Iterable[Covered], warm: Warm | None = None) -> Outcome:
    """What comes of one fault."""
    trial = Trial(fault, source, covering, warm)
    try:
        while (found := trial.outcome()) is None:
            time.sleep(0.02)
    finally:
        trial.drop()
    return found


def _chosen(path: str, lines: Sequence[int], covering: Iterable[Covered]) -> dict[str, float]:
    """The quickest tests that cover the lines, of each function of tests one case before another one's second; file by
    file, the quickest first, and how long each takes without a fault."""
    cost = {test: one.seconds[test] for one in covering for test in one.tests(path, lines)}
    cases: Counter[str] = Counter()
    turn: dict[str, int] = {}
    for test in sorted(cost, key=lambda test: (cost[test], test)):
        cases[test.split("[")[0]] += 1
        turn[test] = cases[test.split("[")[0]]
    chosen: list[str] = []
    files: dict[str, float] = defaultdict(float)
    seconds = 0.0
    for test in sorted(cost, key=lambda test: (turn[test], cost[test], test)):
        if chosen and seconds + cost[test] > _MOST_S:
            continue
        chosen.append(test)
        files[_file(test)] += cost[test]
        seconds += cost[test]
    return {test: cost[test] for test in sorted(chosen, key=lambda test: (files[_file(test)], _file(test)))}


def _file(test: str) -> str:
    return test.split("::")[0]


def _run(fault: Fault, source: str, tests: Sequence[str]) -> int:
    for name in [name for name in sys.modules if name.startswith(("polygraft.", "tests.")) and "mutation" not in name]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Planted(ROOT / fault.path, fault.planted(source)))
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


class _Planted(MetaPathFinder):
    """Gives the module of one file another text."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None or fullname.rpartition(".")[2] != self._path.stem:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or Path(spec.origin).resolve() != self._path:
            return None
        spec.loader = _Loader(fullname, spec.origin, self._text)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, text: str) -> None:
        super().__init__(fullname, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)
