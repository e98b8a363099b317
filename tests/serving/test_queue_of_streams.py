"""How an engine accounts for those who wait in its queue and those who run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import TenantId
from polygraft.grafts.runtime.backbone import Backbone
from tests.serving.engines import engine_on, request
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
