"""Where a chat template runs: Jinja2's immutable sandbox, plus a budget that a hostile template uses up instead of us.

Jinja's sandbox keeps a template from Python's internals and from files, not from time and memory. Two rules close that:
whatever builds a value (operators, `~`, calls, filters, displays, output) pays for its size before or as it is built,
and every turn of a loop and every call pays a step and looks at the clock. So no value outgrows the budget, and no run
outlasts the deadline by more than one operation on such a value.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import GeneratorType

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Functions whose result can be far larger than their arguments together, or which write out a nested value.
_GROWING = frozenset(
    [
        "batch",
        "center",
        "expandtabs",
        "format",
        "format_map",
        "indent",
        "join",
        "ljust",
        "pprint",
        "replace",
        "rjust",
        "slice",
        "string",
        "tojson",
        "truncate",
        "urlize",
        "wordwrap",
        "xmlattr",
        "zfill",
    ]
)
_LARGEST_INT = 100_000  # of an argument that could be a width or a count
_FORBIDDEN_FORMAT = re.compile(r"\d{5,}|\*|\{[^{}]+\{")  # a width of five digits, or one that comes from an argument


class TemplateLimit(ValueError):
    """A chat template that takes more steps, text or time than it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one rendering may use: steps (loop turns, calls, elements of values) and characters (all text it builds)."""

    steps: int = 1_000_000
    characters: int = 16_000_000
    seconds: float = 5.0


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
        del self.filters["random"]
        self.filters.update({name: self.guarded(name, function) for name, function in self.filters.items()})

    @contextmanager
    def metered(self) -> Iterator[None]:
        """A fresh budget for what this thread compiles or renders inside."""
        budget = self._budget
        self._local.account = _Account(budget.steps, budget.characters, time.monotonic() + budget.seconds)
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
        if time.monotonic() > account.deadline:
            raise TemplateLimit(f"the chat template runs longer than {self._budget.seconds} s")

    def shown(self, value: object) -> object:
        """Jinja's finalize: every printed expression comes through here, captured ones too."""
        self.pay(1, _characters(value, self._budget.characters))
        return value

    def concat_text(self, *parts: object) -> str:
        """What `a ~ b` compiles to."""
        self.pay(1, sum(_characters(part, self._budget.characters) for part in parts))
        return "".join(map(str, parts))

    def held(self, value: object) -> object:
        """What a list, tuple or dict display compiles to: nesting a value in copies of itself costs its full size."""
        self.pay(_elements(value, self._budget.steps))
        return value

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "%" and isinstance(left, str):
            self._check("format", (left, right))
        elif operator in ("*", "**") and _too_large(operator, left, right, self._budget.characters):
            raise TemplateLimit(f"the chat template computes a value too large with {operator!r}")
        result: object = super().call_binop(context, operator, left, right)
        self._received(result)
        return result

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        """As in Jinja, the double underscores keep a template's keyword arguments apart."""
        owner = getattr(__obj, "__self__", getattr(getattr(__obj, "__wrapped__", None), "__self__", None))
        if isinstance(owner, (str, bytes)):
            __self._check(getattr(__obj, "__name__", ""), (owner, *args, *kwargs.values()))
        __self.pay(1)
        result: object = super().call(__context, __obj, *map(__self._drawn, args), **kwargs)
        __self._received(result)
        return result

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        if isinstance(obj, str) and attr in ("encode", "translate", "maketrans"):  # codecs can be slow, tables can grow
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _metered(super()._parse(source, name, filename))

    def guarded(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)  # keeps the mark that makes Jinja pass its context first
        def guarded(*args: object, **kwargs: object) -> object:
            self._check(name, (*args, *kwargs.values()))
            result = function(*map(self._drawn, args), **kwargs)
            self._received(result)
            return result

        return guarded

    def _received(self, result: object) -> None:
        self.pay(_elements(result, self._budget.steps), len(result) if isinstance(result, (str, bytes)) else 0)

    def _drawn(self, arg: object) -> object:
        """A lazy argument that pays for each text it yields, such as `map` before `join`."""
        return self._paying(arg) if isinstance(arg, GeneratorType) else arg

    def _paying(self, items: Iterator[object]) -> Iterator[object]:
        for item in items:
            self._received(item)
            yield item

    def _check(self, name: str, args: tuple[object, ...]) -> None:
        """Refuse before the call what would be too large after it."""
        if any(isinstance(arg, int) and abs(arg) > _LARGEST_INT for arg in args):
            raise TemplateLimit(f"the chat template calls {name} with a number above {_LARGEST_INT}")
        if name not in _GROWING:
            return
        if name.startswith("format") and any(isinstance(arg, str) and _FORBIDDEN_FORMAT.search(arg) for arg in args):
            raise TemplateLimit("the chat template formats with a width of five digits or a computed one")
        size = 1
        for arg in args:
            size *= max(1, _magnitude(arg))
        limit = self._budget.characters
        if size > 8 * limit or any(_characters(arg, limit) > limit for arg in args):
            raise TemplateLimit(f"the chat template calls {name} on values too large")


class _Generation(Extension):
    """`{% generation %}`, with which a template marks the assistant's text, prints its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _metered(template: nodes.Template) -> nodes.Template:
    """Rewrite the syntax tree so that loops, macros, `~` and displays come back to the sandbox."""
    for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        pay = _call("pay", [nodes.Const(1), nodes.Const(literal)])
        node.body.insert(0, nodes.ExprStmt(pay))  # type: ignore[attr-defined]
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
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _call("held", [node])
    return node


def _call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _elements(value: object, limit: int) -> int:
    """How many values hang under `value`, each as often as it is reachable; stops counting above `limit`."""
    found, waiting = 0, [value]
    while waiting and found <= limit:
        found += 1
        here = waiting.pop()
        if isinstance(here, Mapping):
            waiting.extend(here.values())
        elif isinstance(here, (list, tuple, set, frozenset)):
            waiting.extend(here)
    return found


def _characters(value: object, limit: int) -> int:
    """About how long `str(value)` would be; stops counting above `limit`."""
    found, waiting = 0, [value]
    while waiting and found <= limit:
        here = waiting.pop()
        if isinstance(here, (str, bytes)):
            found += len(here)
        elif isinstance(here, Mapping):
            found += 4
            waiting.extend(here.keys())
            waiting.extend(here.values())
        elif isinstance(here, (list, tuple, set, frozenset)):
            found += 4
            waiting.extend(here)
        elif here is not None:
            found += 8
    return found


def _magnitude(value: object) -> int:
    """What an argument contributes to the size of a result: the length of a sequence, an int as a count or a width."""
    if isinstance(value, (str, bytes, list, tuple, Mapping, range)):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _too_large(operator: str, left: object, right: object, limit: int) -> bool:
    """Whether `*` or `**` would repeat a sequence beyond `limit`, or give an integer of more than 10,000 bits."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length() > 10_000
    if isinstance(left, (int, str, bytes, list, tuple)) and isinstance(right, (int, str, bytes, list, tuple)):
        return _magnitude(left) * _magnitude(right) > limit
    return False
