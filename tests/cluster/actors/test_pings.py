"""Who of some actors has been silent for long, by a clock and by answers of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from polygraft.cluster.actors.pings import EVERY_S, Answer, Pings

SILENT_S, STARTING_S = 20.0, 300.0


@dataclass
class Actor:
    """Answers what it is told to, `answer` to calls that are made from now on."""

    answer: Answer = Answer.WELL
    calls: int = 0

    def __call__(self) -> Callable[[], Answer]:
        self.calls += 1
        return lambda: self.answer


@dataclass
class Clinic:
    """Pings of some actors, at a time that the test moves on."""

    actors: dict[str, Actor] = field(default_factory=lambda: {"a": Actor()})
    now: float = 0.0

    def __post_init__(self) -> None:
        self.pings: Pings[str] = Pings(SILENT_S, starting_s=STARTING_S, clock=lambda: self.now)

    def silent_after(self, seconds: float) -> list[str]:
        """Who is silent now, when nobody has looked for so long."""
        self.now += seconds
        return sorted(self.pings.silent(self.actors))


@pytest.fixture
def clinic() -> Clinic:
    return Clinic()


def test_one_that_answers_is_asked_every_few_seconds_and_never_silent(clinic: Clinic) -> None:
    assert not any(clinic.silent_after(1.0) for _ in range(100))
    assert clinic.actors["a"].calls == pytest.approx(100 / EVERY_S, abs=4)


def test_one_that_answers_no_more_is_silent_after_a_while_and_is_called_once_until_then(clinic: Clinic) -> None:
    clinic.silent_after(0.0)
    clinic.silent_after(EVERY_S)
    actor = clinic.actors["a"]
    calls, actor.answer = actor.calls, Answer.NONE
    clinic.silent_after(EVERY_S)
    assert clinic.silent_after(SILENT_S) == []
    assert actor.calls <= calls + 1
    assert clinic.silent_after(1.0) == ["a"]


def test_it_says_what_is_wrong_with_each(clinic: Clinic) -> None:
    clinic.actors = {"new": Actor(Answer.NONE), "old": Actor(), "ill": Actor()}
    clinic.silent_after(0.0)
    clinic.silent_after(EVERY_S)
    clinic.actors["old"].answer = Answer.NONE
    clinic.silent_after(EVERY_S)
    clinic.actors["ill"].answer = Answer.WRONG
    clinic.now += STARTING_S
    assert clinic.pings.silent(clinic.actors) == {
        "new": "has no process after 310 s",
        "old": "has not answered for 300 s",
        "ill": "says that something is wrong",
    }


def test_one_that_was_silent_is_given_the_time_of_one_that_starts(clinic: Clinic) -> None:
    clinic.silent_after(0.0)
    clinic.silent_after(EVERY_S)
    clinic.actors["a"].answer = Answer.NONE
    clinic.silent_after(EVERY_S)
    assert clinic.silent_after(SILENT_S + 1.0) == ["a"]
    assert clinic.silent_after(0.0) == []
    assert clinic.silent_after(STARTING_S) == []
    assert clinic.silent_after(1.0) == ["a"]


def test_one_that_has_not_answered_yet_is_given_longer(clinic: Clinic) -> None:
    clinic.actors["a"].answer = Answer.NONE
    assert clinic.silent_after(0.0) == []
    assert clinic.silent_after(STARTING_S) == []
    assert clinic.silent_after(1.0) == ["a"]


def test_a_late_answer_is_an_answer(clinic: Clinic) -> None:
    actor = clinic.actors["a"]
    actor.answer = Answer.NONE
    clinic.silent_after(0.0)
    clinic.silent_after(STARTING_S - 1.0)
    actor.answer = Answer.WELL
    assert clinic.silent_after(100.0) == []
    actor.answer = Answer.NONE
    clinic.silent_after(EVERY_S)
    assert clinic.silent_after(SILENT_S + 1.0) == ["a"], "it has answered once"


def test_one_that_says_that_something_is_wrong_is_silent_at_once(clinic: Clinic) -> None:
    clinic.silent_after(0.0)
    clinic.actors["a"].answer = Answer.WRONG
    assert clinic.silent_after(0.1) == ["a"]


def test_one_that_is_dead_is_not_silent_and_the_next_of_its_name_has_the_time_of_one_that_starts(
    clinic: Clinic,
) -> None:
    clinic.silent_after(0.0)
    clinic.silent_after(EVERY_S)
    clinic.actors["a"].answer = Answer.DEAD
    assert not any(clinic.silent_after(1.0) for _ in range(100))
    clinic.actors["a"].answer = Answer.NONE
    clinic.silent_after(1.0)
    assert clinic.silent_after(SILENT_S + 1.0) == []


def test_one_that_is_not_asked_any_more_is_forgotten(clinic: Clinic) -> None:
    clinic.silent_after(0.0)
    clinic.silent_after(1.0)
    del clinic.actors["a"]
    clinic.silent_after(1.0)
    clinic.actors["a"] = Actor(Answer.NONE)
    clinic.silent_after(1.0)
    assert clinic.silent_after(SILENT_S + 1.0) == [], "another one that is called so has not answered yet"


def test_each_is_judged_by_its_own_answers(clinic: Clinic) -> None:
    clinic.actors = {name: Actor() for name in "abc"}
    clinic.silent_after(0.0)
    clinic.silent_after(EVERY_S)
    clinic.actors["b"].answer = Answer.NONE
    clinic.actors["c"].answer = Answer.WRONG
    assert clinic.silent_after(EVERY_S) == []
    assert clinic.silent_after(0.0) == ["c"]
    clinic.actors["c"].answer = Answer.WELL
    assert clinic.silent_after(SILENT_S + 1.0) == ["b"]


def test_one_that_cannot_be_called_though_it_has_started_is_called_again_and_silent_all_the_same(
    clinic: Clinic,
) -> None:
    actor = clinic.actors["a"]
    actor.answer = Answer.UNREACHED
    clinic.silent_after(0.0)
    assert not any(clinic.silent_after(EVERY_S) for _ in range(int(SILENT_S / EVERY_S) + 1))
    assert actor.calls > 3
    assert clinic.silent_after(EVERY_S) == ["a"]
