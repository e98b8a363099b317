"""What every store must do. A back end's test inherits StoreContract and supplies the `store` fixture."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from polygraft.cluster import evolve
from polygraft.cluster.advance import swap
from polygraft.cluster.events import AliasMoved, DeviceJoined, Event, JobAdmitted, JobFailed, JobSubmitted
from polygraft.cluster.model import (
    START,
    Alias,
    JobError,
    JobId,
    PackId,
    Snapshot,
    Study,
    StudyId,
    TenantId,
)
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import (
    Append,
    Conflict,
    Fence,
    Fenced,
    IdempotencyConflict,
    Key,
    Store,
    StoredEvent,
    StreamKey,
    Write,
)
from polygraft.cluster.store.codec import CodecError
from tests.cluster.builders import make_device, make_job, make_pack
from tests.contracts.store_machine import machine

A = make_job("a")
B = make_job("b")
STREAM = StreamKey("job/a/metrics")
T = TypeVar("T")


def event(n: int) -> AliasMoved:
    return AliasMoved(tenant=TenantId("t"), name="n", version=n, at=float(n))


def versions(events: list[StoredEvent]) -> list[int]:
    return [one.event.version for one in events if isinstance(one.event, AliasMoved)]


class StoreContract:
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("a back end's test supplies the store")

    def test_a_record_is_read_as_it_was_written(self, store: Store) -> None:
        committed = store.commit([Write(keys.job(A.id), A, 0)])
        found = store.get(keys.job(A.id))
        assert found is not None and (found.key, found.value, found.version) == (keys.job(A.id), A, committed.version)

    def test_an_absent_record_is_none(self, store: Store) -> None:
        assert store.get(keys.job(A.id)) is None

    def test_a_record_that_must_not_exist_is_not_overwritten(self, store: Store) -> None:
        version = store.commit([Write(keys.job(A.id), A, 0)]).version
        with pytest.raises(Conflict) as caught:
            store.commit([Write(keys.job(A.id), replace(A, step=1), 0)])
        assert (caught.value.key, caught.value.expected, caught.value.found) == (keys.job(A.id), 0, version)
        assert store.get(keys.job(A.id)).value == A  # type: ignore[union-attr]

    def test_a_stale_version_is_refused(self, store: Store) -> None:
        old = store.commit([Write(keys.job(A.id), A, 0)]).version
        new = store.commit([Write(keys.job(A.id), replace(A, step=1), old)]).version
        assert new > old
        with pytest.raises(Conflict):
            store.commit([Write(keys.job(A.id), replace(A, step=2), old)])

    def test_an_unconditional_write_always_wins(self, store: Store) -> None:
        for step in range(3):
            store.commit([Write(keys.job(A.id), replace(A, step=step), None)])
        assert store.get(keys.job(A.id)).value.step == 2  # type: ignore[union-attr]

    def test_a_recreated_record_is_not_taken_for_the_deleted_one(self, store: Store) -> None:
        old = store.commit([Write(keys.job(A.id), A, 0)]).version
        store.commit([Write(keys.job(A.id), None, old)])
        assert store.get(keys.job(A.id)) is None
        store.commit([Write(keys.job(A.id), A, 0)])
        with pytest.raises(Conflict):
            store.commit([Write(keys.job(A.id), replace(A, step=1), old)])

    def test_a_refused_commit_leaves_no_trace(self, store: Store) -> None:
        store.commit([Write(keys.job(A.id), A, 0)], [event(1)])
        with pytest.raises(Conflict):
            store.commit(
                [Write(keys.job(B.id), B, 0), Write(keys.job(A.id), A, 0)],
                [event(2)],
                appends=[Append(STREAM, {"n": 1})],
            )
        assert store.get(keys.job(B.id)) is None
        assert versions(store.events(START)) == [1]
        assert store.read(STREAM) == []

    def test_records_events_and_appends_arrive_together(self, store: Store) -> None:
        committed = store.commit(
            [Write(keys.job(A.id), A, 0), Write(keys.job(B.id), B, 0)],
            [event(1), event(2)],
            appends=[Append(STREAM, {"n": 1}), Append(StreamKey("other"), {"n": 2}, maxlen=10)],
        )
        assert [one.value for one in store.scan(keys.JOBS)] == [A, B]
        assert tuple(one.id for one in store.events(START)) == committed.events
        assert [entry for _, entry in store.read(STREAM)] == [{"n": 1}]
        assert [entry for _, entry in store.read(StreamKey("other"))] == [{"n": 2}]

    def test_a_scan_is_in_key_order_and_goes_on_where_it_stopped(self, store: Store) -> None:
        jobs = [make_job(name) for name in ("c", "a", "e", "b", "d")]
        store.commit([Write(keys.job(job.id), job, 0) for job in jobs])
        pack = make_pack()
        store.commit([Write(keys.pack(pack.id), pack, 0)])
        first = store.scan(keys.JOBS, limit=2)
        rest = store.scan(keys.JOBS, after=first[-1].key)
        assert [one.value.id[-1] for one in first + rest] == ["a", "b", "c", "d", "e"]
        store.commit([Write(keys.job(jobs[0].id), None, None)])
        assert [one.value.id[-1] for one in store.scan(keys.JOBS)] == ["a", "b", "d", "e"]

    def test_one_tenants_records_are_not_in_another_tenants_scan(self, store: Store) -> None:
        for tenant in ("t", "t2"):
            alias = Alias(tenant=TenantId(tenant), name="n", version=1, latest=1)
            store.commit([Write(keys.alias(alias.tenant, "n"), alias, 0)])
        assert [one.value.tenant for one in store.scan(keys.aliases(TenantId("t")))] == ["t"]

    def test_a_tenants_records_are_listed_newest_first_page_by_page(self, store: Store) -> None:
        jobs = [make_job(name, created_at=at) for name, at in (("b", 2.0), ("a", 2.0), ("c", 10.5), ("d", 9.0))]
        other = make_job("z", tenant="t2", created_at=99.0)
        for job in (*jobs, other):
            store.commit([Write(keys.job(job.id), job, 0)])
        mine, unfinished = keys.jobs_of(A.tenant), keys.unfinished_jobs_of(A.tenant)
        first = store.newest(mine, limit=2)
        rest = store.newest(mine, before=first[-1].value)
        assert [one.value.id[-1] for one in first + rest] == ["c", "d", "b", "a"]
        assert first[0] == store.get(keys.job(jobs[2].id))
        assert (store.count(mine), store.count(unfinished), store.count(keys.jobs_of(TenantId("nobody")))) == (4, 4, 0)

    def test_a_record_leaves_a_list_with_what_put_it_there_or_when_it_is_deleted(self, store: Store) -> None:
        for job in (A, B):
            store.submit(None, "", [Write(keys.job(job.id), job, 0)])
        mine, unfinished = keys.jobs_of(A.tenant), keys.unfinished_jobs_of(A.tenant)
        swap(store, keys.job(A.id), lambda found: replace(A, state=JobState.CANCELLED))
        assert [one.value.id for one in store.newest(unfinished)] == [B.id]
        assert (store.count(mine), store.count(unfinished)) == (2, 1)
        store.commit([Write(keys.job(B.id), None, None)])
        assert [one.value.id for one in store.newest(mine)] == [A.id] and store.count(unfinished) == 0
        with pytest.raises(Conflict):
            store.commit([Write(keys.job(B.id), B, 7)])
        assert store.count(unfinished) == 0

    def test_a_record_of_another_kind_is_refused(self, store: Store) -> None:
        with pytest.raises(CodecError, match="expected a Pack, found a Job"):
            store.commit([Write(keys.pack(PackId("p")), A, 0)])
        with pytest.raises(ValueError, match="names no kind of record"):
            store.commit([Write(Key("secret/x"), A, 0)])

    def test_events_are_ordered_and_read_page_by_page(self, store: Store) -> None:
        for n in range(7):
            store.commit([], [event(2 * n), event(2 * n + 1)])
        seen: list[StoredEvent] = []
        position = START
        while page := store.events(position, limit=5):
            seen += page
            position = page[-1].id
        assert versions(seen) == list(range(14))
        assert len({one.id for one in seen}) == 14
        assert [one.at for one in seen] == sorted(one.at for one in seen)

    def test_trimmed_events_are_gone_and_the_rest_stays(self, store: Store) -> None:
        ids = [store.commit([], [event(n)]).events[0] for n in range(5)]
        store.trim(ids[3])
        assert versions(store.events(START)) == [3, 4]
        store.commit([], [event(5)])
        assert versions(store.events(ids[3])) == [4, 5]

    def test_a_waiting_reader_gets_the_next_event(self, store: Store) -> None:
        position = store.commit([], [event(1)]).events[0]
        found = during(lambda: store.events(position, wait_s=60.0), lambda: store.commit([], [event(2)]))
        assert versions(found) == [2]

    def test_a_reader_stops_waiting_in_time(self, store: Store) -> None:
        began = time.monotonic()
        assert store.events(START, wait_s=0.2) == [] and store.read(STREAM, wait_s=0.2) == []
        assert 0.3 < time.monotonic() - began < 20.0

    def test_a_waiting_reader_keeps_nobody_else_waiting(self, store: Store) -> None:
        def work() -> float:
            began = time.monotonic()
            store.commit([Write(keys.job(A.id), A, None)])
            assert store.get(keys.job(A.id)) is not None
            took = time.monotonic() - began
            store.append(STREAM, {"n": 1})
            return took

        took: list[float] = []
        assert during(lambda: store.read(STREAM, wait_s=60.0), lambda: took.append(work()))
        assert took[0] < 20.0

    def test_stream_entries_are_read_in_order_from_a_position(self, store: Store) -> None:
        ids = [store.append(STREAM, {"step": n, "nested": {"a": [1, None, "x"]}}) for n in range(5)]
        found = store.read(STREAM, ids[1], limit=2)
        assert [id for id, _ in found] == ids[2:4]
        assert [entry for _, entry in found] == [{"step": n, "nested": {"a": [1, None, "x"]}} for n in (2, 3)]
        assert store.read(StreamKey("nothing")) == []

    def test_a_stream_forgets_its_oldest_entries_beyond_its_length(self, store: Store) -> None:
        for n in range(500):
            store.append(STREAM, {"n": n}, maxlen=50)
        kept = [entry["n"] for _, entry in store.read(STREAM)]
        assert 50 <= len(kept) < 400 and kept == list(range(500 - len(kept), 500))

    def test_numbers_that_are_not_finite_become_null_in_a_stream(self, store: Store) -> None:
        store.append(STREAM, {"loss": math.nan, "norm": math.inf, "lr": 0.5})
        assert store.read(STREAM)[0][1] == {"loss": None, "norm": None, "lr": 0.5}

    def test_a_repeated_submission_gives_the_first_ones_key(self, store: Store) -> None:
        submitted = [JobSubmitted(record=A, at=1.0)]
        first = store.submit("t/1", "digest", [Write(keys.job(A.id), A, 0)], submitted)
        again = store.submit("t/1", "digest", [Write(keys.job(B.id), B, 0)], [JobSubmitted(record=B, at=1.0)])
        assert (first.created, first.key) == (True, keys.job(A.id))
        assert (again.created, again.key) == (False, keys.job(A.id))
        assert [one.event for one in store.events(START)] == submitted
        assert store.get(keys.job(B.id)) is None
        assert store.submitted("t/1", "digest") == keys.job(A.id) and store.submitted("t/2", "digest") is None

    def test_an_idempotency_key_is_for_one_request(self, store: Store) -> None:
        store.submit("t/1", "digest", [Write(keys.job(A.id), A, 0)])
        with pytest.raises(IdempotencyConflict, match="'t/1' was used for a different request"):
            store.submit("t/1", "other", [Write(keys.job(B.id), B, 0)])
        with pytest.raises(IdempotencyConflict, match="'t/1' was used for a different request"):
            store.submitted("t/1", "other")
        assert store.submit("t2/1", "other", [Write(keys.job(B.id), B, 0)]).created

    def test_submissions_without_a_key_are_all_new(self, store: Store) -> None:
        assert store.submit(None, "digest", [Write(keys.job(A.id), A, 0)]).created
        assert store.submit(None, "digest", [Write(keys.job(B.id), B, 0)]).created
        with pytest.raises(Conflict):
            store.submit(None, "digest", [Write(keys.job(B.id), B, 0)])

    def test_a_refused_submission_can_be_repeated(self, store: Store) -> None:
        store.commit([Write(keys.job(A.id), A, 0)])
        with pytest.raises(Conflict):
            store.submit("t/1", "digest", [Write(keys.job(A.id), A, 0)])
        assert store.submitted("t/1", "digest") is None
        assert store.submit("t/1", "digest", [Write(keys.job(B.id), B, 0)]).created

    def test_a_lease_is_one_holders_until_it_is_released(self, store: Store) -> None:
        lease = store.acquire("controller", "one", 30.0)
        assert lease is not None and store.acquire("controller", "two", 30.0) is None
        assert store.renew(lease)
        assert store.acquire("another scope", "two", 30.0) is not None
        store.release(lease)
        next_ = store.acquire("controller", "two", 30.0)
        assert next_ is not None and next_.epoch > lease.epoch
        assert not store.renew(lease)

    def test_a_lease_that_ran_out_goes_to_the_next(self, store: Store) -> None:
        lease = store.acquire("controller", "one", 0.05)
        assert lease is not None
        time.sleep(0.1)
        assert store.renew(lease), "nobody else took it"
        time.sleep(0.1)
        assert store.acquire("controller", "two", 30.0) is not None
        assert not store.renew(lease)

    def test_a_holder_that_comes_back_gets_a_new_epoch(self, store: Store) -> None:
        first = store.acquire("controller", "one", 30.0)
        second = store.acquire("controller", "one", 30.0)
        assert first and second and second.epoch > first.epoch and not store.renew(first)

    def test_a_newer_epoch_fences_the_older_writer_out(self, store: Store) -> None:
        old = store.acquire("pack/p", "one", 30.0)
        assert old is not None
        store.commit([Write(keys.job(A.id), A, 0)], fence=old.fence)
        new = store.acquire("pack/p", "two", 30.0, steal=True)
        assert new is not None
        with pytest.raises(Fenced) as caught:
            store.commit([Write(keys.job(B.id), B, 0)], [event(1)], fence=old.fence)
        assert (caught.value.epoch, caught.value.current) == (old.epoch, new.epoch)
        assert store.get(keys.job(B.id)) is None and store.events(START) == []
        store.commit([Write(keys.job(B.id), B, 0)], fence=new.fence)

    def test_a_writer_that_is_fenced_out_takes_no_lease(self, store: Store) -> None:
        old = store.acquire("controller", "one", 30.0)
        assert old is not None
        assert store.acquire("pack/p", "one", 30.0, fence=old.fence) is not None
        new = store.acquire("controller", "two", 30.0, steal=True)
        worker = store.acquire("pack/p", "worker", 30.0, steal=True)
        assert new is not None and worker is not None
        with pytest.raises(Fenced) as caught:
            store.acquire("pack/p", "one", 30.0, steal=True, fence=old.fence)
        assert (caught.value.epoch, caught.value.current) == (old.epoch, new.epoch)
        assert store.renew(worker), "the worker's lease is as it was"
        with pytest.raises(Fenced):
            store.acquire("pack/p", "one", 30.0, steal=True, fence=Fence("nobody's", 1))

    def test_a_fence_without_a_lease_is_refused(self, store: Store) -> None:
        with pytest.raises(Fenced):
            store.commit([Write(keys.job(A.id), A, 0)], fence=Fence("controller", 1))

    def test_writers_that_swap_at_once_lose_nothing(self, store: Store) -> None:
        key = keys.study(StudyId("s"))

        def add(found: Study | None) -> Study:
            count = int(found.body) if found else 0
            return Study(
                id=StudyId("s"), tenant=TenantId("t"), name="n", created_at=0.0, updated_at=0.0, body=str(count + 1)
            )

        def work() -> None:
            for _ in range(25):
                retried(lambda: swap(store, key, add, events=[event(1)]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = store.get(key)
        assert found is not None and found.value.body == "100"
        assert len(store.events(START)) == 100

    def test_a_snapshot_and_the_tail_are_the_whole_log(self, store: Store) -> None:
        history: list[Event] = [
            DeviceJoined(record=make_device(), at=0.0),
            JobSubmitted(record=A, at=1.0),
            JobSubmitted(record=B, at=2.0),
            JobAdmitted(job=A.id, pack=PackId("pack-1"), at=3.0),
            JobFailed(job=B.id, error=JobError("code", "message"), at=4.0),
        ]
        for n, one in enumerate(history):
            store.commit([], [one])
            if n == 2:
                store.commit([Write(keys.SNAPSHOT, replayed(Snapshot(), store), None)])
        saved = store.get(keys.SNAPSHOT)
        assert saved is not None and set(saved.value.jobs) == {A.id, B.id}
        whole = replayed(Snapshot(), store)
        assert replayed(saved.value, store) == whole
        store.trim(saved.value.version)
        assert replayed(saved.value, store) == whole
        assert whole.jobs[JobId("ftjob-a")].pack == "pack-1"

    def test_versions_and_fences_hold_in_any_order_of_calls(self, store: Store) -> None:
        run_state_machine_as_test(machine(store), settings=settings(max_examples=15, stateful_step_count=30))  # type: ignore[arg-type]

    def test_durable_and_ping_return(self, store: Store) -> None:
        store.append(STREAM, {"n": 1})
        store.durable()
        store.ping()


def replayed(snapshot: Snapshot, store: Store) -> Snapshot:
    return reduce(lambda state, one: evolve.apply(state, one.id, one.event), store.events(snapshot.version), snapshot)


def retried(write: Callable[[], object]) -> None:
    """Until no Conflict: four writers of one record may need more tries than `swap` gives them."""
    while True:
        try:
            write()
            return
        except Conflict:
            continue


def during(wait: Callable[[], list[T]], act: Callable[[], object]) -> list[T]:
    """What `wait` returns when `act` happens while it waits."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        time.sleep(0.1)
        assert not waiting.done()
        act()
        return waiting.result(timeout=5.0)
