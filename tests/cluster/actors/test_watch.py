"""Actors under a name that are ended when they are silent, found by the test instead of by Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from polygraft.cluster.actors.pings import EVERY_S, Answer
from polygraft.cluster.actors.watch import SILENT_S, Found, Watch, Watched

CONTROLLER = Watched("controller", "polygraft")
KEEPER = Watched("searches", "polygraft")


@dataclass
class Cluster:
    """`listed` are those to be watched, `there` those that can be found, each with what it answers, `starting` those of
    them whose constructors have not returned; `found` who was looked for, `asked` of whom it was asked whether it runs,
    and `ended` those that were ended."""

    there: dict[Watched, Answer] = field(default_factory=dict)
    starting: set[Watched] = field(default_factory=set)
    listed: list[Watched] = field(default_factory=lambda: [CONTROLLER, KEEPER])
    found: list[Watched] = field(default_factory=list)
    asked: list[Watched] = field(default_factory=list)
    ended: list[Watched] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self._watch = Watch(lambda: self.listed, find=self._find, clock=lambda: self.now)

    def look_after(self, seconds: float) -> None:
        self.now += seconds
        self._watch.look()

    def _find(self, actor: Watched) -> Found | None:
        self.found.append(actor)
        if actor not in self.there:
            return None
        return Found(lambda: self._answers(actor), lambda: self._runs(actor), lambda: self.ended.append(actor))

    def _runs(self, actor: Watched) -> bool:
        self.asked.append(actor)
        return actor not in self.starting

    def _answers(self, actor: Watched) -> Callable[[], Answer]:
        return lambda: self.there[actor]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster({CONTROLLER: Answer.WELL, KEEPER: Answer.WELL})


def test_those_that_answer_are_looked_up_once_and_never_ended(cluster: Cluster) -> None:
    for _ in range(50):
        cluster.look_after(EVERY_S)
    assert cluster.found == [CONTROLLER, KEEPER] and not cluster.ended


def test_one_that_hangs_is_ended_once_and_the_others_are_not(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.look_after(EVERY_S)
    cluster.there[CONTROLLER] = Answer.NONE
    for _ in range(int(2 * SILENT_S / EVERY_S) + 1):
        cluster.look_after(EVERY_S)
    assert cluster.ended == [CONTROLLER]


def test_one_that_was_ended_is_looked_up_anew_and_watched_again(cluster: Cluster) -> None:
    cluster.look_after(0.0)
    cluster.there[CONTROLLER] = Answer.WRONG
    cluster.look_after(1.0)
    assert cluster.ended == [CONTROLLER]
    cluster.look_after(1.0)
    assert cluster.found == [CONTROLLER, KEEPER, CONTROLLER]
    cluster.look_after(1.0)
    assert cluster.ended == [CONTROLLER, CONTROLLER]


def test_one_that_is_not_there_yet_is_watched_when_it_comes(cluster: Cluster) -> None:
    cluster.there = {KEEPER: Answer.WELL}
    for _ in range(3):
        cluster.look_after(EVERY_S)
    cluster.there[CONTROLLER] = Answer.WRONG
    cluster.look_after(1.0)
    cluster.look_after(1.0)
    assert cluster.ended == [CONTROLLER]
    assert cluster.found.count(KEEPER) == 1 and cluster.found.count(CONTROLLER) == 4


def test_one_that_is_dead_is_left_to_ray(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.look_after(EVERY_S)
    cluster.there[CONTROLLER] = Answer.DEAD
    for _ in range(50):
        cluster.look_after(EVERY_S)
    assert not cluster.ended


def test_one_that_hangs_since_before_anybody_watched_is_ended_as_early_as_others(cluster: Cluster) -> None:
    cluster.there[CONTROLLER] = Answer.NONE
    for _ in range(int(SILENT_S / EVERY_S) + 2):
        cluster.look_after(EVERY_S)
    assert cluster.ended == [CONTROLLER]


def test_one_that_starts_has_the_time_for_it_and_as_long_as_others_to_answer_then(cluster: Cluster) -> None:
    cluster.there[CONTROLLER] = Answer.NONE
    cluster.starting = {CONTROLLER}
    for _ in range(int(2 * SILENT_S / EVERY_S)):
        cluster.look_after(EVERY_S)
    cluster.starting = set()
    for _ in range(int(SILENT_S / EVERY_S)):
        cluster.look_after(EVERY_S)
    assert not cluster.ended
    for _ in range(2):
        cluster.look_after(EVERY_S)
    assert cluster.ended == [CONTROLLER]


def test_whether_one_runs_is_asked_until_it_is_known(cluster: Cluster) -> None:
    cluster.there[CONTROLLER] = Answer.NONE
    cluster.starting = {CONTROLLER}
    for _ in range(3):
        cluster.look_after(EVERY_S)
    cluster.starting = set()
    for _ in range(3):
        cluster.look_after(EVERY_S)
    assert cluster.asked.count(CONTROLLER) == 4 and cluster.asked.count(KEEPER) == 1


def test_one_that_is_not_listed_any_more_is_forgotten(cluster: Cluster) -> None:
    cluster.look_after(0.0)
    cluster.there[CONTROLLER] = Answer.NONE
    cluster.listed = [KEEPER]
    for _ in range(int(2 * SILENT_S / EVERY_S)):
        cluster.look_after(EVERY_S)
    cluster.listed = [CONTROLLER, KEEPER]
    cluster.look_after(EVERY_S)
    assert not cluster.ended and cluster.found == [CONTROLLER, KEEPER, CONTROLLER]
