"""How a conversation becomes text: the tokenizer's chat template, rendered as in transformers but within limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property

from jinja2 import Template
from jinja2.utils import Namespace

from polygraft.grafts.text.message import Message
from polygraft.grafts.text.sandbox import Budget, Sandbox

TEMPLATE_CHARACTERS = 64 * 1024


class ChatError(ValueError):
    """A chat template that cannot be read, or that fails on or refuses a conversation."""


class Chat:
    """A chat template and the special tokens it may name (`bos_token`, ...)."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        *,
        budget: Budget = Budget(),
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`clock` is what `strftime_now` in a template reads. Raises ChatError for a template that does not compile."""
        if len(template) > TEMPLATE_CHARACTERS:
            raise ChatError(f"the chat template has {len(template)} characters, more than {TEMPLATE_CHARACTERS}")
        self._special_tokens = dict(special_tokens)

        def strftime_now(form: str) -> str:
            return clock().strftime(form)

        self._sandbox = Sandbox(budget)
        self._sandbox.filters["tojson"] = self._sandbox.guarded("tojson", _tojson)
        self._sandbox.globals["raise_exception"] = _raise_exception
        self._sandbox.globals["namespace"] = _Namespace
        self._sandbox.globals["strftime_now"] = strftime_now
        self._template = self._compiled(template)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of `messages`; with the generation prompt, up to where the assistant starts to write.

        Raises ChatError where the template raises, fails, or goes over its budget.
        """
        if not messages:
            raise ChatError("messages: empty; give at least one message")
        with self._sandbox.metered():
            try:
                return self._template.render(
                    self._special_tokens,
                    messages=[{"role": message.role, "content": message.content} for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                )
            except Exception as error:  # a template can raise anything that Python can
                raise ChatError(f"the chat template refuses the messages: {_reason(error)}") from error

    @cached_property
    def opening(self) -> str:
        """What the template writes before the assistant's text when that is to be generated; "" where nothing can be
        told apart."""
        ask = Message("user", "x")
        for messages in ((ask,), (Message("system", "x"), ask)):
            try:
                asked, opened = (self.render(messages, add_generation_prompt=prompt) for prompt in (False, True))
            except ChatError:
                continue
            return opened.removeprefix(asked) if opened.startswith(asked) else ""
        return ""

    def _compiled(self, template: str) -> Template:
        with self._sandbox.metered():
            try:
                return self._sandbox.from_string(template)
            except Exception as error:  # not only TemplateSyntaxError: nesting too deep is a RecursionError
                raise ChatError(f"the chat template cannot be read: {_reason(error)}") from error


class _Namespace(Namespace):
    """Jinja's, without the attributes that would lead into Python's internals."""

    def __init__(*args: object, **kwargs: object) -> None:  # so that `namespace(self=1)` works, as in Jinja
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise ChatError(f"namespace: {name!r} starts with an underscore")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which is not wanted in a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise ChatError(str(message)[:500])


def _reason(error: Exception) -> str:
    return f"{error}"[:500] if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"[:500]
