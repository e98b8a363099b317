"""Random calls of a store against a dictionary: versions, deletions and fences, in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polygraft.cluster.model import Job
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict, Fence, Fenced, Key, Store, Write
from tests.cluster.builders import make_job

NAMES = st.sampled_from(["a", "b", "c"])
EXPECTED = st.sampled_from(["current", "stale", "absent", "any"])


def machine(store: Store) -> Callable[[], RuleBasedStateMachine]:
    """Machines on `store`, each with keys and scopes of its own."""
    numbers = count()
    return lambda: StoreMachine(store, next(numbers))


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, store: Store, number: int) -> None:
        super().__init__()
        self.store = store
        self.number = number
        self.records: dict[Key[Job], tuple[Job, int]] = {}
        self.epochs: dict[str, int] = {}
        self.newest = 0

    @rule(name=NAMES, step=st.integers(0, 99), expected=EXPECTED, delete=st.booleans())
    def write(self, name: str, step: int, expected: str, delete: bool) -> None:
        key, job = self.job(name, step)
        self.attempt(key, None if delete else job, self.version(key, expected), None)

    @rule(name=NAMES, step=st.integers(0, 99), scope=NAMES, behind=st.integers(0, 2))
    def fenced_write(self, name: str, step: int, scope: str, behind: int) -> None:
        key, job = self.job(name, step)
        fence = Fence(self.scope(scope), max(1, self.epochs.get(scope, 0) - behind))
        if fence.epoch != self.epochs.get(scope, 0):
            with pytest.raises(Fenced):
                self.store.commit([Write(key, job, None)], fence=fence)
        else:
            self.attempt(key, job, None, fence)

    @rule(scope=NAMES, steal=st.booleans(), holder=NAMES)
    def acquire(self, scope: str, steal: bool, holder: str) -> None:
        lease = self.store.acquire(self.scope(scope), holder, 60.0, steal=steal)
        if lease is not None:
            self.epochs[scope] = self.epochs.get(scope, 0) + 1
            assert lease.epoch == self.epochs[scope]
        else:
            assert not steal and scope in self.epochs

    @rule(first=NAMES, second=NAMES)
    def write_two_of_which_one_is_stale(self, first: str, second: str) -> None:
        writes = [Write(self.job(first, 1)[0], self.job(first, 1)[1], None)]
        key, job = self.job(second, 2)
        writes.append(Write(key, job, self.version(key, "stale")))
        with pytest.raises(Conflict):
            self.store.commit(writes)

    @invariant()
    def the_store_holds_what_was_written(self) -> None:
        for name in ("a", "b", "c"):
            key = self.job(name, 0)[0]
            found = self.store.get(key)
            assert (None if found is None else (found.value, found.version)) == self.records.get(key)

    def attempt(self, key: Key[Job], job: Job | None, expected: int | None, fence: Fence | None) -> None:
        current = self.records[key][1] if key in self.records else 0
        if expected not in (None, current):
            with pytest.raises(Conflict):
                self.store.commit([Write(key, job, expected)], fence=fence)
            return
        version = self.store.commit([Write(key, job, expected)], fence=fence).version
        assert version > self.newest
        self.newest = version
        if job is None:
            self.records.pop(key, None)
        else:
            self.records[key] = (job, version)

    def version(self, key: Key[Job], kind: str) -> int | None:
        current = self.records[key][1] if key in self.records else 0
        return {"current": current, "stale": current + 1_000_000, "absent": 0, "any": None}[kind]

    def job(self, name: str, step: int) -> tuple[Key[Job], Job]:
        job = replace(make_job(f"{self.number}-{name}"), step=step)
        return keys.job(job.id), job

    def scope(self, name: str) -> str:
        return f"{self.number}/{name}"
