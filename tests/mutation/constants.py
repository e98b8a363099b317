"""Constants of a module that only the bodies of its functions read: a fault in one is planted by a new value."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from tests.mutation.faults import Fault


@dataclass(frozen=True, slots=True)
class Constant:
    """Its name, and the lines that read it."""

    name: str
    readers: tuple[int, ...]


def constant_of(fault: Fault, source: str) -> Constant | None:
    """The one that the fault is in, if it is in one."""
    return _constants(source).get(fault.line)


def replant(constant: Constant, module: ModuleType, planted: str) -> None:
    """Give it the value that it has in the text `planted`, which is computed as on import."""
    assigned = filter(None, map(_assigned, ast.parse(planted).body))
    (value,) = (value for name, value in assigned if name == constant.name)
    setattr(module, constant.name, eval(compile(ast.Expression(value), constant.name, "eval"), vars(module)))


@cache
def _constants(source: str) -> dict[int, Constant]:
    """By each of its lines."""
    tree = ast.parse(source)
    inside = set(_in_functions(tree))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    found: dict[int, Constant] = {}
    for node in tree.body:
        if (assigned := _assigned(node)) is None:
            continue
        name, _ = assigned
        uses = [use for use in names if use.id == name]
        reads = [use for use in uses if isinstance(use.ctx, ast.Load)]
        if len(reads) == len(uses) - 1 and inside.issuperset(reads) and reads:
            assert node.end_lineno is not None
            one = Constant(name, tuple(sorted({use.lineno for use in reads})))
            found |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), one)
    return found


def _assigned(node: ast.stmt) -> tuple[str, ast.expr] | None:
    match node:
        case ast.Assign([ast.Name(id=name)], value) | ast.AnnAssign(ast.Name(id=name), value=ast.expr() as value):
            return name, value
    return None


def _in_functions(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                yield from ast.walk(statement)
