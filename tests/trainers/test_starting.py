"""Workers that do not begin do not hold their pack for ever."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Timer
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from polygraft.trainers import starting
from polygraft.trainers.starting import Starting

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

WORKERS = cast("WorkerGroup", SimpleNamespace())
LONG_S = 3600.0


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Event:
    found = Event()
    monkeypatch.setattr(Starting, "_end", lambda _: found.set())
    return found


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many timers will still end the run."""
    made: list[Timer] = []

    class Kept(Timer):
        def __init__(self, interval: float, function: Callable[[], None]) -> None:
            super().__init__(interval, function)
            made.append(self)

    monkeypatch.setattr(starting, "Timer", Kept)
    return lambda: sum(not one.finished.is_set() for one in made)


def test_a_run_whose_workers_do_not_begin_in_time_ends(ended: Event) -> None:
    with Starting(0.01).on_worker_group_start():
        assert ended.wait(60.0)


def test_a_run_whose_workers_are_there_and_do_not_take_their_first_call_ends(ended: Event) -> None:
    with Starting(0.01).on_worker_group_start():
        pass
    assert ended.wait(60.0)


def test_a_run_whose_workers_begin_in_time_goes_on(waiting: Callable[[], int]) -> None:
    begun = Starting(LONG_S)
    with begun.on_worker_group_start():
        pass
    assert waiting() == 1
    begun.after_worker_group_training_start(WORKERS)
    assert waiting() == 0


def test_a_run_that_fails_by_itself_is_not_ended(waiting: Callable[[], int]) -> None:
    with pytest.raises(RuntimeError, match="no room"), Starting(LONG_S).on_worker_group_start():
        raise RuntimeError("no room")
    assert waiting() == 0


def test_workers_that_die_before_their_first_call_leave_no_timer_and_those_after_them_have_their_own(
    waiting: Callable[[], int],
) -> None:
    died = Starting(LONG_S)
    for _ in range(2):
        with died.on_worker_group_start():
            pass
        assert waiting() == 1
    died.before_worker_group_shutdown(WORKERS)
    assert waiting() == 0
