"""The faults that `make mutants` plants are what they say, and it tells one that is noticed from one that is not."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.covering import ROOT, Covered
from tests.mutation.faults import Fault, faults_in
from tests.mutation.trial import Outcome, try_out


def changed(source: str) -> list[str]:
    return [fault.planted(source) for fault in faults_in(source, "x.py")]


@pytest.mark.parametrize(
    ("source", "others"),
    [
        ("a < b", ["(a <= b)", "(not a < b)"]),
        ("a < b <= c", ["(a <= b <= c)", "(a < b < c)"]),
        ("a and not b", ["(a or not b)", "a and (b)"]),
        ("x = f(2)", ["x = None", "x = f((3))"]),
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
    found = list(faults_in(source, path))
    assert len({fault.id for fault in found}) == len(found) > 50
    for fault in found:
        planted = fault.planted(source)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
        assert source.splitlines()[: fault.line - 1] == planted.splitlines()[: fault.line - 1]


def test_a_fault_is_noticed_by_the_tests_that_run_its_line() -> None:
    path = "cluster/policy/entry.py"
    source = (ROOT / path).read_text()
    test = "tests/cluster/policy/test_entry.py::test_blocks_are_counted_whole"
    fault: Fault = next(iter(faults_in(source, path)))
    whole = Covered("", {}, {path: {str(fault.line): (test,)}}, {test: 0.1})
    assert try_out(fault, source, [whole]) is Outcome.KILLED
    same = Fault(path, fault.line, fault.start, fault.start, "", fault.before, fault.before, 0)
    assert try_out(same, source, [whole]) is Outcome.SURVIVED
    assert try_out(fault, source, [Covered("")]) is Outcome.UNTESTED
