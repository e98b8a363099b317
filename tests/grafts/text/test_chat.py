"""Chat templates render as in transformers, and hostile ones end in an error, soon and in little memory."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from polygraft.grafts.text.chat import Chat, ChatError
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.sandbox import Budget

MESSAGES = (Message("system", "Be <brief>."), Message("user", " Hi\n\n"), Message("assistant", "Grüße 👋"))
PLAIN = [{"role": message.role, "content": message.content} for message in MESSAGES]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str, budget: Budget = Budget()) -> str:
    return Chat(template, TOKENS, budget=budget).render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
        "{%- for m in messages %}\n    {%- if loop.last %}{% continue %}{% endif %}\n  {{ m.content }}\n{%- endfor -%}",
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n  U: {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n * 2 ** 3 }}",
        "{% macro turn(m) %}<{{ m.role ~ ':' ~ loop }}>{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{{ messages | tojson }}{{ {'a': '<', 'b': [1, (2, none)]} | tojson(indent=2) }}{{ tools is none }}",
        "{{ messages | map(attribute='content') | join('|') | replace('i', 'y') | indent(4) }}{{ '%-5s|' % 'ab' }}",
        "{{ messages[1:] | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a,b'.split(',')[-1] }}",
        "{% generation %}{% set a = 1 %}{{ messages[-1]['content'] }}{% endgeneration %}{{ a is defined }}",
        "{% set x %}{{ messages[0].content }}!{% endset %}{{ x * 3 }}{{ [1, 2] + [3] }}{{ ('a', 'b')[1] }}",
        "{% if add_generation_prompt %}{{ missing }}go{% endif %}{% filter upper %}abc{% endfilter %}",
        "{% for key, value in messages[0].items() %}{{ key }}={{ '{:>5}'.format(value[:3]) }};{% endfor %}",
    ],
)
def test_a_template_renders_as_in_transformers(template: str) -> None:
    rendered, _ = render_jinja_template([PLAIN], chat_template=template, add_generation_prompt=True, **TOKENS)  # type: ignore[arg-type,str-unpack]
    assert render(template) == rendered[0]


def test_the_date_is_the_clocks() -> None:
    chat = Chat("{{ strftime_now('%Y-%m') }}", {}, clock=lambda: datetime(1999, 12, 31))
    assert chat.render(MESSAGES, add_generation_prompt=False) == "1999-12"


def test_what_the_template_raises_is_told() -> None:
    with pytest.raises(ChatError, match="refuses the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_no_messages_are_an_error() -> None:
    with pytest.raises(ChatError, match="messages: empty"):
        Chat("x", {}).render((), add_generation_prompt=True)


GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}{{ ns.x }}"
MEGABYTE = "{% set a = 'a' * 1000000 %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "a long list": "{{ ([1] * 100000000) | length }}",
    "a tower of powers": "{{ 9 ** (9 ** 9) }}",
    "squaring": GROW.replace("'aaaaaaaaaa'", "3").replace("GROWN", "ns.x * ns.x"),
    "doubling by ~": GROW.replace("GROWN", "ns.x ~ ns.x"),
    "doubling by +": GROW.replace("GROWN", "ns.x + ns.x"),
    "doubling a list": GROW.replace("GROWN", "[ns.x, ns.x]"),
    "doubling a dict": GROW.replace("GROWN", "{'a': ns.x, 'b': ns.x}"),
    "doubling by capture": GROW.replace(
        "{% set ns.x = GROWN %}", "{% set y %}{{ ns.x * 2 }}{% endset %}{% set ns.x = y %}"
    ),
    "a wide filter": "{{ 'a' | center(1000000000) }}",
    "a wide method": "{{ 'a'.ljust(1000000000) }}",
    "a wide format": "{{ '%0999999999d' % 1 }}",
    "a wide format method": "{{ '{:999999999}'.format(1) }}",
    "a computed width": "{% set ns = namespace(w=99999999) %}{{ '{:{0.w}}'.format(ns) }}",
    "replacement": MEGABYTE + "{{ a | replace('a', a) }}",
    "replacement by method": MEGABYTE + "{{ a.replace('a', a) }}",
    "indentation": "{{ ('a\n' * 1000000) | indent(90000) }}",
    "joining": MEGABYTE + "{{ ([a] * 100000) | join('') }}",
    "joining lazily": MEGABYTE + "{{ ([{'c': a}] * 100000) | map(attribute='c') | join('') }}",
    "joining lazily by method": MEGABYTE + "{{ ''.join(([{'c': a}] * 100000) | map(attribute='c')) }}",
    "writing JSON": MEGABYTE + "{{ ([a] * 100000) | tojson }}",
    "printing a list": MEGABYTE + "{{ [a] * 100000 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) if n < 40 }}{% endmacro %}{{ f(0) }}",
    "much literal text": "{% macro f(n) %}" + "x" * 60_000 + "{% if n < 12 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}"
    "{% endmacro %}{{ f(0) }}",
    "a slow codec": MEGABYTE + "{{ a.encode('idna') }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "attributes by filter": "{{ ('' | attr('__class__')).x }}",
    "a private name in a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
    "deep nesting": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "wrong syntax": "{% for %}",
    "too long": "a" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error_soon(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(ChatError):
        render(HOSTILE[name], Budget(steps=200_000, characters=4_000_000, seconds=2.0))
    assert time.monotonic() - began < 10  # the deadline of 2 s, one operation, and a busy machine


def test_a_template_stops_at_its_deadline() -> None:
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatError, match=r"runs longer than 0.05 s"):
        render(template, Budget(steps=10**12, seconds=0.05))


def test_a_rendering_has_the_whole_budget_whatever_the_ones_before_it_spent() -> None:
    chat = Chat("{% for i in range(600) %}{% endfor %}x", {}, budget=Budget(steps=3_000))
    assert [chat.render(MESSAGES, add_generation_prompt=False) for _ in range(20)] == ["x"] * 20
