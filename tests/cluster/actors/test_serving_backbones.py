"""The controller loads the backbones that are asked, and takes no job for one that is gone."""

from __future__ import annotations

import threading
from collections.abc import Collection

import pytest

from polygraft.cluster.actors.controller import MEASURED_S, Controller
from polygraft.cluster.backbones import advance_backbone, put_backbone
from polygraft.cluster.events import BackboneAsked, BackboneRemoved
from polygraft.cluster.model import Backbone, Device, Limits
from polygraft.cluster.policy.capacity import DoesNotFit
from polygraft.cluster.size import Size
from polygraft.cluster.store import keys
from polygraft.cluster.story import story
from tests.cluster.actors.world import A, Processes, World
from tests.cluster.builders import make_backbone, make_device


@pytest.fixture
def world() -> World:
    return World()


def test_a_backbone_is_loaded_when_it_is_asked_and_unloaded_when_nobody_asks(world: World) -> None:
    world.limits = Limits(unload_s=60.0)
    world.controller = world.start("one")
    world.settle()
    assert world.processes.served == []
    advance_backbone(world.store, BackboneAsked(backbone="b", at=world.now))
    world.settle()
    assert world.processes.served == ["b"] == sorted(world.controller.snapshot.backbones)
    world.now += 61.0
    world.settle()
    assert world.processes.served == []
    assert [line[21:] for line in story(world.store, "b")][1:] == [
        "backbone b is asked",
        "backbone b is to be loaded: asked for",
        "backbone b is to be unloaded: idle",
    ]


def test_a_controller_that_waits_for_the_lease_holds_its_own_cluster_s_replicas(world: World) -> None:
    put_backbone(world.store, make_backbone("b", asked_at=world.now), at=world.now)
    world.settle()
    other, stop = Processes(), threading.Event()
    waiting = Controller(world.store, other, limits=world.limits, holder="two", clock=lambda: world.now)
    waiting.run(stop, lambda: stop.set() if other.served else None, steal=False)
    assert other.served == ["b"]


def test_a_job_whose_backbone_was_removed_fails(world: World) -> None:
    world.settle()
    advance_backbone(world.store, BackboneRemoved(backbone="b", at=world.now))
    world.submit("a")
    world.settle()
    error = world.job(A).error
    assert error is not None and error.code == "its_backbone_was_removed" and "add it again" in error.message


def test_a_backbone_that_came_before_all_devices_gets_its_sizes_with_the_first_whose_speed_is_known(
    world: World,
) -> None:
    sizes = (Size("pack.max_jobs", 3, 3),)

    def sized() -> tuple[Size, ...]:
        return world.controller.snapshot.backbones["b"].sizes

    world.processes.present, world.processes.sized = [], sizes
    world.settle()
    assert sized() == ()
    world.processes.present = [make_device(speed=0.0)]
    world.settle()
    assert sized() == (), "it is being measured"
    world.processes.present = [make_device(speed=1e9)]
    world.settle()
    assert sized() == sizes
    found = world.store.get(keys.backbone("b"))
    assert found is not None and found.value.sizes == sizes
    assert story(world.store, "b")[-1].endswith("backbone b has its sizes; pack.max_jobs 3")
    world.processes.sized = (Size("pack.max_jobs", 9, 9),)
    world.settle()
    assert sized() == sizes, "they stay while it is there"


def test_a_speed_that_nobody_finds_out_is_not_waited_for(world: World) -> None:
    world.processes.present, world.processes.sized = [make_device(speed=0.0)], (Size("pack.max_jobs", 3, 3),)
    world.settle()
    world.now += MEASURED_S
    world.settle()
    assert world.controller.snapshot.backbones["b"].sizes == world.processes.sized


def test_one_that_fits_no_device_is_looked_at_again_when_there_are_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def sizes(backbone: Backbone, devices: Collection[Device]) -> tuple[Size, ...]:
        asked.append(len(devices))
        raise DoesNotFit("it needs more")

    monkeypatch.setattr(world.processes, "sizes", sizes)
    world.settle()
    world.settle()
    assert asked == [1]
    world.processes.present.append(make_device("d1", index=1))
    world.settle()
    assert asked == [1, 2]
