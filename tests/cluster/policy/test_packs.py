"""Several packs of one backbone: which one a job goes to, when another is opened, which are joined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.decisions import Admit, ClosePack, Hold, Move, OpenPack, Refuse
from polygraft.cluster.model import DeviceId, Job, JobId, JobSpec, Limits, Pace, Pack, PackId, Snapshot
from polygraft.cluster.policy.budget import STATE_BYTES
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.policy.packing import LOOK
from polygraft.cluster.policy.room import paces
from polygraft.cluster.size import Size
from polygraft.cluster.states import JobState, PackState, Reason
from tests.cluster.builders import DEVICE_BYTES, make_backbone, make_device, make_job, make_pack, make_snapshot, running

P, Q, R = PackId("pack-p"), PackId("pack-q"), PackId("pack-r")
A, B, C = JobId("ftjob-a"), JobId("ftjob-b"), JobId("ftjob-c")
NEW = PackId("pack-100002")
HALF = DEVICE_BYTES // 2


def packs(*names: str) -> tuple[Pack, ...]:
    """Open ones, on devices d, d1, ..."""
    return tuple(make_pack(n, devices=(DeviceId(f"d{i or ''}"),)) for i, n in enumerate(names))


def inside(pack: str, count: int, **fields: object) -> tuple[Job, ...]:
    return tuple(running(f"{pack}{n}", pack, **fields) for n in range(count))


def paced(snapshot: Snapshot, pack: PackId, **left_s: float) -> Snapshot:
    pace = Pace(id=pack, at=snapshot.now, left_s={JobId(f"ftjob-{job}"): left for job, left in left_s.items()})
    return replace(snapshot, paces={**snapshot.paces, pack: pace})


def asked(priority: int = 0, devices: int = 1) -> JobSpec:
    return replace(make_job().spec, priority=priority, devices=devices)


def test_a_job_goes_to_the_fullest_pack_that_has_room() -> None:
    jobs = (*inside("p", 1), *inside("q", 2), *inside("r", 3), make_job("a"))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q", "r"), devices=3, limits=Limits(max_jobs=3))
    assert decide(snapshot) == (Admit(A, Q),)


def test_each_backbones_packs_hold_what_its_own_sizes_say() -> None:
    few = make_backbone("c", sizes=(Size("pack.max_jobs", 1, 1), Size("pack.bytes", 300, 300)))
    jobs = (*(make_job(name) for name in "ab"), *(make_job(name, backbone="c") for name in "cd"))
    snapshot = make_snapshot(jobs=jobs, backbones=(make_backbone("b"), few), devices=3, limits=Limits(max_jobs=2))
    opened = [decision for decision in decide(snapshot) if isinstance(decision, OpenPack)]
    assert sorted((one.backbone, one.bytes) for one in opened) == [("b", HALF), ("c", 300), ("c", 300)]
    given = replace(snapshot, limits=Limits(max_jobs=2, given=("max_jobs",)))
    assert [one.backbone for one in decide(given) if isinstance(one, OpenPack)] == ["b", "c"]


def test_a_job_that_is_too_large_for_a_pack_of_its_own_backbone_is_refused() -> None:
    small = make_backbone("c", sizes=(Size("pack.memory_bytes", 10 * STATE_BYTES, 10 * STATE_BYTES),))
    jobs = (make_job("a", parameters=11), make_job("c", backbone="c", parameters=11))
    snapshot = make_snapshot(jobs=jobs, backbones=(make_backbone("b"), small), devices=2)
    assert Refuse(C, Reason.TOO_LARGE) in decide(snapshot) and Hold(A, Reason.PACK_OPENING) in decide(snapshot)


def test_of_two_packs_with_as_many_jobs_the_one_with_less_memory_left_is_fuller() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES)
    jobs = (*inside("p", 1, parameters=50), *inside("q", 1, parameters=60), make_job("a", parameters=40))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=limits)
    assert decide(snapshot) == (Admit(A, Q),)


def test_what_a_round_admits_makes_a_pack_fuller_for_the_next_job() -> None:
    jobs = (*inside("p", 1), *(make_job(name) for name in "abc"))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=Limits(max_jobs=3))
    assert decide(snapshot) == (Admit(A, P), Admit(B, P), Admit(C, Q))
    more = make_snapshot(
        jobs=(*inside("p", 3), *inside("q", 2), make_job("a"), make_job("b")), packs=packs("p", "q"), devices=2
    )
    assert decide(more) == (Admit(A, P), Admit(B, P))


def test_of_packs_that_a_round_makes_equally_full_the_one_with_less_memory_left_is_fuller() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES)
    jobs = (*inside("p", 3, parameters=30), *inside("q", 2, parameters=10))
    waiting = (make_job("a", parameters=40), make_job("b", parameters=5))
    snapshot = make_snapshot(jobs=(*jobs, *waiting), packs=packs("p", "q"), devices=2, limits=limits)
    assert decide(snapshot) == (Admit(A, Q), Admit(B, P))


def test_jobs_that_the_opening_packs_cannot_take_get_another_pack_each_round_as_many_as_there_are_devices() -> None:
    snapshot = make_snapshot(jobs=tuple(make_job(name) for name in "abcde"), devices=2, limits=Limits(max_jobs=2))
    assert decide(snapshot) == (
        OpenPack(NEW, "b", (DeviceId("d"),), HALF),
        OpenPack(PackId("pack-100003"), "b", (DeviceId("d1"),), HALF),
        *(Hold(JobId(f"ftjob-{name}"), Reason.PACK_OPENING) for name in "abcd"),
        Hold(JobId("ftjob-e"), Reason.PACK_FULL),
    )


def test_a_pack_is_opened_only_for_a_job_that_would_wait_longer_than_it_takes_to_open() -> None:
    limits = Limits(max_jobs=2, opening_s=20.0)
    full = make_snapshot(jobs=(*inside("p", 2), make_job("a")), packs=packs("p"), devices=2, limits=limits)
    assert decide(paced(full, P, p0=300.0, p1=19.0)) == (Hold(A, Reason.PACK_FULL),)
    opened = OpenPack(NEW, "b", (DeviceId("d1"),), HALF)
    assert decide(paced(full, P, p0=300.0, p1=21.0)) == (opened, Hold(A, Reason.PACK_OPENING))
    assert decide(full) == (opened, Hold(A, Reason.PACK_OPENING)), "nobody knows how long it would wait"
    assert decide(replace(paced(full, P, p1=19.0), now=full.now + 61.0))[0] == opened, "it was measured too long ago"
    two = make_snapshot(jobs=(*full.jobs.values(), *inside("q", 2)), packs=packs("p", "q"), devices=3, limits=limits)
    soon = paced(paced(two, P, p0=300.0, p1=300.0), Q, q0=300.0, q1=19.0)
    assert decide(soon) == (Hold(A, Reason.PACK_FULL),), "a place in one of several packs is enough"


def test_two_jobs_do_not_wait_for_the_same_place() -> None:
    jobs = (*inside("p", 2), make_job("a"), make_job("b"))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), devices=2, limits=Limits(max_jobs=2))
    assert decide(paced(snapshot, P, p0=300.0, p1=5.0)) == (
        OpenPack(NEW, "b", (DeviceId("d1"),), HALF),
        Hold(A, Reason.PACK_FULL),
        Hold(B, Reason.PACK_OPENING),
    )
    assert decide(paced(snapshot, P, p0=6.0, p1=5.0)) == (Hold(A, Reason.PACK_FULL), Hold(B, Reason.PACK_FULL))


def test_what_is_promised_to_one_job_is_given_to_no_other_before_it_is_free() -> None:
    def round_(parameters: int) -> list[object]:
        here = running("p0", parameters=80), running("p1", parameters=10)
        jobs = (*here, make_job("a", parameters=60), make_job("b", parameters=parameters))
        limits = Limits(pack_bytes=100 * STATE_BYTES)
        snapshot = make_snapshot(jobs=jobs, packs=packs("p"), devices=2, limits=limits)
        return list(decide(paced(snapshot, P, p0=5.0)))

    waits = Hold(A, Reason.PACK_MEMORY)
    assert round_(10) == [waits, Admit(B, P)], "there is room for it now"
    assert round_(11) == round_(30) == [waits, Hold(B, Reason.PACK_MEMORY)], "in five seconds, beside a"
    assert round_(31)[1:] == [waits, Hold(B, Reason.PACK_OPENING)]


def test_a_job_waits_for_the_memory_it_needs_not_for_the_first_place() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES)
    jobs = (*inside("p", 3, parameters=30), make_job("a", parameters=70))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), devices=2, limits=limits)
    assert decide(paced(snapshot, P, p0=1.0, p1=2.0, p2=3.0)) == (Hold(A, Reason.PACK_MEMORY),)
    assert isinstance(decide(paced(snapshot, P, p0=1.0, p1=25.0, p2=90.0))[0], OpenPack)


def test_a_job_that_was_overtaken_long_enough_gets_one_pack_to_itself_and_the_others_go_on() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES, overtake_s=60.0)
    large = make_job("a", parameters=90, blocked_at=40.0, reason=Reason.PACK_MEMORY)
    jobs = (*inside("p", 1, parameters=80), *inside("q", 1, parameters=30), large, make_job("b", parameters=10))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=limits, now=100.0)
    assert decide(snapshot) == (Admit(B, P),), "q is kept: it is the emptier one"
    assert decide(replace(snapshot, now=99.0)) == (Admit(B, P),), "the fullest"
    fitting = replace(snapshot, jobs={id_: job for id_, job in snapshot.jobs.items() if id_ != "ftjob-q0"})
    assert decide(fitting) == (Admit(A, Q), Admit(B, Q))


def test_a_job_keeps_nobody_from_a_pack_until_it_was_overtaken_long_enough() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES, overtake_s=60.0)
    large = make_job("a", parameters=90, blocked_at=40.0, reason=Reason.PACK_MEMORY)
    jobs = (*inside("p", 1, parameters=80), *inside("q", 1, parameters=30), large, make_job("b", parameters=25))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=limits, now=99.0)
    assert decide(snapshot) == (Admit(B, Q),)
    assert decide(replace(snapshot, now=100.0)) == (Hold(B, Reason.PACK_MEMORY),)


def test_a_round_looks_only_so_far_past_jobs_that_do_not_fit() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES, max_jobs=1000)
    large = tuple(make_job(f"{n:03}", created_at=float(n), parameters=90) for n in range(LOOK + 5))
    jobs = (*inside("p", 1, parameters=20), *large, make_job("z", created_at=999.0, parameters=1))
    decisions = decide(make_snapshot(jobs=jobs, packs=packs("p"), limits=limits))
    reasons = [decision.reason for decision in decisions if isinstance(decision, Hold)]
    assert reasons == [Reason.PACK_MEMORY] * LOOK + [Reason.TURN] * 6


def test_a_tenants_own_jobs_go_by_priority_which_is_worth_a_time_of_waiting() -> None:
    jobs = (
        make_job("a", created_at=0.0),
        make_job("b", created_at=500.0, spec=asked(priority=1)),
        make_job("c", created_at=700.0, spec=asked(priority=1)),
        make_job("d", tenant="other", created_at=800.0),
    )
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), now=1000.0)
    assert [one.job for one in decide(snapshot) if isinstance(one, Admit)] == [B, "ftjob-d", A, C]


def test_a_tenant_has_at_most_so_many_jobs_in_packs() -> None:
    waiting = (make_job("a", tenant="x"), make_job("b", tenant="y"), make_job("c", tenant="x"))
    jobs = (*inside("p", 2, tenant="x"), *waiting)
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), limits=Limits(tenant_jobs=2))
    assert decide(snapshot) == (Admit(B, P), Hold(A, Reason.TENANT_LIMIT), Hold(C, Reason.TURN))


def test_a_tenant_that_got_nothing_in_for_long_goes_before_new_ones() -> None:
    jobs = (
        running("r", "p", tenant="x", admitted_at=100.0),
        make_job("a", tenant="x", created_at=50.0),
        make_job("b", tenant="new", created_at=690.0),
    )
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), limits=Limits(max_jobs=2, patience_s=600.0), now=699.0)
    assert Admit(B, P) in decide(snapshot)
    assert Admit(A, P) in decide(replace(snapshot, now=700.0))


def test_a_job_over_two_devices_has_a_pack_over_two_of_one_node() -> None:
    devices = {DeviceId(name): make_device(name, node=node) for name, node in (("d", "m"), ("d1", "n"), ("d2", "n"))}
    snapshot = replace(make_snapshot(jobs=(make_job("a", spec=asked(devices=2)), make_job("b"))), devices=devices)
    assert decide(snapshot)[:2] == (
        OpenPack(NEW, "b", (DeviceId("d1"), DeviceId("d2")), HALF),
        OpenPack(PackId("pack-100003"), "b", (DeviceId("d"),), HALF),
    )
    wide = make_pack("p", devices=(DeviceId("d1"), DeviceId("d2")))
    ready = replace(snapshot, packs={P: wide, Q: make_pack("q")})
    assert decide(ready) == (Admit(A, P), Admit(B, Q))


def test_half_empty_packs_are_joined_when_nobody_waits() -> None:
    jobs = (*inside("p", 2), *inside("q", 1), *inside("r", 3))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q", "r"), devices=3, limits=Limits(max_jobs=4))
    assert decide(snapshot) == (Move(JobId("ftjob-q0"), Q, R),)
    moving = replace(snapshot, jobs={**snapshot.jobs, JobId("ftjob-q0"): replace(inside("q", 1)[0], moving_to=R)})
    assert decide(moving) == (), "one join at a time, and r has no place left"


def test_all_jobs_of_a_pack_move_or_none() -> None:
    jobs = (*inside("p", 3, parameters=30), *inside("q", 2, parameters=20))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=Limits(pack_bytes=130 * STATE_BYTES))
    assert decide(snapshot) == (Move(JobId("ftjob-q0"), Q, P), Move(JobId("ftjob-q1"), Q, P))
    assert decide(replace(snapshot, limits=Limits(pack_bytes=129 * STATE_BYTES))) == ()


def test_no_pack_is_joined_whose_jobs_end_soon_or_whose_bits_would_change() -> None:
    jobs = (*inside("p", 3), *inside("q", 1, device_class="other"))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2)
    assert decide(snapshot) == ()
    alike = replace(snapshot, jobs={job.id: replace(job, device_class="one") for job in jobs})
    assert decide(alike) == (Move(JobId("ftjob-q0"), Q, P),)
    assert decide(paced(alike, Q, q0=4.0)) == ()


def test_a_job_that_has_left_is_admitted_where_its_place_was_kept() -> None:
    left = make_job("a", moving_to=P, reason=Reason.MOVING, created_at=9.0)
    jobs = (*inside("p", 1), make_job("b"), left)
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=Limits(max_jobs=2))
    assert decide(snapshot) == (Admit(A, P), Admit(B, Q))
    gone = replace(snapshot, packs={**snapshot.packs, P: make_pack("p", state=PackState.CLOSING)})
    assert decide(gone) == (Admit(B, Q), Admit(A, Q)), "by age, where anybody is admitted"


def test_an_empty_pack_is_closed_at_once_beside_another_with_room() -> None:
    snapshot = make_snapshot(jobs=inside("p", 2), packs=packs("p", "q"), devices=2, limits=Limits(max_jobs=3))
    assert decide(snapshot) == (ClosePack(Q, Reason.JOINED),)
    assert decide(replace(snapshot, limits=Limits(max_jobs=2))) == (), "it is the only one with room"
    one = make_snapshot(jobs=inside("p", 1), packs=packs("p", "q"), devices=2, limits=Limits(max_jobs=3))
    assert decide(one) == (ClosePack(Q, Reason.JOINED),)


def test_the_jobs_of_a_pack_whose_node_drains_are_put_down_and_go_to_another_node() -> None:
    jobs = (*inside("p", 2), make_job("a"))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), devices=3)
    nodes = {DeviceId("d"): "going", DeviceId("d1"): "going", DeviceId("d2"): "staying"}
    devices = {id_: replace(device, node=nodes[id_]) for id_, device in snapshot.devices.items()}
    drained = replace(snapshot, devices=devices, draining=("going",))
    stopped = ClosePack(P, Reason.NODE_DRAINS)
    elsewhere = OpenPack(NEW, "b", (DeviceId("d2"),), HALF)
    assert decide(drained) == (elsewhere, Hold(A, Reason.PACK_OPENING), stopped)
    closing = {P: replace(snapshot.packs[P], state=PackState.CLOSING)}
    assert stopped not in decide(replace(drained, packs=closing)), "it is told once"
    assert stopped not in decide(replace(drained, draining=("staying",))), "its own node does not drain"
    wide = replace(drained, packs={P: make_pack("p", devices=(DeviceId("d1"), DeviceId("d2")))})
    assert stopped in decide(wide), "one node of several is enough"
    nowhere = replace(drained, draining=("going", "staying"))
    assert decide(nowhere) == (Hold(A, Reason.PACK_CLOSING), stopped)


def test_a_job_that_waits_just_as_long_as_a_pack_takes_to_open_waits() -> None:
    full = make_snapshot(jobs=(*inside("p", 2), make_job("a")), packs=packs("p"), devices=2, limits=Limits(max_jobs=2))
    assert decide(paced(full, P, p0=300.0, p1=20.0)) == (Hold(A, Reason.PACK_FULL),)
    old = replace(paced(full, P, p1=19.0), now=full.now + 60.0)
    assert decide(old) == (Hold(A, Reason.PACK_FULL),), "what was measured a minute ago still counts"


def test_what_was_measured_is_that_much_less_by_now() -> None:
    snapshot = paced(make_snapshot(), P, a=5.0, b=1.0)
    assert paces(replace(snapshot, now=snapshot.now + 3.0), P) == {A: 2.0, B: 0.0}
    assert paces(snapshot, Q) == {}


@pytest.mark.parametrize("going", [{"stopping": True}, {"moving_to": Q}])
def test_a_job_that_stops_or_leaves_is_expected_to_be_gone_at_once(going: dict[str, object]) -> None:
    jobs = (*inside("p", 1), running("p1", "p", **going), make_job("a"))
    snapshot = make_snapshot(jobs=jobs, packs=packs("p"), devices=2, limits=Limits(max_jobs=2))
    assert decide(snapshot) == (Hold(A, Reason.PACK_FULL),)


@pytest.mark.parametrize(
    ("sizes", "then"),
    [((60, 60, 10), (Reason.PACK_MEMORY, Reason.PACK_OPENING)), ((9, 9, 9), (Reason.PACK_OPENING, Reason.PACK_FULL))],
)
def test_jobs_look_for_a_place_in_an_opening_pack_while_it_has_one(
    sizes: tuple[int, ...], then: tuple[Reason, Reason]
) -> None:
    limits, opening = Limits(pack_bytes=100 * STATE_BYTES, max_jobs=2), make_pack("p", state=PackState.OPENING)
    jobs = (
        *(make_job(name, parameters=size) for name, size in zip("abc", sizes, strict=True)),
        make_job("d", parameters=1),
    )
    assert decide(make_snapshot(jobs=jobs, packs=(opening,), limits=limits)) == (
        Hold(A, Reason.PACK_OPENING),
        Hold(B, then[0]),
        Hold(C, then[1]),
        Hold(JobId("ftjob-d"), Reason.TURN),
    )


def test_two_jobs_that_were_overtaken_long_enough_get_a_pack_each_and_nobody_else_one() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES, overtake_s=60.0)
    waiting = {"blocked_at": 40.0, "reason": Reason.PACK_MEMORY, "parameters": 90}
    large, small = [make_job(name, **waiting) for name in "ab"], make_job("c", parameters=1)  # type: ignore[arg-type]
    jobs = (*inside("p", 1, parameters=30), *inside("q", 2, parameters=20), *large, small)
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2, limits=limits, now=100.0)
    assert decide(snapshot) == (Hold(C, Reason.TURN),)
    one = replace(snapshot, jobs={id_: job for id_, job in snapshot.jobs.items() if id_ != B})
    assert decide(one) == (Admit(C, Q),), "p is kept: it has fewer jobs"


def test_packs_that_fail_for_ever_are_tried_every_five_minutes() -> None:
    failed = tuple(make_pack(f"{n}", state=PackState.FAILED, opened_at=float(n), closed_at=100.0) for n in range(14))
    others = tuple(replace(pack, id=PackId(f"{pack.id}-c"), backbone="c", closed_at=399.0) for pack in failed)
    snapshot = make_snapshot(jobs=(make_job("a"),), packs=(*failed, *others), now=399.9)
    assert decide(snapshot) == (Hold(A, Reason.PACK_BACKOFF),)
    assert isinstance(decide(replace(snapshot, now=400.0))[0], OpenPack)


def test_a_pack_is_joined_that_is_half_empty_and_no_fuller_one() -> None:
    half = make_snapshot(jobs=(*inside("p", 2), *inside("q", 2)), packs=packs("p", "q"), devices=2)
    assert decide(replace(half, limits=Limits(max_jobs=4))) == (
        Move(JobId("ftjob-p0"), P, Q),
        Move(JobId("ftjob-p1"), P, Q),
    )
    beside = make_snapshot(jobs=(*inside("p", 1), *inside("q", 3)), packs=packs("p", "q"), devices=2)
    assert decide(replace(beside, limits=Limits(max_jobs=4))) == (Move(JobId("ftjob-p0"), P, Q),), "however full q is"
    fuller = (*inside("p", 3), *inside("q", 3), *inside("r", 4))
    snapshot = make_snapshot(jobs=fuller, packs=packs("p", "q", "r"), devices=3, limits=Limits(max_jobs=5))
    assert decide(snapshot) == (), "though the others would have room for it"


def test_the_largest_jobs_of_a_pack_look_for_a_place_first() -> None:
    limits = Limits(pack_bytes=100 * STATE_BYTES)
    moving = (running("q0", "q", parameters=10), running("q1", "q", parameters=40))
    jobs = (*inside("p", 4, parameters=15), *inside("r", 3, parameters=30), *moving)
    snapshot = make_snapshot(jobs=jobs, packs=packs("p", "q", "r"), devices=3, limits=limits)
    assert decide(snapshot) == (Move(JobId("ftjob-q1"), Q, P), Move(JobId("ftjob-q0"), Q, R))


@pytest.mark.parametrize("fields", [{"state": JobState.QUEUED}, {"stopping": True}])
def test_a_pack_stays_while_a_job_of_it_begins_or_ends(fields: dict[str, object]) -> None:
    jobs = (*inside("p", 2), replace(running("q0", "q"), **fields))  # type: ignore[arg-type]
    assert decide(make_snapshot(jobs=jobs, packs=packs("p", "q"), devices=2)) == ()


def test_a_move_that_costs_as_much_as_it_brings_is_not_made() -> None:
    snapshot = make_snapshot(jobs=(*inside("p", 3), *inside("q", 1)), packs=packs("p", "q"), devices=2)
    assert decide(paced(snapshot, Q, q0=5.0)) == ()
    assert decide(paced(snapshot, Q, q0=5.1)) == (Move(JobId("ftjob-q0"), Q, P),)


def test_each_kind_of_packs_is_joined_and_closed() -> None:
    names = {"p": ("b", 2), "q": ("b", 1), "r": ("c", 2), "s": ("c", 1), "t": ("d", 0), "u": ("e", 0)}
    here = tuple(
        make_pack(name, backbone=backbone, devices=(DeviceId(f"d{at or ''}"),))
        for at, (name, (backbone, _)) in enumerate(names.items())
    )
    jobs = tuple(job for name, (backbone, count) in names.items() for job in inside(name, count, backbone=backbone))
    snapshot = make_snapshot(jobs=jobs, packs=here, devices=9, now=1000.0)
    assert decide(snapshot) == (
        Move(JobId("ftjob-q0"), Q, P),
        Move(JobId("ftjob-s0"), PackId("pack-s"), R),
        ClosePack(PackId("pack-t"), Reason.IDLE),
        ClosePack(PackId("pack-u"), Reason.IDLE),
    )


def test_a_pack_without_jobs_counts_as_idle_from_its_last_end_or_its_opening() -> None:
    ends = {"a": 100.0, "b": 90.0}
    done = tuple(replace(running(name, finished_at=end), state=JobState.SUCCEEDED) for name, end in ends.items())
    snapshot = make_snapshot(jobs=done, packs=(make_pack(opened_at=150.0),), limits=Limits(idle_s=60.0))
    assert decide(replace(snapshot, now=209.9)) == () == decide(replace(snapshot, packs={P: make_pack()}, now=159.9))
    closed = (ClosePack(P, Reason.IDLE),)
    assert decide(replace(snapshot, now=210.0)) == closed
    assert decide(replace(snapshot, packs={P: make_pack()}, now=160.0)) == closed
    assert decide(make_snapshot(packs=(make_pack(opened_at=0.5),), limits=Limits(idle_s=60.0), now=60.5)) == closed
