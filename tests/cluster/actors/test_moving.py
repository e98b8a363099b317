"""How the controller has half-empty packs joined: commands to the packs, and the facts that the log keeps."""

from __future__ import annotations

from polygraft.cluster.actors.protocols import PackEnd
from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import JobCancelled, JobLeft
from polygraft.cluster.model import JobId, Limits, PackId
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import JobState, PackState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.story import story
from tests.cluster.actors.world import A, B, Processes, World
from tests.cluster.builders import make_device

C, D = JobId("ftjob-c"), JobId("ftjob-d")


def halved() -> tuple[World, PackId, PackId]:
    """Jobs a and b were in one pack, c and d in another; now b and d are over."""
    processes = Processes(present=[make_device("d"), make_device("d1", index=1)])
    world = World(limits=Limits(max_jobs=2), processes=processes)
    world.submit("a", "b", "c", "d")
    for _ in range(3):
        world.settle()
        world.work()
    first, second = (pack.id for pack in processes.opened)
    assert [world.job(job).pack for job in (A, B, C, D)] == [first, first, second, second]
    for job in (B, D):
        advance_job(world.store, JobCancelled(job=job, at=world.now))
    world.settle()
    return world, first, second


def commands(world: World, pack: PackId) -> list[tuple[object, object]]:
    return [(entry["op"], entry.get("job")) for _, entry in world.store.read(keys.commands(pack))]


def test_a_job_of_a_half_empty_pack_leaves_it_and_is_admitted_to_the_other_and_the_empty_one_closes() -> None:
    world, first, second = halved()
    assert (world.job(A).moving_to, commands(world, first)[-1]) == (second, ("leave", A))
    world.settle()
    assert commands(world, first)[-1] == ("leave", A), "it is told once"
    advance_job(world.store, JobLeft(job=A, pack=first, step=4, at=world.now))
    world.settle()
    assert world.job(A).pack == second and world.job(A).moving_to is None
    assert commands(world, second)[-1] == ("admit", A)
    world.now += world.limits.idle_s
    world.settle()
    assert commands(world, first)[-1] == ("close", None)
    world.work()
    world.processes.over.append(PackEnd(first, None))
    world.settle()
    assert world.job(A).state is JobState.RUNNING
    assert sorted(world.packs()) == sorted([(first, PackState.CLOSED), (second, PackState.OPEN)])
    assert [holding.holder for holding in world.held()] == [second], "the other device is free"
    told = [line.partition("  ")[2] for line in story(world.store, A)]
    assert told[-4:] == [
        f"ftjob-a is to move from {first} to {second}: joined",
        f"ftjob-a left {first} after step 4",
        f"ftjob-a admitted to {second}",
        f"ftjob-a started in {second}: 5 parameters, 9 steps",
    ]
    assert world.controller._following.standing == Standing.of(world.controller.snapshot.jobs.values())


def test_a_pack_that_dies_before_its_job_has_left_gives_it_back_as_ever() -> None:
    world, first, second = halved()
    world.processes.over.append(PackEnd(first, "killed", frozenset({A})))
    world.settle()
    assert (world.job(A).pack, world.job(A).moving_to) == (second, None)
    assert world.job(A).attempts == 1


def test_a_job_whose_destination_dies_on_the_way_waits_for_any_pack() -> None:
    world, first, second = halved()
    advance_job(world.store, JobLeft(job=A, pack=first, step=4, at=world.now))
    world.processes.over.append(PackEnd(second, "killed"))
    world.settle()
    assert world.job(A).pack == first, "the pack that it came from is still open"
    assert world.job(C).waiting or world.job(C).pack == first
    assert world.job(C).reason in (None, Reason.PACK_FULL, Reason.PACK_BACKOFF, Reason.PACK_OPENING)
