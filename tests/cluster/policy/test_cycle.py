"""What the controller decides, by example and in general."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.decisions import Admit, CancelJob, ClosePack, Hold, OpenPack, Refuse
from polygraft.cluster.model import DeviceId, JobId, Limits, PackId, Snapshot
from polygraft.cluster.policy.budget import FROZEN_BYTES, STATE_BYTES
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.states import JobState, PackState, Reason
from tests.cluster.builders import DEVICE_BYTES, make_job, make_pack, make_replica, make_snapshot, running

A, B, P, D, D1 = JobId("ftjob-a"), JobId("ftjob-b"), PackId("pack-p"), DeviceId("d"), DeviceId("d1")
HALF = DEVICE_BYTES // 2
NEW = PackId("pack-100002")  # the first pack opened at version 16-2
OPENING = make_pack(state=PackState.OPENING)
CLOSING = make_pack(state=PackState.CLOSING)


def test_nothing_to_do_is_no_decision() -> None:
    assert decide(make_snapshot()) == ()


def test_a_pack_is_opened_for_the_first_jobs() -> None:
    snapshot = make_snapshot(jobs=(make_job("a"), make_job("b")))
    assert decide(snapshot) == (
        OpenPack(NEW, "b", (D,), HALF),
        Hold(A, Reason.PACK_OPENING),
        Hold(B, Reason.PACK_OPENING),
    )


def test_jobs_go_into_the_open_pack_of_their_backbone() -> None:
    snapshot = make_snapshot(jobs=(make_job("a"), make_job("b", backbone="other")), packs=(make_pack(),))
    assert decide(snapshot) == (Admit(A, P), Hold(B, Reason.NO_DEVICE))


def test_another_backbone_gets_a_pack_on_another_device() -> None:
    snapshot = make_snapshot(jobs=(make_job("a", backbone="other"),), packs=(make_pack(),), devices=2)
    assert decide(snapshot) == (OpenPack(NEW, "other", (D1,), HALF), Hold(A, Reason.PACK_OPENING))


def test_two_packs_of_one_round_have_different_ids_and_devices() -> None:
    snapshot = make_snapshot(jobs=(make_job("a"), make_job("b", backbone="other")), devices=2)
    opened = [decision for decision in decide(snapshot) if isinstance(decision, OpenPack)]
    assert len({one.pack for one in opened}) == len({one.devices for one in opened}) == 2


def test_the_only_device_goes_to_the_backbone_whose_oldest_job_of_all_tenants_came_first() -> None:
    jobs = make_job("a"), make_job("b", tenant="u", created_at=5.0), make_job("c", backbone="c", created_at=3.0)
    assert [one.backbone for one in decide(make_snapshot(jobs=jobs)) if isinstance(one, OpenPack)] == ["b"]


@pytest.mark.parametrize(
    ("pack", "reason"), [(OPENING, Reason.PACK_OPENING), (CLOSING, Reason.PACK_CLOSING), (None, Reason.NO_DEVICE)]
)
def test_a_job_waits_for_a_reason(pack: object, reason: Reason) -> None:
    snapshot = make_snapshot(jobs=(make_job("a"),), packs=(pack,) if pack else (), devices=1 if pack else 0)  # type: ignore[arg-type]
    assert decide(snapshot) == (Hold(A, reason),)


def test_a_closed_pack_leaves_its_device_to_the_next() -> None:
    snapshot = make_snapshot(jobs=(make_job("a"),), packs=(make_pack(state=PackState.CLOSED),))
    assert decide(snapshot) == (OpenPack(NEW, "b", (D,), HALF), Hold(A, Reason.PACK_OPENING))


def test_a_pack_goes_where_replicas_have_left_it_room() -> None:
    snapshot = make_snapshot(jobs=(make_job("a"),), replicas=(make_replica(bytes=HALF + 1),), devices=2)
    assert decide(snapshot)[0] == OpenPack(NEW, "b", (D1,), HALF)
    full = replace(snapshot, devices={D: snapshot.devices[D]})
    assert decide(full) == (Hold(A, Reason.NO_DEVICE),)


def test_tenants_take_turns() -> None:
    jobs = [make_job(f"x{n}", tenant="x", created_at=float(n)) for n in range(3)]
    jobs += [
        make_job("y", tenant="y", created_at=9.0),
        running("z", tenant="z"),
        make_job("z1", tenant="z", created_at=0.5),
    ]
    snapshot = make_snapshot(jobs=tuple(jobs), packs=(make_pack(),), limits=Limits(max_jobs=5))
    assert [decision.job for decision in decide(snapshot) if isinstance(decision, Admit)] == [
        "ftjob-x0",
        "ftjob-y",
        "ftjob-z1",
        "ftjob-x1",
    ]
    assert decide(snapshot)[-1] == Hold(JobId("ftjob-x2"), Reason.PACK_FULL)


def test_a_pack_takes_jobs_up_to_its_memory_and_a_large_one_may_be_overtaken_for_a_while() -> None:
    limits = Limits(pack_bytes=1000 + 100 * STATE_BYTES, max_rows=10, row_bytes=100)
    jobs = (
        running("r", parameters=50),
        make_job("a", created_at=1.0, parameters=40),
        make_job("b", created_at=2.0, parameters=20),
        make_job("c", created_at=3.0, parameters=1),
        make_job("d", created_at=4.0, parameters=101),
    )
    snapshot = make_snapshot(jobs=jobs, packs=(make_pack(),), limits=limits, now=100.0)
    assert decide(snapshot) == (
        Admit(A, P),
        Hold(B, Reason.PACK_MEMORY),
        Admit(JobId("ftjob-c"), P),
        Refuse(JobId("ftjob-d"), Reason.TOO_LARGE),
    )
    waited = replace(jobs[2], created_at=0.5, parameters=60, blocked_at=40.0, reason=Reason.PACK_MEMORY)
    assert decide(replace(snapshot, jobs={**snapshot.jobs, B: waited})) == (
        Hold(A, Reason.TURN),
        Hold(JobId("ftjob-c"), Reason.TURN),
        Hold(JobId("ftjob-d"), Reason.TURN),
    )


def test_what_is_not_trained_takes_memory_too() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES)
    jobs = (
        make_job("a", created_at=1.0, parameters=1, frozen=60 * STATE_BYTES // FROZEN_BYTES),
        make_job("b", created_at=2.0, parameters=40),
        make_job("c", created_at=3.0, parameters=1, frozen=100 * STATE_BYTES // FROZEN_BYTES),
    )
    assert decide(make_snapshot(jobs=jobs, packs=(make_pack(),), limits=limits)) == (
        Admit(A, P),
        Hold(B, Reason.PACK_MEMORY),
        Refuse(JobId("ftjob-c"), Reason.TOO_LARGE),
    )


def test_a_requested_cancel_reaches_waiting_and_running_jobs_once() -> None:
    asked = {"cancel_requested": True}
    jobs = (make_job("a", **asked), running("b", **asked), running("c", stopping=True, **asked))  # type: ignore[arg-type]
    assert decide(make_snapshot(jobs=jobs, packs=(make_pack(),))) == (
        CancelJob(A, None, Reason.REQUESTED),
        CancelJob(B, P, Reason.REQUESTED),
    )


def test_a_job_whose_owner_is_gone_is_cancelled() -> None:
    jobs = (make_job("a", lease_until=9.9), running("b", lease_until=10.1))
    decisions = decide(make_snapshot(jobs=jobs, packs=(make_pack(),), now=10.0))
    assert decisions == (CancelJob(A, None, Reason.OWNER_LOST),)


def test_a_job_that_brings_packs_down_is_given_up() -> None:
    snapshot = make_snapshot(jobs=(make_job("a", attempts=3),), packs=(make_pack(),), limits=Limits(max_attempts=3))
    assert decide(snapshot) == (Refuse(A, Reason.PACKS_FAILED),)


def test_a_pack_without_jobs_is_closed_after_a_while() -> None:
    done = running("a", finished_at=100.0)
    snapshot = make_snapshot(
        jobs=(replace(done, state=JobState.SUCCEEDED),), packs=(make_pack(),), limits=Limits(idle_s=60.0), now=159.0
    )
    assert decide(snapshot) == ()
    assert decide(replace(snapshot, now=160.0)) == (ClosePack(P, Reason.IDLE),)
    busy = make_snapshot(jobs=(done,), packs=(make_pack(),), now=1000.0)
    assert decide(busy) == ()


def test_packs_that_fail_in_a_row_are_tried_ever_more_slowly() -> None:
    failed = [
        make_pack(f"{n}", state=PackState.FAILED, opened_at=float(n), closed_at=100.0 + n, error="x") for n in range(3)
    ]
    snapshot = make_snapshot(jobs=(make_job("a"),), packs=tuple(failed), now=105.9)
    assert decide(snapshot) == (Hold(A, Reason.PACK_BACKOFF),)
    assert isinstance(decide(replace(snapshot, now=106.0))[0], OpenPack)
    recovered = make_pack("9", state=PackState.CLOSED, opened_at=9.0, closed_at=104.0)
    assert isinstance(decide(make_snapshot(jobs=(make_job("a"),), packs=(*failed, recovered), now=105.0))[0], OpenPack)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    backbones = st.sampled_from(["b", "c"])
    packs = [
        make_pack(
            f"{n}",
            backbone=draw(backbones),
            state=draw(st.sampled_from(PackState)),
            devices=tuple(draw(st.sets(st.sampled_from([D, D1, DeviceId("d2")]), min_size=1))),
            bytes=draw(st.integers(0, DEVICE_BYTES)),
            closed_at=draw(st.floats(0, 20)),
        )
        for n in range(draw(st.integers(0, 4)))
    ]
    places = [None, *(pack for pack in packs if not pack.final)]
    jobs = []
    for n in range(draw(st.integers(0, 12))):
        pack = draw(st.sampled_from(places))
        state = draw(st.sampled_from(JobState)) if pack else JobState.QUEUED
        jobs.append(
            make_job(
                f"{n}",
                tenant=draw(st.sampled_from("xyz")),
                backbone=pack.backbone if pack else draw(backbones),
                created_at=draw(st.floats(0, 5)),
                parameters=draw(st.integers(0, 120)),
                pack=pack.id if pack else None,
                state=state,
                stopping=draw(st.booleans()) if pack else False,
                cancel_requested=draw(st.booleans()),
                attempts=draw(st.integers(0, 3)),
                lease_until=draw(st.sampled_from([None, 5.0, 15.0])),
                blocked_at=draw(st.sampled_from([None, 1.0, 9.0])),
            )
        )
    limits = Limits(
        max_jobs=draw(st.integers(1, 6)),
        pack_bytes=draw(st.sampled_from([0, 100 * STATE_BYTES])),
        row_bytes=0,
        overtake_s=5.0,
        tenant_jobs=draw(st.sampled_from([0, 2])),
    )
    replicas = [
        make_replica(
            f"r{n}", devices=(draw(st.sampled_from([D, D1, DeviceId("d2")])),), bytes=draw(st.integers(0, DEVICE_BYTES))
        )
        for n in range(draw(st.integers(0, 2)))
    ]
    return make_snapshot(
        jobs=tuple(jobs),
        packs=tuple(packs),
        replicas=tuple(replicas),
        devices=draw(st.integers(0, 3)),
        limits=limits,
    )


@settings(max_examples=150)
@given(snapshots())
def test_every_waiting_job_is_answered_once_and_no_other(snapshot: Snapshot) -> None:
    answered = Counter(d.job for d in decide(snapshot) if isinstance(d, Admit | Hold | Refuse | CancelJob))
    assert not answered or max(answered.values()) == 1
    waiting = {job.id for job in snapshot.jobs.values() if job.waiting}
    assert waiting <= set(answered)
    in_packs = {d.job for d in decide(snapshot) if isinstance(d, CancelJob) and d.pack is not None}
    assert set(answered) == waiting | in_packs


@settings(max_examples=150)
@given(snapshots())
def test_no_budget_is_exceeded_by_an_admission(snapshot: Snapshot) -> None:
    limits = snapshot.limits
    for pack in snapshot.packs.values():
        admitted = [snapshot.jobs[d.job] for d in decide(snapshot) if isinstance(d, Admit) and d.pack == pack.id]
        if admitted:
            inside = admitted + [job for job in snapshot.jobs.values() if job.pack == pack.id and job.active]
            assert pack.state is PackState.OPEN
            assert {job.spec.backbone for job in admitted} == {pack.backbone}
            assert len(inside) <= limits.max_jobs
            assert not limits.pack_bytes or sum(job.parameters or 0 for job in inside) <= 100


@settings(max_examples=150)
@given(snapshots())
def test_no_device_gets_more_packs_than_it_has_room_for(snapshot: Snapshot) -> None:
    opened = [d for d in decide(snapshot) if isinstance(d, OpenPack)]
    for device in snapshot.devices:
        here = [one for one in opened if device in one.devices]
        assert not here or sum(one.bytes for one in here) <= snapshot.free_bytes(device)
        held = any(device in pack.devices and not pack.final for pack in snapshot.packs.values())
        assert len(here) <= (0 if held else 1)
    assert len({one.pack for one in opened}) == len(opened)


@settings(max_examples=50)
@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_in_which_a_snapshot_was_built_decides_nothing(snapshot: Snapshot, random: object) -> None:
    jobs, packs = list(snapshot.jobs.items()), list(snapshot.packs.items())
    random.shuffle(jobs)  # type: ignore[attr-defined]
    random.shuffle(packs)  # type: ignore[attr-defined]
    assert decide(replace(snapshot, jobs=dict(jobs), packs=dict(packs))) == decide(snapshot)


@settings(max_examples=100)
@given(snapshots())
def test_only_a_pack_that_nobody_needs_is_closed(snapshot: Snapshot) -> None:
    later = replace(snapshot, now=1000.0)
    for decision in decide(later):
        if isinstance(decision, ClosePack):
            assert later.packs[decision.pack].state is PackState.OPEN
            assert not any(job.pack == decision.pack and job.active for job in later.jobs.values())
