"""How an engine accounts for those who wait in its queue and those who run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.cluster.model import GraftId, TenantId
from polygraft.cluster.policy.batching import Running, StepPlan, Waiting, admit_streams
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving import streams
from polygraft.serving.engine import Engine
from tests.serving.engines import Heard, engine_on, request, run
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

ANN, BOB = TenantId("ann"), TenantId("bob")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny"), layers=1), torch.float32)


def test_a_tenant_that_comes_to_the_queue_begins_where_those_who_wait_are(backbone: Backbone, tmp_path: Path) -> None:
    """What it did not ask for before is not saved up (VTC, algorithm 2)."""
    engine = engine_on(backbone, tmp_path, max_streams=1)
    for name in ("runs", "waits"):
        engine.submit(request(name, (5, 6, 7), 20, tenant=ANN))
    for _ in range(4):
        engine.turn()
    ledger = engine._streams.tenants.ledger
    assert (ledger.counter(ANN), ledger.counter(BOB)) == (3 + 4 * 2, 0.0), "a prompt of three, four tokens of an answer"
    engine.submit(request("new", (5, 6), 2, tenant=BOB))
    engine.turn()
    ledger = engine._streams.tenants.ledger
    assert (ledger.counter(ANN), ledger.counter(BOB)) == (13.0, 11.0)
    engine.stop()


def test_a_graft_is_read_though_many_streams_before_wait_whose_grafts_are_in_memory(
    backbone: Backbone, tmp_path: Path
) -> None:
    bound = BoundGraft(parse("ia3"), backbone.shape)
    saved = [
        GraftId(native.save(tmp_path / "grafts", bound, random_tensors(bound, seed), backbone=backbone.fingerprint))
        for seed in range(5)
    ]
    engine = engine_on(backbone, tmp_path, max_streams=1)
    for graft in saved[:4]:
        engine.expect(graft)
    while len(engine.load.resident) < 4:
        engine.turn()
    engine.submit(request("runs", (5, 6), 120))
    for n, graft in enumerate(saved):
        engine.submit(request(f"{n}", (5, 6), 2, graft=graft))
    for _ in range(100):
        engine.turn()
        if saved[4] in engine.load.resident:
            break
        time.sleep(0.05)
    assert saved[4] in engine.load.resident and (engine.load.running, engine.load.waiting) == (1, 5)
    engine.stop()


def test_one_that_cannot_be_served_costs_those_behind_it_no_step(backbone: Backbone, tmp_path: Path) -> None:
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=32, max_streams=1)
    for name, length in (("long", 30), ("short", 2), ("waits", 2)):
        engine.submit(request(name, (5,) * length, 4))
    engine.turn()
    assert heard.reasons() == {"long": "error"} and len(heard.tokens["short"]) == 1
    assert (engine.load.waiting, engine.load.deferred) == (1, 0), "it waits for its turn, and for no graft"
    engine.stop()


def test_the_step_that_takes_a_graft_in_computes_who_waited_for_it(backbone: Backbone, tmp_path: Path) -> None:
    bound, heard = BoundGraft(parse("ia3"), backbone.shape), Heard()
    graft = native.save(tmp_path / "grafts", bound, random_tensors(bound, 1), backbone=backbone.fingerprint)
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("a", (5, 6), 2, graft=GraftId(graft)))
    for _ in range(400):
        engine.turn()
        if engine.load.resident:
            break
        time.sleep(0.01)
    assert len(heard.tokens["a"]) == 1
    engine.stop()


def asked_for_two(backbone: Backbone, data: Path, heard: Heard, *, tokens: int) -> Engine:
    """For "a" and "b"."""
    engine = engine_on(backbone, data, heard=heard)
    for name in "ab":
        engine.submit(request(name, (5, 6), tokens))
    return engine


def test_a_plan_that_no_stream_alone_spoils_is_nobodys_failure(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, real = Heard(), admit_streams

    def raising(ready: list[Waiting], running: list[Running], **given: Any) -> StepPlan:
        if len(ready) + len(running) > 1:
            raise RuntimeError("two are too many")
        return real(ready, running, **given)

    monkeypatch.setattr(streams, "admit_streams", raising)
    engine = asked_for_two(backbone, tmp_path, heard, tokens=2)
    assert engine.turn() and engine._failures == 1 and not heard.ends
    engine.cancel("b")
    engine.turn()
    assert engine._failures == 0 and heard.reasons() == {"b": "cancelled"} and heard.tokens["a"]
    engine.stop()


@pytest.mark.parametrize("runs", [False, True])
def test_who_spoils_the_plan_while_it_waits_or_runs_ends_alone(
    runs: bool, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()

    def raising(ready: list[Waiting], running: list[Running], **given: Any) -> StepPlan:
        if "b" in [one.id for one in (running if runs else ready)]:
            raise RuntimeError("over b")
        return admit_streams(ready, running, **given)

    monkeypatch.setattr(streams, "admit_streams", raising)
    engine = asked_for_two(backbone, tmp_path, heard, tokens=3)
    run(engine)
    assert heard.reasons() == {"a": "length", "b": "error"} and len(heard.tokens["b"]) == runs
    engine.stop()


def test_a_stream_that_ends_in_its_last_block_asks_for_no_further_one(backbone: Backbone, tmp_path: Path) -> None:
    heard, per_block = Heard(), 2 * 16 * 32 * 4
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=33, kv_bytes=5 * per_block)
    assert engine.load.blocks == 4
    for name in "ab":
        engine.submit(request(name, (5, 6, 7), 30))  # 32 of them are cached
    run(engine)
    assert heard.reasons() == {"a": "length", "b": "length"} and not engine.load.tally.preemptions
    engine.stop()


def test_a_prompt_that_fits_only_without_those_who_run_waits_for_their_end(backbone: Backbone, tmp_path: Path) -> None:
    heard, per_block = Heard(), 2 * 16 * 32 * 4
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=64, kv_bytes=6 * per_block)
    engine.submit(request("a", (5, 6, 7), 20))
    engine.submit(request("b", (5,) * 49, 4))
    engine.turn()
    assert [one.request.id for one in engine._streams.waiting] == ["b"]
    run(engine)
    assert heard.reasons() == {"a": "length", "b": "length"} and not engine.load.tally.preemptions
    engine.stop()
