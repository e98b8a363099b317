"""The controller's loop over the real policy and store, with processes played by the test."""

from __future__ import annotations

import threading
import time
from functools import reduce

import pytest

from polygraft.cluster import evolve
from polygraft.cluster.actors import controller as module
from polygraft.cluster.actors.controller import Controller
from polygraft.cluster.actors.protocols import PackEnd
from polygraft.cluster.advance import advance_job
from polygraft.cluster.decisions import OpenPack
from polygraft.cluster.events import (
    JobCancelled,
    JobCancelRequested,
    JobHeld,
    PackOpened,
)
from polygraft.cluster.leasing import LeaseRefused, open_replica
from polygraft.cluster.model import (
    START,
    DeviceId,
    Holding,
    Limits,
    PackId,
    ReplicaId,
    Snapshot,
)
from polygraft.cluster.states import JobState, PackState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Fenced, StoreUnavailable
from polygraft.cluster.store.memory import MemoryStore
from polygraft.cluster.story import story
from tests.cluster.actors.world import A, B, Processes, World
from tests.cluster.builders import DEVICE_BYTES, make_device


@pytest.fixture
def world() -> World:
    return World()


def test_a_job_goes_from_the_queue_into_a_pack(world: World) -> None:
    world.submit("a")
    world.settle()
    opened = [(one.backbone, one.devices, one.bytes) for one in world.processes.opened]
    assert opened == [("b", ("d",), DEVICE_BYTES // 2)]
    assert (world.job(A).reason, world.job(A).pack) == (Reason.PACK_OPENING, None)
    world.work()
    world.settle()
    pack = world.processes.opened[0].id
    assert (world.job(A).pack, world.job(A).reason) == (pack, None)
    assert [entry for _, entry in world.store.read(keys.commands(pack))] == [{"op": "admit", "job": A}]
    world.work()
    assert world.job(A).state is JobState.RUNNING


def test_an_unchanged_reason_is_written_once(world: World) -> None:
    world.processes.present = []
    world.submit("a")
    for _ in range(5):
        world.settle()
        world.now += 1
    held = [one.event for one in world.store.events(START) if isinstance(one.event, JobHeld)]
    assert [one.reason for one in held] == [Reason.NO_DEVICE]
    world.processes.present = [make_device()]
    world.settle()
    assert world.job(A).reason is Reason.PACK_OPENING


def test_devices_are_told_as_they_come_change_and_go(world: World) -> None:
    for present in ([make_device()], [make_device(speed=2e11), make_device("e")], [make_device("e")]):
        world.processes.present = present
        world.settle()
        assert world.controller.snapshot.devices == {device.id: device for device in present}
    assert [line.partition("  ")[2] for line in story(world.store, "d")] == [
        "device d joined: 2 cores, 0.0 GiB, 100 GFLOP/s",
        "device d joined: 2 cores, 0.0 GiB, 200 GFLOP/s",
        "device d is gone",
    ]
    assert len(world.store.events(START)) == 2 + 4, "what stays as it is is told once"


def test_a_pack_holds_its_bytes_until_it_is_over(world: World) -> None:
    world.processes.refuse = True
    world.submit("a")
    world.settle()
    assert world.held() == [], "of a pack that could not start nothing is held"
    world.processes.refuse = False
    world.now += 2.0
    world.settle()
    pack = world.processes.opened[0].id
    assert world.held() == [Holding(pack, DEVICE_BYTES // 2)]
    world.processes.present = [make_device(speed=3e11)]
    world.settle()
    assert world.held() == [Holding(pack, DEVICE_BYTES // 2)], "whoever holds it stays when a device changes"
    world.processes.over.append(PackEnd(pack, "killed"))
    world.settle()
    assert world.held() == []


def test_what_a_dead_replica_held_is_free_again(world: World) -> None:
    world.processes.present = [make_device("n/cpu0")]
    world.settle()
    for name in "rs":
        open_replica(
            world.store,
            ReplicaId(name),
            backbone="b",
            bytes_of=lambda device: device.bytes // 2,
            actor=f"actor of {name}",
            node="n",
            index=None,
            at=world.now,
        )
    world.submit("a")
    world.settle()
    assert world.job(A).reason is Reason.NO_DEVICE
    lease = world.store.acquire(keys.replica_scope(ReplicaId("r")), "its process", 30.0)
    assert lease is not None
    world.processes.dead.append("actor of r")
    world.settle()
    assert set(world.controller.snapshot.replicas) == {"s"} and world.job(A).reason is Reason.PACK_OPENING
    assert not world.store.renew(lease), "what is left of its process can no longer write"


def test_a_replica_that_was_faster_keeps_a_pack_from_what_it_took(world: World) -> None:
    """The pack was decided on without knowing of it; nothing is promised twice, and the next round sees it."""
    world.processes.present = [make_device("n/cpu0")]
    world.settle()
    open_replica(
        world.store,
        ReplicaId("r"),
        backbone="b",
        bytes_of=lambda device: device.bytes,
        actor="r",
        node="n",
        index=None,
        at=world.now,
    )
    opening = OpenPack(PackId("pack-p"), "b", (DeviceId("n/cpu0"),), DEVICE_BYTES // 2)
    with pytest.raises(LeaseRefused, match="n/cpu0 has 0 bytes free"):
        world.controller._carry_out(opening)
    assert world.packs() == [] and world.processes.opened == []


def test_a_running_job_is_cancelled_through_its_pack(world: World) -> None:
    pack = world.running()
    advance_job(world.store, JobCancelRequested(job=A, at=world.now))
    for _ in range(3):
        world.settle()
    sent = [entry for _, entry in world.store.read(keys.commands(pack))]
    assert sent.count({"op": "cancel", "job": A}) == 1
    assert world.job(A).stopping and world.job(A).state is JobState.RUNNING
    world.work()
    assert world.job(A).state is JobState.CANCELLED


def test_a_waiting_job_is_cancelled_at_once(world: World) -> None:
    world.submit("a", cancel_requested=True)
    world.settle()
    assert world.job(A).state is JobState.CANCELLED
    assert world.processes.opened == []


def test_a_job_whose_owner_is_silent_is_cancelled(world: World) -> None:
    world.submit("a", lease_until=105.0)
    world.settle()
    world.now = 106.0
    world.settle()
    assert world.job(A).state is JobState.CANCELLED


def test_jobs_of_a_failed_pack_go_on_in_another(world: World) -> None:
    pack = world.running()
    lease = world.store.acquire(keys.pack_scope(pack), "worker", 30.0)
    assert lease is not None
    world.processes.over.append(PackEnd(pack, "RuntimeError: out of memory"))
    world.settle()
    assert world.packs() == [(pack, PackState.FAILED)]
    assert world.processes.closed == [pack]
    assert (world.job(A).attempts, world.job(A).pack, world.job(A).reason) == (0, None, Reason.PACK_BACKOFF)
    with pytest.raises(Fenced):  # whatever is left of the old worker can no longer write
        world.store.commit([], [PackOpened(pack=pack, at=0.0)], fence=lease.fence)
    world.now += 2.0
    for _ in range(2):
        world.settle()
        world.work()
    assert world.job(A).state is JobState.RUNNING and world.job(A).pack != pack


def test_a_job_that_is_suspected_of_failing_packs_fails_and_those_beside_it_go_on(world: World) -> None:
    world.limits = Limits(max_attempts=2)
    world.controller = world.start("one")
    world.submit("a", "b")
    for _ in range(4):
        for _ in range(2):
            world.settle()
            world.work()
        world.processes.over.append(PackEnd(world.processes.opened[-1].id, "killed", [A]))
        world.settle()
        world.now += 500.0
    job = world.job(A)
    assert job.state is JobState.FAILED and job.error is not None and job.error.code == Reason.PACKS_FAILED
    assert world.job(B).attempts == 0 and not world.job(B).final


def test_a_pack_that_ends_by_itself_gives_its_jobs_back_unblamed(world: World) -> None:
    pack = world.running()
    world.processes.over.append(PackEnd(pack, None))
    world.settle()
    assert (pack, PackState.CLOSED) in world.packs()
    assert world.job(A).attempts == 0 and world.job(A).state is JobState.QUEUED


def test_a_pack_that_cannot_start_fails_and_is_tried_again_later(world: World) -> None:
    world.processes.refuse = True
    world.submit("a")
    world.settle()
    assert [state for _, state in world.packs()] == [PackState.FAILED]
    assert world.job(A).reason is Reason.PACK_BACKOFF
    world.processes.refuse = False
    world.now += 2.0
    world.settle()
    assert len(world.processes.opened) == 1


def test_an_idle_pack_is_told_to_close_and_forgotten_when_it_ended(world: World) -> None:
    pack = world.running()
    for job in (A, B):
        advance_job(world.store, JobCancelled(job=job, at=world.now))
    world.now += 61.0
    world.settle()
    assert world.packs() == [(pack, PackState.CLOSING)]
    assert [entry["op"] for _, entry in world.store.read(keys.commands(pack))][-1] == "close"
    world.processes.over.append(PackEnd(pack, None))
    world.settle()
    assert world.packs() == [(pack, PackState.CLOSED)] and world.processes.closed == [pack]


def test_a_new_controller_goes_on_where_the_old_one_was(world: World) -> None:
    world.running()
    old = world.controller
    new = world.start("two")
    world.settle(new)
    assert new.snapshot.jobs == old.snapshot.jobs | {job.id: job for job in (world.job(A), world.job(B))}  # type: ignore[operator]
    assert [state for _, state in world.packs()] == [PackState.OPEN]
    world.submit("c")
    with pytest.raises(Fenced):
        old.round()


def test_a_leader_that_was_replaced_shuts_no_worker_of_its_successor_out(world: World) -> None:
    """It has not yet seen that it was replaced, and knows no process of the successor's pack."""
    world.settle()
    successor = Controller(world.store, Processes(), limits=world.limits, holder="two", clock=lambda: world.now)
    world.submit("a")
    world.settle(successor)
    (pack,) = (one.value for one in world.store.scan(keys.PACKS))
    worker = world.store.acquire(keys.pack_scope(pack.id), "worker", 30.0, steal=True)
    assert worker is not None
    with pytest.raises(Fenced):
        world.controller.round()
    assert world.store.renew(worker), "the worker's lease was not stolen"


def test_a_controller_that_does_not_steal_leads_when_the_other_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new cluster's does while the old one is still up: it does nothing in the meantime."""
    monkeypatch.setattr(module, "POLL_S", 0.02)
    world.settle()
    stop, lease = threading.Event(), world.controller._lease
    assert lease is not None
    beats = []

    def beat() -> None:
        beats.append(world.store.renew(lease))
        if len(beats) == 2:
            world.store.release(lease)
        if len(beats) == 4:
            stop.set()

    later = world.start("two")
    later.run(stop, beat, steal=False)
    assert beats == [True, True, False, False], "the old one led until it gave up the lease"


def test_packs_that_did_not_survive_a_restart_give_their_jobs_back(world: World) -> None:
    pack = world.running()
    world.processes.opened.clear()
    world.settle(world.start("two"))
    assert (pack, PackState.FAILED) in world.packs()
    assert world.job(A).attempts == 0 and world.job(A).state is JobState.QUEUED


def test_what_a_controller_knows_is_what_the_log_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_EVENTS", 5)
    world.running()
    world.settle()
    log = world.store.events(START)
    assert world.controller.snapshot == reduce(lambda s, one: evolve.apply(s, one.id, one.event), log, Snapshot())
    saved = world.store.get(keys.SNAPSHOT)
    assert saved is not None
    tail = world.store.events(saved.value.version)
    assert len(tail) < len(log)
    resumed = reduce(lambda s, one: evolve.apply(s, one.id, one.event), tail, saved.value)
    assert resumed == world.controller.snapshot
    for job in (A, B):
        assert world.controller.snapshot.jobs[job] == world.job(job)


def test_the_log_is_trimmed_behind_old_snapshots(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_EVENTS", 2)
    monkeypatch.setattr(module, "EVENTS_KEPT", 6)
    world.controller = world.start("one")
    for n in range(20):
        world.submit(f"{n}", cancel_requested=True)
        world.settle()
    assert len(world.store.events(START)) < 20
    world.settle(world.start("two"))
    assert all(job.final for job in world.controller.snapshot.jobs.values())


def test_the_loop_survives_an_outage_of_the_store_and_stops_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(module, "BACKOFF_S", (0.02,))

    class Flaky(MemoryStore):
        down = False

        def _check_open(self) -> None:
            if self.down:
                raise StoreUnavailable("down")

    store = Flaky()
    world = World(store=store)
    stop, beats = threading.Event(), []
    thread = threading.Thread(target=world.controller.run, args=(stop, lambda: beats.append(1)))
    thread.start()
    try:
        world.submit("a")
        until(lambda: bool(world.processes.opened))
        store.down = True
        seen = len(beats)
        until(lambda: len(beats) > seen + 1)
        store.down = False
        world.submit("b")
        until(lambda: world.job(B).reason is Reason.PACK_OPENING)
    finally:
        stop.set()
        thread.join(timeout=5.0)
    assert not thread.is_alive()
    assert store.acquire(keys.CONTROLLER, "next", 1.0) is not None, "the lease was given up"


def test_a_take_over_that_was_cut_off_is_started_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.running()
    world.settle()
    new = world.start("two")
    monkeypatch.setattr(world.store, "get", lambda key: (_ for _ in ()).throw(StoreUnavailable("down")))
    with pytest.raises(StoreUnavailable):
        new._take_over(steal=True)
    assert new._lease is None, "nothing is decided on a snapshot that was not read"


def test_a_story_says_why_a_job_waited_and_what_became_of_it(world: World) -> None:
    pack = world.running()
    advance_job(world.store, JobCancelRequested(job=A, at=world.now))
    world.settle()
    world.work()
    told = [line.partition("  ")[2] for line in story(world.store, A)]
    assert told == [
        "ftjob-a submitted by t: lora on b",
        "ftjob-a waits: pack is opening",
        f"ftjob-a admitted to {pack}",
        f"ftjob-a started in {pack}: 5 parameters, 9 steps",
        "ftjob-a is asked to cancel",
        f"ftjob-a is being stopped in {pack}: requested",
        "ftjob-a cancelled",
    ]
    about_pack = [line.partition("  ")[2] for line in story(world.store, pack)]
    assert about_pack[:2] == [f"{pack} opens with b on device d, 0.0 GiB: jobs wait", f"{pack} is open"]
    assert story(world.store, "ftjob-unknown") == []


def until(holds: object) -> None:
    deadline = time.monotonic() + 5.0
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
