"""Streams that are asked for again and again while something is done to the service, each compared with what it says
undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from types import TracebackType
from typing import Self

from tests.nodes.fleet import Asked, Said


@dataclass
class Load:
    """A client for each of `texts`, which says what its stream should come to. On leaving, those that run are waited
    for."""

    say: Callable[[Asked], Said]
    texts: Mapping[Asked, str]
    said: list[Said] = field(default_factory=list)
    _stop: Event = field(default_factory=Event)

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(len(self.texts))
        self._clients = [self._pool.submit(self._go_on, asked) for asked in self.texts]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)
        if error is None:
            for client in self._clients:
                client.result()

    @property
    def gap_s(self) -> float:
        """The longest that a client waited for the next piece."""
        return max((one.gap_s for one in self.said), default=0.0)

    def _go_on(self, asked: Asked) -> None:
        while not self._stop.is_set():
            said, text = self.say(asked), self.texts[asked]
            assert not said.broken, f"{asked} ended with an error after {said.text!r}"
            assert said.text == text, f"{asked}: {said.text!r} in place of {text!r}"
            self.said.append(said)


def together(say: Callable[[Asked], Said], asked: Sequence[Asked]) -> dict[Asked, str]:
    """What each says, all at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return {one: said.text for one, said in zip(asked, pool.map(say, asked), strict=True)}
