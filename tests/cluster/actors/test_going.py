"""A controller that is replaced, nodes that are to go, and a service that stops: who puts down what."""

from __future__ import annotations

import threading

import pytest

from polygraft.cluster.actors.controller import Controller
from polygraft.cluster.actors.protocols import PackEnd
from polygraft.cluster.model import FileId, JobSpec
from polygraft.cluster.states import JobState, PackState
from polygraft.cluster.store import keys
from tests.cluster.actors.world import A, B, Processes, World
from tests.cluster.builders import make_device


@pytest.fixture
def world() -> World:
    return World()


def test_a_leader_that_was_taken_for_dead_does_not_lead_again_under_its_successors_name(world: World) -> None:
    """As one that is stopped, whose place Ray gives to another process, and that then goes on."""
    pack = world.running()
    successor = Controller(world.store, Processes(), limits=world.limits, holder="one", clock=lambda: world.now)
    world.settle(successor)
    world.controller._renewed_at -= 60.0  # it was stopped for so long
    lease, stop, beats = successor._lease, threading.Event(), []
    assert lease is not None

    def beat() -> None:
        beats.append(world.store.renew(lease))
        if len(beats) == 4:
            stop.set()

    world.controller.run(stop, beat, steal=False)
    assert beats == [True] * 4, "the successor leads on"
    assert world.processes.closed == [pack], "its packs' processes hold devices that are not its own any more"


def test_the_pack_of_a_node_that_drains_is_told_to_stop_and_its_jobs_go_on_elsewhere(world: World) -> None:
    world.processes.present = [make_device("d", node="going"), make_device("e", node="staying")]
    pack = world.running()
    (held,) = world.processes.opened[-1].devices
    world.processes.going.append("going" if held == "d" else "staying")
    world.settle()
    assert [entry["op"] for _, entry in world.store.read(keys.commands(pack))][-1] == "stop"
    world.processes.over.append(PackEnd(pack, None))
    for _ in range(2):
        world.settle()
        world.work()
    assert world.job(A).pack == world.job(B).pack != pack and world.job(A).attempts == 0
    assert {*world.processes.opened[-1].devices} == {"d", "e"} - {held}


def test_a_controller_that_stops_has_its_packs_put_down_what_they_train(world: World) -> None:
    pack, stop = world.running(), threading.Event()
    stop.set()
    world.processes.over.append(PackEnd(pack, None))  # as its worker ends when it is told
    world.controller.run(stop)
    assert [entry["op"] for _, entry in world.store.read(keys.commands(pack))][-1] == "stop"
    assert (world.job(A).state, world.job(A).pack) == (JobState.QUEUED, None)
    assert world.packs() == [(pack, PackState.CLOSED)]


def test_a_pack_ends_with_the_first_of_its_devices(world: World) -> None:
    """Its host may be on the node of another one, and would wait for ever for a process on the node that is gone."""
    world.processes.present = [make_device("d"), make_device("e", node="other")]
    world.submit("a", spec=JobSpec(backbone="b", training_file=FileId("file-1"), devices=2))
    for _ in range(2):
        world.settle()
        world.work()
    (pack,) = world.processes.opened
    assert set(pack.devices) == {"d", "e"} and world.job(A).state is JobState.RUNNING
    world.processes.present = [make_device("d")]
    world.settle()
    assert world.packs() == [(pack.id, PackState.FAILED)] and world.processes.closed == [pack.id]
    assert [one.value.error for one in world.store.scan(keys.PACKS)] == ["e is gone"]
    assert (world.job(A).state, world.job(A).attempts) == (JobState.QUEUED, 0) and world.held() == []
