"""An engine's thread: whatever is asked of it wakes it, it says whether it lives, and nothing of it is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving import engine as engine_module
from polygraft.serving.engine import Engine
from polygraft.serving.streams import Streams
from tests.serving.engines import Heard, engine_on, request, run
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny"), layers=1), torch.float32)


def until(holds: Callable[[], object]) -> None:
    """Within much less than an idle engine of these tests sleeps."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def open_files(folder: Path) -> set[str]:
    return {Path(one.path).name for one in psutil.Process().open_files() if one.path.startswith(str(folder))}


def test_whatever_is_asked_of_an_engine_that_sleeps_wakes_it(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_IDLE_S", 300.0)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.start()
    asked: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: engine.submit(request("a", (5, 6), 3)), lambda: heard.ends),
        (lambda: engine.cancel("nobody"), lambda: not engine._cancelled),
        (lambda: engine.expect(GraftId("nobody's")), lambda: not engine.expects(GraftId("nobody's"))),
        (lambda: engine.leave("", heard), lambda: not engine._left),
    ]
    for ask, is_done in asked:
        until(lambda: vars(engine._changed)["_waiters"])
        ask()
        until(is_done)
    until(lambda: vars(engine._changed)["_waiters"])
    engine.stop()
    assert not engine.healthy(60.0) and open_files(tmp_path) == set()


def test_an_engine_lives_while_its_thread_does_and_has_begun_a_turn_not_long_ago(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    settings = ServeSettings(max_context=64, kv_bytes=4 << 20)
    engine = Engine(backbone, settings, replica=ReplicaId("r"), data=tmp_path, clock=lambda: now[0])
    assert engine._thread.daemon, "a process that is to end does not wait for it"
    assert not engine.healthy(5.0)
    monkeypatch.setattr(engine._thread, "is_alive", lambda: True)
    for later, healthy in ((4.5, True), (5.0, False)):
        now[0] = 100.0 + later
        assert engine.healthy(5.0) is healthy
    engine.turn()
    assert engine.healthy(5.0)


def test_what_an_engine_opened_is_closed_though_its_thread_was_never_started(
    backbone: Backbone, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    engine = engine_on(backbone, tmp_path)
    engine.expect(GraftId("nobody's"))
    engine.submit(request("a", (5, 6), 2))
    run(engine)
    assert open_files(tmp_path) == {"steps.jsonl"}
    engine.stop()
    assert open_files(tmp_path) == set()
    until(lambda: before.issuperset(threading.enumerate()))


def test_a_graft_is_expected_from_when_it_is_asked_for_until_it_was_read(backbone: Backbone, tmp_path: Path) -> None:
    engine, graft = engine_on(backbone, tmp_path), GraftId("nobody's")
    assert not engine.expects(graft)
    engine.expect(graft)
    assert engine.expects(graft), "before any turn"
    engine.turn()
    until(lambda: engine.turn() or not engine.expects(graft))
    engine.stop()


def test_a_step_that_failed_is_followed_by_the_next_one_at_once(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("nobody's")

    engine = engine_on(backbone, tmp_path)
    assert not engine.turn(), "there is nothing to do: it may sleep"
    monkeypatch.setattr(Streams, "choose", failing)
    assert engine.turn()
    engine.stop()


def test_a_step_takes_its_floor_and_what_is_longer_goes_on_at_once(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept, takes = [100.0], list[float](), [2.0, 7.0, 2.0]
    settings = ServeSettings(max_context=64, kv_bytes=4 << 20)
    engine = Engine(backbone, settings, replica=ReplicaId("r"), data=tmp_path, step_floor_s=5.0, clock=lambda: now[0])
    real = engine.turn

    def turn() -> bool:
        busy = real()
        now[0] += takes.pop(0) if busy else 0.0
        engine._stopping = not takes
        return busy

    monkeypatch.setattr(engine, "turn", turn)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(sleep=slept.append))
    engine.submit(request("a", (5, 6), 3))
    engine._run()
    assert slept == [3.0, 0.0, 3.0]


def test_an_engine_that_has_lost_a_block_of_its_cache_ends_once_nobody_runs(backbone: Backbone, tmp_path: Path) -> None:
    engine = engine_on(backbone, tmp_path)
    engine.submit(request("a", (5, 6), 3))
    assert engine.turn()
    engine._streams.blocks._free.pop()
    engine._wake()
    engine._idle()  # a stream still runs
    run(engine)
    with pytest.raises(AssertionError, match="a cache block is lost"):
        engine._idle()
    engine.stop()
