"""Whether actors answer, without waiting for one: to Ray a process that is stopped is alive, and it raises nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Generic, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayTaskError

EVERY_S = 5.0
STARTING_S = 300.0  # for the first answer: until then its process imports what it needs
K = TypeVar("K", bound=Hashable)


class Answer(Enum):
    """What has come of a call by now."""

    NONE = auto()
    WELL = auto()
    WRONG = auto()  # the actor says that something is
    DEAD = auto()  # the actor is, and whoever holds it knows
    UNREACHED = auto()  # it has started and cannot be called, as when it was stopped before the first call


Ask = Callable[[], Callable[[], Answer]]  # calls an actor; what it returns says what has come of that


def calling(method: Callable[[], ray.ObjectRef[object]]) -> Ask:
    """An actor of Ray's, by the `remote` of its method."""
    return lambda: partial(_answer, method())


@dataclass(frozen=True, slots=True)
class _Asked:
    answer: Callable[[], Answer]
    at: float


class Pings(Generic[K]):
    """Asks each of a changing set of actors every EVERY_S seconds, one call at a time. Who has not answered once, and
    is not known to run, has `starting_s` seconds for it."""

    def __init__(
        self, silent_s: float, *, starting_s: float = STARTING_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._silent_s, self._starting_s, self._clock = silent_s, starting_s, clock
        self._asked: dict[K, _Asked] = {}
        self._answered: dict[K, float] = {}
        self._running: dict[K, float] = {}  # since when it is known that it has started

    def silent(self, asks: Mapping[K, Ask], running: Collection[K] = ()) -> Mapping[K, str]:
        """Who has not answered for `silent_s` seconds, or answered that something is wrong, and in words which; each of
        them is asked anew the next time, as one that starts. An actor that is dead, or that Ray starts again, is not
        silent. `running` are those whose start is known to be over, though they may never have answered here."""
        now = self._clock()
        for gone in (self._asked.keys() | self._running.keys()) - asks.keys():
            self._forget(gone)
        for who in running:
            self._running.setdefault(who, now)
        found = {who: why for who in asks if (why := self._why(who, asks[who], now))}
        for who in found:
            self._forget(who)
        for who in asks.keys() - self._asked.keys() - found.keys():
            if now - self._answered.get(who, -EVERY_S) >= EVERY_S:
                self._asked[who] = _Asked(asks[who](), now)
        return found

    def started(self, who: K) -> bool:
        """Whether it is known that its start is over."""
        return who in self._running

    def _why(self, who: K, ask: Ask, now: float) -> str | None:
        """None of one that is not silent."""
        asked = self._asked.get(who)
        if asked is None:
            return None
        answer = asked.answer()
        if answer is Answer.UNREACHED:
            self._asked[who] = replace(asked, answer=ask())  # and as long ago as before
            self._running.setdefault(who, now)
        if answer in (Answer.NONE, Answer.UNREACHED):
            running = self._running.get(who)
            waited_s = now - (asked.at if running is None else max(asked.at, running))
            if waited_s <= (self._starting_s if running is None else self._silent_s):
                return None
            return f"has {'no process after' if running is None else 'not answered for'} {waited_s:.0f} s"
        del self._asked[who]
        if answer is Answer.WELL:
            self._answered[who] = now
            self._running.setdefault(who, now)
        elif answer is Answer.DEAD:
            self._forget(who)
        return "says that something is wrong" if answer is Answer.WRONG else None

    def _forget(self, who: K) -> None:
        for known in (self._asked, self._answered, self._running):
            known.pop(who, None)


def _answer(call: ray.ObjectRef[object]) -> Answer:
    if not ray.wait([call], timeout=0)[0]:
        return Answer.NONE
    try:
        ray.get(call)
    except RayTaskError:
        return Answer.WRONG
    except ActorUnavailableError as error:
        return Answer.UNREACHED if is_alive(str(error.actor_id)) else Answer.DEAD
    except Exception:
        return Answer.DEAD
    return Answer.WELL


def is_alive(actor_id: str) -> bool:
    """To Ray: its constructor has returned."""
    return told_of(actor_id).get("State") == "ALIVE"


def told_of(actor_id: str) -> Mapping[str, object]:
    """What Ray says of an actor."""
    return ray._private.state.actors(actor_id)  # type: ignore[no-any-return]
