"""Where a chat template runs: Jinja2's immutable sandbox, plus a budget that a hostile template uses up instead of us.

Jinja's sandbox keeps a template from Python's internals and from files, not from time and memory. Three rules close
that: whatever builds a value (operators, `~`, slices, calls, filters, displays, output) pays for its size before or as
it is built; whatever reads one (comparisons, tests, calls) pays a step each 256 characters; every turn of a loop and
every call pays a step and looks at the clock. So no value outgrows the budget, and no run outlasts the deadline by more
than one operation, which `template_costs` keeps short.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import GeneratorType

from jinja2 import Environment, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polygraft.grafts.text.template_costs import (
    LEFT_OUT,
    NO_METHODS,
    TemplateLimit,
    characters,
    elements,
    price,
    too_large,
)

_READ = 256  # characters that a step compares, searches or copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one rendering may use: steps (loop turns, calls, elements of values), characters (all text it builds) and
    seconds of its thread's processor."""

    steps: int = 1_000_000
    characters: int = 12_000_000
    seconds: float = 0.75


@dataclass(slots=True)
class _Account:
    steps: int
    characters: int
    deadline: float


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment without loader, whose templates run inside `metered()`. Each thread has its own account."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self.shown
        )  # as transformers sets them
        self._budget = budget
        self._local = threading.local()
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        for name in LEFT_OUT:
            del self.filters[name]
        self.filters.update({name: self.guarded(name, function) for name, function in self.filters.items()})
        self.tests.update({name: self.guarded(name, test) for name, test in self.tests.items()})  # type: ignore[arg-type]

    @contextmanager
    def metered(self) -> Iterator[None]:
        """A fresh budget for what this thread compiles or renders inside."""
        budget = self._budget
        self._local.account = _Account(budget.steps, budget.characters, time.thread_time() + budget.seconds)
        try:
            yield
        finally:
            del self._local.account

    def pay(self, steps: int, characters: int = 0) -> None:
        """Raises TemplateLimit when the account is overdrawn or late."""
        account: _Account = self._local.account
        account.steps -= steps
        account.characters -= characters
        if account.steps < 0:
            raise TemplateLimit(f"the chat template takes more than {self._budget.steps} steps")
        if account.characters < 0:
            raise TemplateLimit(f"the chat template builds more than {self._budget.characters} characters")
        if time.thread_time() > account.deadline:
            raise TemplateLimit(f"the chat template runs longer than {self._budget.seconds} s")

    def shown(self, value: object) -> object:
        """Jinja's finalize: every printed expression comes through here, captured ones too."""
        self.pay(1, characters(value, self._budget.characters))
        return value

    def concat_text(self, *parts: object) -> str:
        """What `a ~ b` compiles to."""
        self.pay(1, sum(characters(part, self._budget.characters) for part in parts))
        return "".join(map(str, parts))

    def held(self, value: object) -> object:
        """What a list, tuple or dict display and a slice compile to: nesting a value in copies of itself costs its full
        size."""
        self._received(value)
        return value

    def weighed(self, value: object) -> object:
        """What an operand of a comparison compiles to."""
        self.pay(1 + price("a comparison", value, (), self._budget.characters) // _READ)
        return value

    def turn(self) -> bool:
        """What the condition of a loop's turn begins with: turns that it leaves out pay, too."""
        self.pay(1)
        return True

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "%" and isinstance(left, str):
            self._price("format", left, (right,))
        elif operator in ("*", "**") and too_large(operator, left, right, self._budget.characters):
            raise TemplateLimit(f"the chat template computes a value too large with {operator!r}")
        result: object = super().call_binop(context, operator, left, right)
        self._received(result)
        return result

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        """As in Jinja, the double underscores keep a template's keyword arguments apart."""
        owner = getattr(__obj, "__self__", getattr(getattr(__obj, "__wrapped__", None), "__self__", None))
        if owner is __self and callable(__obj):  # what the syntax tree was rewritten to
            ours: object = __obj(*args)
            return ours
        if isinstance(__obj, (Macro, LoopContext)):  # whose bodies pay for what they do
            __self.pay(1)
        else:
            name = getattr(__obj, "__name__", "a function")
            given = (*args, *kwargs.values())
            if not isinstance(owner, (str, bytes, Mapping, list, tuple)):
                owner, given = (given[0], given[1:]) if given else (None, ())
            __self._price(name, owner, given)
        result: object = super().call(__context, __obj, *map(__self._drawn, args), **kwargs)
        __self._received(result)
        return result

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        if isinstance(obj, (str, bytes)) and attr in NO_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _metered(super()._parse(source, name, filename))

    def guarded(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)  # keeps the mark that makes Jinja pass its context first
        def guarded(*args: object, **kwargs: object) -> object:
            given = args[isinstance(args[0], (Context, nodes.EvalContext, Environment)) :]
            self._price(name, given[0], (*given[1:], *kwargs.values()))
            result = function(*map(self._drawn, args), **kwargs)
            self._received(result)
            return result

        return guarded

    def _price(self, name: str, value: object, args: tuple[object, ...]) -> None:
        self.pay(1 + price(name, value, args, self._budget.characters) // _READ)

    def _received(self, result: object) -> None:
        self.pay(elements(result, self._budget.steps), len(result) if isinstance(result, (str, bytes)) else 0)

    def _drawn(self, arg: object) -> object:
        """A lazy argument that pays for each text it yields, such as `map` before `join`."""
        return self._paying(arg) if isinstance(arg, GeneratorType) else arg

    def _paying(self, items: Iterator[object]) -> Iterator[object]:
        for item in items:
            self._received(item)
            yield item


class _Generation(Extension):
    """`{% generation %}`, with which a template marks the assistant's text, prints its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _metered(template: nodes.Template) -> nodes.Template:
    """Rewrite the syntax tree so that loops, macros, `~`, displays, slices and comparisons come back to the sandbox."""
    for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        pay = _call("pay", [nodes.Const(1), nodes.Const(literal)])
        node.body.insert(0, nodes.ExprStmt(pay))  # type: ignore[attr-defined]
    for loop in list(template.find_all(nodes.For)):
        if loop.test is not None:
            loop.test = nodes.And(_call("turn", []), loop.test)
    _replace(template)
    template.set_environment(template.environment)  # type: ignore[arg-type]
    template.set_lineno(1)
    return template


def _replace(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _replaced(value))
        elif isinstance(value, list):
            setattr(node, field, [_replaced(item) if isinstance(item, nodes.Node) else item for item in value])


def _replaced(node: nodes.Node) -> nodes.Node:
    _replace(node)
    if isinstance(node, nodes.Concat):
        return _call("concat_text", node.nodes)
    if isinstance(node, nodes.Compare):
        node.expr = _call("weighed", [node.expr])
        for operand in node.ops:
            operand.expr = _call("weighed", [operand.expr])
    shown = isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    if shown or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        return _call("held", [node])  # type: ignore[list-item]
    return node


def _call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
