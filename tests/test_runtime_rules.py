"""How the runtime tells one thing from another, checked on the syntax trees: by typed keys and tables, never by where a
tensor lies, by a ladder of types, or by a name that is taken apart."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.test_architecture import ROOT, inside, module, nodes, report, sources

# What transformers calls its modules and classes, files their tensors, autograd its steps.
OTHERS_NAMES = {
    "adopt: path.rpartition('.')",
    "checked: name.endswith('.weight')",
    "checked: str(name).endswith('Model')",
    "norms: type(module).__name__.endswith(('RMSNorm', 'T5LayerNorm'))",
    "pooler: name.rpartition('.')",
    "recompute: node.name().startswith(_VIEWS)",
}


def test_the_runtime_tells_no_tensor_by_where_it_lies() -> None:
    """Nor by whether it is another: what a tensor is, its maker says, or a name, or autograd's step. Addresses are for
    kernels; what is compared with `is` are constants, members of an enum and those steps."""
    wrong = []
    for path in _runtime():
        for node in nodes(path):
            if _identifies(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    assert not wrong, report(wrong)


def test_the_runtime_has_no_ladder_of_types() -> None:
    """No function asks of one thing for two types: what an op does is in its key and in the tables by type. Assertions
    only tell mypy."""
    wrong = []
    for path in _runtime():
        for function in (node for node in nodes(path) if isinstance(node, ast.FunctionDef)):
            asked = {one for node in _outside_asserts(function) if (one := _asked(node))}
            types = Counter(what for what, _ in asked)
            wrong += [f"{module(path)}.{function.name}: {what}" for what, count in types.items() if count > 1]
    assert not wrong, report(wrong)


def test_the_runtime_takes_no_key_apart() -> None:
    calls = ((path, node) for path in _runtime() for node in nodes(path) if isinstance(node, ast.Call))
    wrong = {f"{path.stem}: {ast.unparse(call)}" for path, call in calls if _takes_apart(call)}
    assert wrong == OTHERS_NAMES, report(wrong ^ OTHERS_NAMES)


# What is never two; a phase; a step of autograd.
_ALONE = r"None|True|False|[A-Z]\w*\.[A-Z_]+|phase|end"
_STORED = ("_base", "_cdata", "data_ptr", "is_set_to", "storage", "storage_offset", "untyped_storage")


def _identifies(node: ast.AST) -> bool:
    """Whether this asks for the place of an object, or whether two are one."""
    match node:
        case ast.Name(id="id", ctx=ast.Load()):
            return True
        case ast.Attribute(attr=name):
            return name in _STORED
        case ast.Compare(ops=ops, comparators=others):
            tested = zip(ops, others, strict=True)
            return any(
                isinstance(op, ast.Is | ast.IsNot) and not re.fullmatch(_ALONE, ast.unparse(x)) for op, x in tested
            )
    return False


_APART = r"r?partition|rsplit|removeprefix|removesuffix|startswith|endswith"


def _takes_apart(call: ast.Call) -> bool:
    """Whether this takes a string apart; a tensor is split by sizes or by a linear."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    separated = not call.args or (isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str))
    return bool(re.fullmatch(_APART, name)) or (name == "split" and separated)


def _asked(node: ast.AST) -> tuple[str, str] | None:
    """Of what this asks whether it has a type, and the type."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance"), args=[what, kind]):
            return ast.unparse(what), ast.unparse(kind)
        case ast.Compare(left=ast.Call(func=ast.Name(id="type"), args=[what]), comparators=[kind]):
            return ast.unparse(what), ast.unparse(kind)
    return None


def _outside_asserts(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, ast.Assert):
            yield from _outside_asserts(inner)


def _runtime() -> Sequence[Path]:
    return [path for path in sources("grafts") if inside(path, "polygraft.grafts.runtime")]
