"""The controller loads the backbones that are asked, and takes no job for one that is gone."""

from __future__ import annotations

import threading

import pytest

from polygraft.cluster.actors.controller import Controller
from polygraft.cluster.backbones import advance_backbone, put_backbone
from polygraft.cluster.events import BackboneAsked, BackboneRemoved
from polygraft.cluster.model import Limits
from polygraft.cluster.story import story
from tests.cluster.actors.world import A, Processes, World
from tests.cluster.builders import make_backbone


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
