"""Chat templates that want time, memory or Python: a dozen kinds, each drawn from a seed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from random import Random
from resource import RUSAGE_SELF, getrusage

from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from polygraft.grafts.text.chat import Chat, ChatError
from polygraft.grafts.text.message import Message

MESSAGES = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "A shoot."))
METHODS = tuple(name for name in dir(str) if not name.startswith("_"))
# Values as large as a template can make them, of other shapes, written so that no budget is spent on making them.
BIG = {
    "a": "{% set a = 'a' * 3000000 %}",
    "b": "{% set b = 'b' + 'a' * 1500000 %}",
    "words": "{% set words = 'ab ' * 1000000 %}",
    "wide": "{% set wide = '\U000e0001' * 2500000 %}",
    "lines": "{% set lines = 'x\n' * 1500000 %}",
    "percents": "{% set percents = '%9999s' * 20000 %}",
    "braces": "{% set braces = '{0:>9999}' * 5000 %}",
    "things": "{% set things = [1] * 900000 %}",
    "texts": "{% set texts = ['a' * 1000000] * 90000 %}",
    "nested": "{% set nested = [['a'] * 300] * 300 %}",
    "pairs": "{% set pairs = [{'c': 'a' * 1000000}] * 90000 %}",
    "tags": "{% set tags = '<!-- -->' * 400000 %}",
    "counts": "{% set counts = range(100000) %}",
}


def _values(random: Random, count: int) -> tuple[str, list[str]]:
    """Text that makes a few large values, and their names."""
    names = [random.choice(sorted(BIG)) for _ in range(count)]
    return "".join(BIG[name] for name in dict.fromkeys(names)), names


def _arguments(random: Random, names: list[str]) -> str:
    small = ["1", "100000", "99999999", "'c'", "'a' * 100", "attribute='c'", "'title'", "-1", "none"]
    return ", ".join(random.sample([*names, random.choice(small)], random.randint(0, min(2, len(names)))))


def filters(random: Random) -> str:
    made, (value, *rest) = _values(random, 3)
    chain = " | ".join(f"{random.choice(sorted(FILTERS))}({_arguments(random, rest)})" for _ in range(2))
    return made + f"{{{{ {value} | {chain} | length }}}}"


def methods(random: Random) -> str:
    made, (value, *rest) = _values(random, 3)
    owner = value if value in ("a", "b", "words", "wide", "lines", "percents", "braces", "tags") else "a"
    made = (BIG["a"] if owner == "a" and value != "a" else "") + made
    return made + f"{{{{ {owner}.{random.choice(METHODS)}({_arguments(random, rest)}) | length }}}}"


def tests(random: Random) -> str:
    made, (value, other) = _values(random, 2)
    name = random.choice(sorted(TESTS))
    asked = f"{value} is {name}" if name.isalpha() else f"{value} {name} {other}"
    if name in ("in", "eq", "ne", "lt", "gt", "le", "ge", "sameas", "equalto", "greaterthan", "lessthan"):
        asked = f"{value} is {name}({other})"
    return made + f"{{{{ {asked} }}}}{{{{ counts | default(range(99999)) | select('in', {other}) | list | length }}}}"


def silent_work(random: Random) -> str:
    """Much that prints nothing, turns no loop and calls nothing, one after the other."""
    kinds = [
        "{% if a == b or b in a or a < b %}{% endif %}",
        "{% set x = a[1:] %}",
        "{% for c in a if false %}{% endfor %}",
        "{% set x = a if a > b else b %}",
        "{% if texts == pairs or 'x' in texts %}{% endif %}",
        "{% set x = not (a != b and a >= b) %}",
    ]
    body = random.choice(kinds)
    return BIG["a"] + "{% set b = 'a' * 2999999 + 'b' %}" + BIG["texts"] + BIG["pairs"] + body * (60_000 // len(body))


def loops(random: Random) -> str:
    depth = random.randint(2, 5)
    body = random.choice(
        ["", "{{ i0 }}", "{% set x = [i0] * 90000 %}", "{{ 'a' * 90000 }}", "{% if i0 is odd %}{% endif %}"]
    )
    opened = "".join(f"{{% for i{n} in range({random.choice([300, 9999, 99999])}) %}}" for n in range(depth))
    return opened + body + "{% endfor %}" * depth


def doubling(random: Random) -> str:
    grown = random.choice(
        [
            *("ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, [ns.x] * 3)", "{'a': ns.x, 'b': ns.x}", "ns.x * 2"),
            *("ns.x | string ~ ns.x", "ns.x | tojson", "[ns.x] | list + [ns.x]", "ns.x | replace('a', 'aaa')"),
        ]
    )
    start = random.choice(["'a'", "['a']", "'\U000e0001'", "3"])
    show = random.choice(["{{ ns.x }}", "{{ ns.x | tojson(indent=16) }}", "{{ raise_exception(ns.x) }}"])
    turns = random.randint(30, 90)
    loop = f"{{% for i in range({turns}) %}}{{% set ns.x = {grown} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{show}"


def recursion(random: Random) -> str:
    branches = "".join("{{ f(n + 1) }}" for _ in range(random.randint(1, 4)))
    depth = random.choice([20, 60, 100_000])
    body = f"{'x' * random.choice([0, 9_000])}{{% if n < {depth} %}}{branches}{{% endif %}}"
    return f"{{% macro f(n) %}}{body}{{% endmacro %}}{{{{ f(0) }}}}"


def numbers(random: Random) -> str:
    left, right = (random.choice(["9" * 4000, "9999999", "-7", "1e308", "0"]) for _ in range(2))
    operator = random.choice(["**", "*", "//", "%", "/", "+"])
    loop = f"{{% for i in range(9999) %}}{{% set ns.x = ns.x {operator} {right} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={left}) %}}{loop}{{{{ ns.x }}}}"


def formats(random: Random) -> str:
    made, (value, *_) = _values(random, 1)
    written = random.choice(
        [
            *("'%09999d' * 9000 % 1", "'{:>9999}' * 9000", "percents % a", "braces.format(a)", "strftime_now(a)"),
            *("'{0.__class__.__mro__}'.format(a)", "'{a.__init__.__globals__}'.format_map({'a': namespace})"),
            *("strftime_now('%c' * 90000)", "'%s' * 9000 | format(a)", "'%(a)s' * 9000 % {'a': a}"),
            f"'{{0}}{{0}}'.format({value})",
        ]
    )
    return BIG["a"] + BIG["percents"] + BIG["braces"] + made + f"{{{{ {written} }}}}"


def compiling(random: Random) -> str:
    closed = {"{% if a %}": "{% endif %}", "{% for i in a %}": "{% endfor %}", "{% macro f() %}": "{% endmacro %}"}
    single = ("{{ a }}", "{{ (", "{#", "{% raw %}", "{{ 'a' ~ ", "{{ not ", "-", "{{ [[[[", "{{ 1 + 1 }}", "{{ '\\")
    unit = random.choice([*closed, *single, "{% set a = {'a': 1} %}"])
    close = closed.get(unit, "")
    count = random.choice([90, 3_000, 90_000 // max(1, len(unit) + len(close))])
    return unit * count + close * count


def escapes(random: Random) -> str:
    command = "touch /tmp/polygraft-hostile-template"
    reach = random.choice(
        [
            "''.__class__.__mro__[1].__subclasses__()",
            "namespace.__init__.__globals__['os'].popen(C).read()",
            "(namespace | attr('__init__') | attr('__globals__'))['os'].system(C)",
            "self.__init__.__globals__.__builtins__.__import__('os').system(C)",
            "self._TemplateReference__context.environment.globals",
            "strftime_now.__globals__['json'].decoder.__builtins__['__import__']('os').system(C)",
            "raise_exception.__code__.co_consts",
            "messages[0].__class__.__init__.__globals__",
            "messages.append(messages)",
            "messages[0].update({'role': 'x'})",
            "'{0.__class__.__init__.__globals__}'.format(namespace)",
            "[''] | map(attribute='__class__') | first",
            "[namespace] | map('attr', '__init__') | first",
            "dict.__mro__",
            "(messages | groupby('role'))[0].__class__.__mro__",
            "range.__self__",
            "environment.from_string('x')",
            "messages | tojson | safe | attr('striptags')",
            "namespace(__class__=1)",
            "joiner.__init__.__globals__",
        ]
    )
    return "{{ " + reach.replace("C", repr(command)) + " }}"


def statements(random: Random) -> str:
    return random.choice(
        [
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}{{ os.system('id') }}",
            "{% extends '/etc/passwd' %}",
            "{% from 'x' import y %}",
            "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
            "{% for m in messages %}{% set m.role = 'x' %}{% endfor %}",
            "{% for x in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
            "{% for x in range(9) %}{{ loop.changed(['a' * 1000000] * 90000) }}{{ loop.cycle(1, 2) }}{% endfor %}",
            "{% block a %}{{ self.a() }}{% endblock %}",
            "{% filter upper %}{% for i in range(99999) %}{{ 'a' * 90000 }}{% endfor %}{% endfilter %}",
            "{% call(x) caller() %}{% endcall %}",
            "{% set x %}{% for i in range(99999) %}aaaaaaaaaaaaaaaaaa{% endfor %}{% endset %}{{ x * 9 }}",
        ]
    )


_DRAWN = (filters, methods, tests, silent_work, loops, doubling, recursion, numbers, formats, compiling)
KINDS: Mapping[str, Callable[[Random], str]] = {kind.__name__: kind for kind in (*_DRAWN, escapes, statements)}
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree")


def templates(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Kind and text of so many templates, the kinds in turn."""
    kinds = list(KINDS.items())
    drawn = (kinds[number % len(kinds)] for number in range(count))
    return [(name, kind(Random(f"{seed}/{number}"))) for number, (name, kind) in enumerate(drawn)]


def main(count: int, seed: int) -> None:
    """Render each in this process; print kind, what came of it, seconds of processor, and MiB that the process grew to
    beyond those it began with. Ends with what it did that a template must not."""
    done: list[str] = []
    Chat("{{ messages | tojson }}", {}).render(MESSAGES, add_generation_prompt=True)
    sys.addaudithook(lambda event, args: done.append(event) if event in EVENTS or _writes(event, args) else None)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    for kind, template in templates(count, seed):
        began = time.thread_time()
        try:
            outcome = (
                f"rendered {len(Chat(template, {'bos_token': '<s>'}).render(MESSAGES, add_generation_prompt=True))}"
            )
        except ChatError as error:
            outcome = str(error)[:200]
        grown = (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps([kind, template[:300], outcome, time.thread_time() - began, grown]))
    print(json.dumps(done))


def _writes(event: str, args: tuple[object, ...]) -> bool:
    return event == "open" and len(args) > 1 and isinstance(args[1], str) and not args[1].startswith("r")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
