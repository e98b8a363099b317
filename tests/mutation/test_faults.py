"""The faults that `make mutants` plants are what they say, and it tells one that is noticed from one that is not."""

from __future__ import annotations

import ast
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.mutation import child
from tests.mutation.child import TIMED_OUT, adopt, in_a_child
from tests.mutation.constants import constant_of, replant
from tests.mutation.covering import ROOT, Covered
from tests.mutation.faults import Fault, faults_in
from tests.mutation.trial import Outcome, try_out
from tests.mutation.warm import Warm, collected


def changed(source: str) -> list[str]:
    return [fault.planted(source) for fault in faults_in(source, "x.py")]


@pytest.mark.parametrize(
    ("source", "others"),
    [
        ("a < b", ["(a <= b)", "(not a < b)"]),
        ("a < b <= c", ["(a <= b <= c)", "(a < b < c)"]),
        ("a and not b", ["(a or not b)", "a and (b)"]),
        ("x = f(2)", ["x = None", "x = f((3))"]),
        ("f(a @ b)", ["pass"]),
        ("f(zip(a, b, strict=True))", ["pass"]),
        ("x += 1", ["x = 1", "x -= 1", "x += (2)"]),
        ("f(min(a, b))", ["pass", "f((max(a, b)))"]),
        ("if a:\n    raise b", ["if (not (a)):\n    raise b", "if a:\n    pass"]),
        ("é = 'é' + s; y = a // b", ["é = None; y = a // b", "é = 'é' + s; y = None", "é = 'é' + s; y = (a / b)"]),
        ("_LOG.info('a', 1)\nimport b\nassert a == 1\nx: int\nf'{a + 1}'", []),
    ],
)
def test_each_place_is_changed_as_a_slip_of_the_hand_would(source: str, others: list[str]) -> None:
    assert changed(source) == others


@pytest.mark.parametrize("path", ["cluster/policy/batching.py", "serving/engine.py", "trainers/runner.py"])
def test_every_fault_of_a_real_file_is_another_program_in_one_place(path: str) -> None:
    source = (ROOT / path).read_text()
    program, lines = ast.dump(ast.parse(source)), source.splitlines()
    found = list(faults_in(source, path))
    assert len({fault.id for fault in found}) == len(found) > 50
    for fault in found:
        planted = fault.planted(source)
        assert ast.dump(ast.parse(planted)) != program
        assert lines[: fault.line - 1] == planted.splitlines()[: fault.line - 1]


ENTRY = "cluster/policy/entry.py"
TEST = "tests/cluster/policy/test_entry.py::test_blocks_are_counted_whole"


def outcomes(warm: Warm | None) -> list[Outcome]:
    """Of a fault, of none, and of a fault on a line that no test runs."""
    source = (ROOT / ENTRY).read_text()
    fault: Fault = next(iter(faults_in(source, ENTRY)))
    same = Fault(ENTRY, fault.line, fault.start, fault.start, "", fault.before, fault.before, 0)
    whole = Covered("", {}, {ENTRY: {str(fault.line): (TEST,)}}, {}, {TEST: 0.1})
    asked = (fault, whole), (same, whole), (fault, Covered(""))
    return [try_out(one, source, [covering], warm) for one, covering in asked]


def test_a_fault_is_noticed_by_the_tests_that_run_its_line() -> None:
    assert outcomes(None) == [Outcome.KILLED, Outcome.SURVIVED, Outcome.UNTESTED]


def test_a_fault_in_a_function_that_did_not_run_on_import_is_planted_there_and_noticed() -> None:
    source = (ROOT / ENTRY).read_text()
    fault = next(iter(faults_in(source, ENTRY)))
    on_import = Covered("", {}, {}, {ENTRY: (fault.line,)}, {})
    of_the_module = Fault(ENTRY, 1, 0, 0, "", "", "", 0)
    found: list[object] = []

    def ask(warm: Warm) -> None:
        found.extend(outcomes(warm))
        found.append(warm.knows(fault, source, [Covered("")]))
        found.extend([warm.knows(fault, source, [on_import]), warm.knows(of_the_module, source, [Covered("")])])

    def act() -> int:
        collected([ROOT / TEST.split("::")[0]], ask)
        return 0 if found == [Outcome.KILLED, Outcome.SURVIVED, Outcome.UNTESTED, True, False, False] else 1

    assert in_a_child(act, cpu_s=60, wall_s=120) == 0


CONSTANTS = """
_A = 4
B: int = _A + 1
C = {"x": 2,
     "y": 3}
D = 5


def f(x: int = D) -> int:
    return x + C["x"] + B


class K:
    def g(self) -> int:
        return C["y"]
"""


def test_a_constant_that_only_functions_read_is_given_another_value_where_it_stands() -> None:
    faults = list(faults_in(CONSTANTS, "x.py"))
    found = {fault.line: constant_of(fault, CONSTANTS) for fault in faults}
    assert {line: one and (one.name, one.readers) for line, one in found.items()} == {
        2: None,  # read by another constant
        3: ("B", (10,)),
        4: ("C", (10, 15)),
        5: ("C", (10, 15)),
        6: None,  # a default
        10: None,
        15: None,
    }
    module = ModuleType("x")
    exec(CONSTANTS, vars(module))
    for fault in faults:
        if fault.line == 5 and (constant := found[5]) is not None:
            replant(constant, module, fault.planted(CONSTANTS))
    assert (module.f(1), module.K().g()) == (8, 4)


def _turn_for_ever() -> int:
    while True:
        pass


def _sleep() -> int:
    time.sleep(60)
    return 0


@pytest.mark.parametrize(("act", "code"), [(lambda: 0, 0), (_turn_for_ever, TIMED_OUT), (_sleep, TIMED_OUT)])
def test_a_child_that_computes_or_sleeps_without_end_is_ended(
    act: Callable[[], int], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_ASLEEP_S", 1.0)
    assert in_a_child(act, cpu_s=0, wall_s=60) == code


@pytest.mark.parametrize("by", ["its environment", "its folder"])
@pytest.mark.parametrize("ends", [True, False])
def test_what_a_child_started_in_a_session_of_its_own_ends_with_it(
    ends: bool, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(child, "_ASLEEP_S", 1.0)
    request.addfinalizer(lambda: adopt(False))
    adopt()
    store = tmp_path / "store"
    store.mkdir()

    def act() -> int:
        told: dict[str, Any] = {"env": {}, "cwd": store} if by == "its folder" else {}
        started = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True, **told)
        (tmp_path / "pid").write_text(str(started.pid))
        return 0 if ends else _sleep()

    assert in_a_child(act, cpu_s=60, wall_s=60, folder=str(tmp_path)) == (0 if ends else TIMED_OUT)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
