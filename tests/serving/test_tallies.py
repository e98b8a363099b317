"""What an engine says of itself: its load, its tally, its step log; and when its thread gives up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.batch import Batch
from polygraft.serving.engine import Engine
from polygraft.serving.messages import Load, QueueFull, Tally
from polygraft.serving.residency import Residency
from polygraft.serving.streams import Streams
from tests.serving.engines import Heard, engine_on, request, run
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

STEP_S = 2.0


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


class Timed:
    """An engine with one place, whose forwards take two seconds of its clock."""

    def __init__(self, backbone: Backbone, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        settings = ServeSettings(max_streams=1, max_context=128, kv_bytes=4 << 20, max_rows=24)
        self.engine = Engine(
            backbone,
            settings,
            replica=ReplicaId("r0"),
            data=data,
            clock=lambda: self.now,
            now=lambda: self.now + 0.23456,
        )
        self.engine.listen("", Heard())
        forward = Engine._forward

        def timed(engine: Engine, batch: Batch) -> Any:
            self.now += STEP_S
            return forward(engine, batch)

        monkeypatch.setattr(Engine, "_forward", timed)


def test_steps_rows_and_waits_are_counted(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(backbone, tmp_path, monkeypatch)
    engine = timed.engine
    assert engine.idle() and not engine.turn()
    for name in ("a", "b"):
        engine.submit(request(name, (5, 6, 7), 2))
    assert not engine.idle()
    assert engine.turn()
    first = Tally(steps=1, rows=3, step_s=STEP_S, entered=1, prefix_queries=3)
    blocks = engine.load.blocks
    assert engine.load == Load(running=1, waiting=1, blocks=blocks, free_blocks=blocks - 1, tally=first)
    run(engine)
    # b entered after the two steps of a, and both had a prompt of three rows and one row more.
    assert engine.load == Load(
        blocks=blocks,
        free_blocks=blocks,
        tally=Tally(steps=4, rows=8, step_s=4 * STEP_S, entered=2, queued_s=4.0, prefix_queries=6),
    )
    assert engine.idle()


def test_the_step_log_says_what_was_mixed(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = BoundGraft(parse("lora(r=2)"), backbone.shape)
    values = random_tensors(bound, 0)
    graft = GraftId(native.save(tmp_path / "grafts", bound, values, backbone=backbone.fingerprint))
    engine = Timed(backbone, tmp_path, monkeypatch).engine
    engine.submit(request("a", (5, 6, 7), 2, graft=graft))
    run(engine)
    common = {"requests": ["a"], "grafts": [graft], "methods": ["lora(r=2)"], "device": "cpu"}
    lines = [json.loads(line) for line in (tmp_path / "replicas/r0/steps.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "time": 102.235, "rows": 3, "prefill_rows": 3, **common},
        {"step": 2, "time": 104.235, "rows": 1, "prefill_rows": 0, **common},
    ]
    tally = engine.load.tally
    assert (tally.loads, tally.evictions) == (1, 0) and tally.load_s > 0
    size = sum(value.nbytes for value in values.values())
    assert (engine.load.resident, engine.load.resident_bytes, engine.load.deferred) == ((graft,), size, 0)


def test_a_stream_that_waits_for_its_graft_is_deferred_and_one_that_had_to_leave_is_counted(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, fetch = Event(), Residency.fetch
    monkeypatch.setattr(Residency, "fetch", lambda self, graft: fetch(self, graft) if go.wait(30) else None)
    engine = engine_on(backbone, tmp_path)
    engine.submit(request("bare", (5, 6), 2))
    engine.submit(request("waits", (5, 6), 2, graft=GraftId("0" * 32)))
    engine.turn()
    assert (engine.load.running, engine.load.waiting, engine.load.deferred) == (1, 1, 1)
    go.set()
    run(engine)
    per_block = 2 * 16 * 2 * 32 * 4
    small = engine_on(backbone, tmp_path / "small", max_context=52, kv_bytes=7 * per_block)
    for n, name in enumerate(("p", "q", "r")):
        small.submit(request(name, (5 + n, 6, 7), 40))
    run(small)
    left = [json.loads(line) for line in (tmp_path / "small/replicas/r0/steps.jsonl").read_text().splitlines()]
    seen: set[str] = set()
    back = 0
    for step, before in zip(left[1:], left, strict=False):
        seen |= {*before["requests"]}
        back += len({*step["requests"]} & seen - {*before["requests"]})
    assert small.load.tally.preemptions == back > 0 and small.load.tally.entered == 3


@pytest.mark.parametrize("working", [0, 10])
def test_a_thread_gives_up_after_ten_turns_that_fail_in_a_row_and_tells_those_who_wait(
    working: int, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is nobody's forward; every tenth turn may work."""
    choose, calls = Streams.choose, []

    def failing(streams: Streams, now: float) -> Any:
        calls.append(now)
        if working and len(calls) % working == 0:
            return choose(streams, now)
        raise RuntimeError("nobody's")

    monkeypatch.setattr(Streams, "choose", failing)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("a", (5, 6, 7), 3))
    engine.start()
    if working:
        while not heard.ends:
            time.sleep(0.01)
        assert engine.healthy(60.0) and heard.reasons() == {"a": "length"}
        engine.stop()
    else:
        engine._thread.join(30)
        assert len(calls) == 10 and heard.reasons() == {"a": "cancelled"}
    assert not engine.healthy(60.0)


@pytest.mark.parametrize(("owner", "place"), [(Engine, "_forward"), (Streams, "_check_length")])
def test_a_process_that_can_do_no_more_ends_its_thread_at_once_and_blames_no_stream(
    owner: type, place: str, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN had no memory to compile a product, for all streams or in what is done for one: they go on elsewhere."""

    def failing(*_: object) -> Any:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(owner, place, failing)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard)
    for name in ("a", "b"):
        engine.submit(request(name, (5, 6, 7), 3))
    engine.start()
    engine._thread.join(30)
    assert not engine.healthy(60.0) and heard.reasons() == {"a": "cancelled", "b": "cancelled"}


def test_an_engine_that_stops_says_when_to_ask_again(backbone: Backbone, tmp_path: Path) -> None:
    engine = engine_on(backbone, tmp_path)
    assert engine.submit(request("a", (5,), 1)) is None
    engine.stop()
    assert engine.submit(request("b", (5,), 1)) == QueueFull(2.0)


def test_an_idle_engine_sleeps_for_a_while_unless_it_was_woken(backbone: Backbone, tmp_path: Path) -> None:
    engine = engine_on(backbone, tmp_path)
    engine.cancel("nobody")
    took = []
    for _ in range(2):
        begun = time.perf_counter()
        engine._idle()
        took.append(time.perf_counter() - begun)
    assert took[0] < 0.3 and 0.4 < took[1] < 1.4
