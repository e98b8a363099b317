"""Regular expressions of a config that somebody else wrote, in bounded time and memory: RE2's, which are linear in what
they are matched with (docs/adr/0009-patterns-by-re2.md)."""

from __future__ import annotations

from time import thread_time

import re2

from polygraft.grafts.spec import SpecError

_SECONDS = 0.5
_BYTES = 1 << 20  # that RE2 may take for one expression


class Patterns:
    """The expressions of one config. All of them together have half a second of this thread's processor time."""

    def __init__(self) -> None:
        self._until = thread_time() + _SECONDS
        self._made: dict[str, re2._Regexp] = {}
        self._options = re2.Options()
        self._options.log_errors = False
        self._options.max_mem = _BYTES

    def match(self, field: str, expression: str, place: str) -> re2._Match | None:
        """Of the whole place, as `re.fullmatch`.

        Raises SpecError for an expression that RE2 does not read (it has no lookaround and no references back), and
        when the time is over.
        """
        if thread_time() > self._until:
            raise SpecError(f"{field}: its patterns take more than {_SECONDS} s; name the modules")
        if expression not in self._made:
            try:
                self._made[expression] = re2.compile(expression, self._options)
            except re2.error as error:
                why = error.args[0].decode(errors="replace")[:100]
                raise SpecError(
                    f"{field}: {expression[:200]!r} is not a regular expression that is read here: {why}"
                ) from None
        return self._made[expression].fullmatch(place)
