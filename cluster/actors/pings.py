"""Whether actors answer, without waiting for one: to Ray a process that is stopped is alive, and it raises nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import ray
from ray.exceptions import RayTaskError

EVERY_S = 5.0
STARTING_S = 300.0  # for the first answer: until then its process imports what it needs
K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Asked:
    call: ray.ObjectRef[object]
    at: float


class Pings(Generic[K]):
    """Asks each of a changing set of actors every EVERY_S seconds, one call at a time."""

    def __init__(self, silent_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent_s, self._clock = silent_s, clock
        self._asked: dict[K, _Asked] = {}
        self._answered: dict[K, float] = {}

    def silent(self, asks: Mapping[K, Callable[[], ray.ObjectRef[object]]]) -> Collection[K]:
        """Who has not answered for `silent_s` seconds, or answered that something is wrong; each of them is asked anew
        from here on, as one that starts. An actor that is dead, or that Ray starts again, is not silent."""
        now = self._clock()
        for gone in self._asked.keys() - asks.keys():
            self._forget(gone)
        found = [who for who in asks if self._is_silent(who, now)]
        for who in found:
            self._forget(who)
        for who, ask in asks.items():
            if who not in self._asked and now - self._answered.get(who, -EVERY_S) >= EVERY_S:
                self._asked[who] = _Asked(ask(), now)
        return found

    def _is_silent(self, who: K, now: float) -> bool:
        asked = self._asked.get(who)
        if asked is None:
            return False
        if not ray.wait([asked.call], timeout=0)[0]:
            return now - asked.at > (self._silent_s if who in self._answered else STARTING_S)
        del self._asked[who]
        try:
            ray.get(asked.call)
        except RayTaskError:
            return True
        except Exception:
            self._answered.pop(who, None)  # it is dead, and whoever holds it knows
            return False
        self._answered[who] = now
        return False

    def _forget(self, who: K) -> None:
        self._asked.pop(who, None)
        self._answered.pop(who, None)
