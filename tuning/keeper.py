"""Keeps the service's searches going: begins their drivers, begins them again when they die, and ends what is over.

What it knows is in the store, so that whoever keeps them next goes on: a driver that begins again reads its study's
record, takes over the jobs of its running trials, and asks for the rest. Of two drivers of one study the second to
write is refused. Only so many searches of all tenants have one at once; the others wait, and say so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from polygraft.cluster.advance import advance_job
from polygraft.cluster.api_keys import create_key, list_keys, revoke_key
from polygraft.cluster.events import JobCancelRequested
from polygraft.cluster.model import Search, StudyId
from polygraft.cluster.states import IllegalTransition, SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Append, Conflict, Store, Versioned, Write

STARTS = 20  # drivers of one search; who needs more has a fault of its own
PAUSE_S = 5.0  # between a driver's death and the next one

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """A driver that is over. `note`: why its search ended early. `fault`: it died, or could not go on; `for_good` if
    another one would not get further."""

    note: str | None = None
    fault: str | None = None
    for_good: bool = False


class Driver(Protocol):
    """Runs one search somewhere else."""

    def ended(self) -> Ended | None:
        """None while it runs."""
        ...

    def kill(self) -> None: ...


def in_turn(waiting: Sequence[Search], driven: Sequence[Search], places: int) -> list[Search]:
    """Which of the searches that wait get so many places beside those that have theirs: first who had a driver before,
    since its trials train, then whose tenant has the fewest, then the oldest."""
    held, left = Counter(search.tenant for search in driven), list(waiting)
    chosen: list[Search] = []
    while left and len(chosen) < places:
        first = min(left, key=lambda search: (not search.starts, held[search.tenant], search.created_at, search.id))
        left.remove(first)
        chosen.append(first)
        held[first.tenant] += 1
    return chosen


class Keeper:
    """`begin(search, key)` starts a driver that calls the service with this API key, which lives as long as it; at most
    `most` are there at once."""

    def __init__(
        self, store: Store, begin: Callable[[Search, str], Driver], clock: Callable[[], float], *, most: int
    ) -> None:
        self._store = store
        self._begin = begin
        self._clock = clock
        self._most = most
        self._drivers: dict[StudyId, Driver] = {}
        self._not_before: dict[StudyId, float] = {}

    def tick(self) -> None:
        """Look at every running search once. Raises what the store raises, except that a search which another writer
        changed meanwhile is left for the next time."""
        waiting: dict[StudyId, Versioned[Search]] = {}
        driven: list[Search] = []
        for found in self._store.newest(keys.RUNNING_SEARCHES):
            with suppress(Conflict):
                if self._is_over(found):
                    continue
                if found.value.id in self._drivers:
                    driven.append(found.value)
                else:
                    waiting[found.value.id] = found
        free = self._most - len(self._drivers)
        for search in in_turn([found.value for found in waiting.values()], driven, free):
            found = waiting.pop(search.id)
            if self._clock() >= self._not_before.get(search.id, 0.0):  # else it keeps its place
                with suppress(Conflict):
                    self._start(found)
        for found in waiting.values():
            with suppress(Conflict):
                self._wait(found)

    def stop(self) -> None:
        """Kill the drivers; their searches go on wherever they are kept next."""
        for driver in self._drivers.values():
            driver.kill()
        self._drivers.clear()

    def _is_over(self, found: Versioned[Search]) -> bool:
        """Whether the search is, which is written down; else it has a driver or needs one."""
        search = found.value
        driver = self._drivers.get(search.id)
        ended = None if driver is None else driver.ended()
        if search.cancel_requested:
            if driver is not None:
                driver.kill()
            self._cancel_jobs(search)
            self._finish(found, SearchState.CANCELLED, None)
            return True
        if ended is None:
            return False
        del self._drivers[search.id]
        if ended.fault is None:
            self._finish(found, SearchState.SUCCEEDED, ended.note)
            return True
        if ended.for_good or search.starts >= STARTS:
            self._cancel_jobs(search)
            self._finish(found, SearchState.FAILED, ended.fault)
            return True
        _LOG.warning("the driver of %s ended: %s; another one goes on", search.id, ended.fault)
        self._not_before[search.id] = self._clock() + PAUSE_S
        return False

    def _start(self, found: Versioned[Search]) -> None:
        search = replace(found.value, starts=found.value.starts + 1, note=None)
        self._store.commit([Write(found.key, search, found.version)])
        self._revoke(search)
        _, key = create_key(self._store, tenant=search.tenant, name=_key_name(search), at=self._clock())
        self._drivers[search.id] = self._begin(search, key)

    def _wait(self, found: Versioned[Search]) -> None:
        note = f"waits until another search ends: {self._most} run at once, of all tenants (limits.searches)"
        if found.value.note != note:
            self._say(found, replace(found.value, note=note), note)

    def _finish(self, found: Versioned[Search], state: SearchState, note: str | None) -> None:
        over = replace(found.value, state=state, note=note, finished_at=self._clock())
        self._say(found, over, state.value + (f": {note}" if note else ""))
        self._drivers.pop(over.id, None)
        self._revoke(over)

    def _say(self, found: Versioned[Search], search: Search, message: str) -> None:
        entry = Append(keys.search_log(search.id), {"message": message, "at": self._clock(), "trial": None})
        self._store.commit([Write(found.key, search, found.version)], appends=[entry])

    def _cancel_jobs(self, search: Search) -> None:
        """The jobs of the search's trials that are not over."""
        for job in self._store.newest(keys.unfinished_jobs_of(search.tenant)):
            if (job.value.owner or "").startswith(f"{search.id}/") and not job.value.cancel_requested:
                try:
                    advance_job(self._store, JobCancelRequested(job=job.value.id, at=self._clock()))
                except IllegalTransition:
                    continue  # it ended by itself just before

    def _revoke(self, search: Search) -> None:
        """The keys of drivers before."""
        for key in list_keys(self._store, search.tenant):
            if key.name == _key_name(search) and key.revoked_at is None:
                revoke_key(self._store, key.id, at=self._clock())


def _key_name(search: Search) -> str:
    return f"driver of {search.id}"
