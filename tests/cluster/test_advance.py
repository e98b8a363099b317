"""An event and the record it changes are written together, whoever else writes meanwhile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from polygraft.cluster.advance import advance_job, advance_pack, record_progress, swap
from polygraft.cluster.events import JobAdmitted, JobCancelRequested, JobStarted, PackOpened, PackOpening
from polygraft.cluster.model import START, DeviceId, JobId, PackId
from polygraft.cluster.states import IllegalTransition, JobState, PackState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Append, Conflict, Fence, Fenced, Store, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import make_job, make_pack, running

A, P = JobId("ftjob-a"), PackId("pack-p")
ADMITTED = JobAdmitted(job=A, pack=P, at=2.0)
OPENING = PackOpening(
    pack=P, backbone="b", devices=(DeviceId("d"),), bytes=500, epoch=1, reason=Reason.JOBS_WAIT, at=1.0
)


@pytest.fixture
def store() -> Store:
    store = MemoryStore()
    store.commit([Write(keys.job(A), make_job(), 0)])
    return store


def test_the_record_the_event_and_the_command_are_written(store: Store) -> None:
    job = advance_job(store, ADMITTED, appends=[Append(keys.commands(P), {"op": "admit", "job": A})])
    assert job == store.get(keys.job(A)).value == make_job(pack=P, admitted_at=2.0)  # type: ignore[union-attr]
    assert [one.event for one in store.events(START)] == [ADMITTED]
    assert [entry for _, entry in store.read(keys.commands(P))] == [{"op": "admit", "job": A}]


def test_an_event_that_cannot_be_leaves_nothing_behind(store: Store) -> None:
    with pytest.raises(IllegalTransition):
        advance_job(store, JobStarted(job=A, pack=P, parameters=1, steps_total=1, at=1.0))
    assert store.events(START) == []


def test_another_writer_in_between_is_not_overwritten(store: Store) -> None:
    racing = RacingStore(store)
    job = advance_job(racing, ADMITTED)  # type: ignore[arg-type]
    assert job == make_job(pack=P, admitted_at=2.0, step=77)


def test_an_absent_record_is_an_illegal_transition() -> None:
    store = MemoryStore()
    with pytest.raises(IllegalTransition, match="absent"):
        advance_job(store, ADMITTED)
    with pytest.raises(IllegalTransition, match="absent"):
        advance_pack(store, PackOpened(pack=P, at=1.0))
    with pytest.raises(IllegalTransition, match="absent"):
        record_progress(store, A, step=1, trained_tokens=1)


def test_a_pack_opens_once(store: Store) -> None:
    assert advance_pack(store, OPENING) == make_pack(state=PackState.OPENING)
    with pytest.raises(IllegalTransition):
        advance_pack(store, OPENING)
    assert advance_pack(store, PackOpened(pack=P, at=2.0)) == make_pack()


def test_a_fenced_writer_changes_nothing(store: Store) -> None:
    with pytest.raises(Fenced):
        advance_job(store, JobCancelRequested(job=A, at=1.0), fence=Fence("controller", 1))
    assert store.get(keys.job(A)).value == make_job()  # type: ignore[union-attr]


def test_progress_has_no_event_and_keeps_the_losses_it_is_not_given(store: Store) -> None:
    store.commit([Write(keys.job(A), running("a"), None)])
    record_progress(store, A, step=1, trained_tokens=10, loss_before=2.0)
    record_progress(store, A, step=2, trained_tokens=20, loss_before=math.nan, loss_after=math.inf)
    expected = replace(running("a"), step=2, trained_tokens=20, loss_before=2.0)
    assert store.get(keys.job(A)).value == expected  # type: ignore[union-attr]
    assert store.events(START) == []


def test_a_finished_job_makes_no_progress(store: Store) -> None:
    store.commit([Write(keys.job(A), make_job(state=JobState.CANCELLED), None)])
    with pytest.raises(IllegalTransition):
        record_progress(store, A, step=1, trained_tokens=10)


def test_a_swap_gives_up_when_others_are_always_faster(store: Store) -> None:
    racing = RacingStore(store, races=10**6)
    with pytest.raises(Conflict):
        swap(racing, keys.job(A), lambda found: replace(found, step=1) if found else make_job())  # type: ignore[arg-type]


class RacingStore:
    """A store where another writer changes the job between every read and the next write, `races` times."""

    def __init__(self, store: Store, races: int = 1) -> None:
        self._store = store
        self._races = races

    def get(self, key: object) -> object:
        found = self._store.get(keys.job(A))
        if self._races and found is not None:
            self._races -= 1
            self._store.commit([Write(keys.job(A), replace(found.value, step=77), None)])
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)
