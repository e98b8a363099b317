"""Workers that do not begin do not hold their pack for ever."""

from __future__ import annotations

import time
from threading import Event

import pytest

from polygraft.trainers.starting import Starting


def test_a_run_whose_workers_do_not_begin_in_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Event()
    monkeypatch.setattr(Starting, "_end", lambda _: ended.set())
    with Starting(0.01).on_worker_group_start():
        assert ended.wait(60.0)


def test_a_run_whose_workers_begin_in_time_goes_on_and_so_does_one_that_fails_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = Event()
    monkeypatch.setattr(Starting, "_end", lambda _: ended.set())
    with Starting(0.1).on_worker_group_start():
        pass
    with pytest.raises(RuntimeError, match="no room"), Starting(0.1).on_worker_group_start():
        raise RuntimeError("no room")
    time.sleep(0.2)
    assert not ended.is_set()
