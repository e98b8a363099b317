"""Faults that could stand in a Python source: each changes one place, as a slip of the hand would.

Comparisons take or lose their bound or turn round, `and` is `or`, a condition is its opposite, a number is one more, an
operation is its inverse, the least is the most, a value is None, a statement is missing. Text is left alone: what
people read is not what tests are for, and keys that nobody shares are arbitrary.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
_OPERATIONS: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Div(),
    ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Div(),
    ast.Mod: ast.FloorDiv(),
    ast.Pow: ast.Mult(),
    ast.LShift: ast.RShift(),
    ast.RShift: ast.LShift(),
    ast.BitOr: ast.BitAnd(),
    ast.BitAnd: ast.BitOr(),
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LOGGERS = ("_LOG", "logging")


@dataclass(frozen=True, slots=True)
class Fault:
    """Bytes `start` to `stop` of the file at `path` are `text` instead; `line` counts from 1. `before` and `after` are
    the lines of that place with their spaces made one; `nth` tells apart those that read alike."""

    path: str
    line: int
    start: int
    stop: int
    text: str
    before: str
    after: str
    nth: int

    @property
    def id(self) -> str:
        return f"{self.path}:{self.before} -> {self.after} #{self.nth}"

    @property
    def change(self) -> tuple[str, str, str]:
        """Where, and from what to what: all that an excuse names."""
        return self.path, self.before, self.after

    def planted(self, source: str) -> str:
        """`source` with the fault in it."""
        raw = source.encode()
        return (raw[: self.start] + self.text.encode() + raw[self.stop :]).decode()


def faults_in(source: str, path: str) -> Iterator[Fault]:
    """All faults, in the order of the source."""
    raw = source.encode()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: Counter[tuple[str, str]] = Counter()
    for node, text in _changes(ast.parse(source)):
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, stop = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        first, last = starts[node.lineno - 1], starts[node.end_lineno]
        before = _one_line(raw[first:last])
        after = _one_line(raw[first:start] + text.encode() + raw[stop:last])
        if before != after:
            yield Fault(path, node.lineno, start, stop, text, before, after, seen[before, after])
            seen[before, after] += 1


def _one_line(raw: bytes) -> str:
    return " ".join(raw.decode().split())


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    for node in _mutable(tree):
        if isinstance(node, ast.expr):
            for new in _other_expressions(node):
                yield node, f"({ast.unparse(new)})"
        elif isinstance(node, ast.stmt):
            yield from _other_statements(node)


def _mutable(node: ast.AST, inside: bool = False) -> Iterator[ast.AST]:
    """The node and those below it that a test could tell from others: no annotations, decorators, imports, log lines,
    assertions, that of `zip` (`strict`) among them, parts of formatted text."""
    left_alone = isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr))
    if left_alone or _is_log(node) or _is_typing(node) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "keywords" if _is_class(node) else ""):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _mutable(child)


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def _is_log(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[0] in _LOGGERS


def _is_typing(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if not isinstance(node, ast.Assign):
        return False
    alias = isinstance(node.value, ast.Subscript) and ast.unparse(node.targets[0])[:1].isupper()
    return alias or ast.unparse(node.value).startswith(("TypeVar(", "logging."))


def _other_expressions(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(ops=[operator]):
            yield ast.Compare(node.left, [_COMPARISONS[type(operator)]], node.comparators)
            if isinstance(operator, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
                yield ast.UnaryOp(ast.Not(), node)
        case ast.Compare():
            for at, operator in enumerate(node.ops):
                ops = [*node.ops[:at], _COMPARISONS[type(operator)], *node.ops[at + 1 :]]
                yield ast.Compare(node.left, ops, node.comparators)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BinOp(left=ast.Constant(value=str())):
            return  # text
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            yield ast.BinOp(node.left, _OPERATIONS[type(node.op)], node.right)
        case ast.IfExp() if isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
            yield ast.Call(ast.Name(_NAMES[name]), node.args, node.keywords)


def _other_statements(node: ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    match node:
        case ast.If() | ast.While() if isinstance(node.test, (ast.Name, ast.Attribute, ast.Call, ast.NamedExpr)):
            yield node.test, f"(not ({ast.unparse(node.test)}))"
        case ast.Return(value=None) | ast.Raise():
            yield node, "pass"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield value, "None"
        case ast.Assign(value=value) if not isinstance(value, ast.Constant):
            yield value, "None"
        case ast.AugAssign():
            yield node, ast.unparse(ast.Assign([node.target], node.value, lineno=1))
            if type(node.op) in _OPERATIONS:
                yield node, ast.unparse(ast.AugAssign(node.target, _OPERATIONS[type(node.op)], node.value))
        case ast.Expr(value=ast.Call() | ast.Await() | ast.YieldFrom()) | ast.Delete():
            yield node, "pass"
        case ast.Continue():
            yield node, "break"
        case ast.Break():
            yield node, "continue"
