"""How long a request may be, how small a cache, and who is first in the queue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from tests.serving.engines import Heard, engine_on, request, run
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


def test_a_request_may_fill_the_context_with_its_grafts_virtual_tokens_and_no_more(
    backbone: Backbone, tmp_path: Path
) -> None:
    bound = BoundGraft(parse("prefix(3)"), backbone.shape)
    saved = native.save(tmp_path / "grafts", bound, random_tensors(bound, 0), backbone=backbone.fingerprint)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=32)
    for name, prompt, graft in (("bare", 28, None), ("more", 29, None), ("ours", 25, saved), ("long", 26, saved)):
        engine.submit(request(name, (5,) * prompt, 4, graft=None if graft is None else GraftId(graft)))
    run(engine)
    assert heard.reasons() == {"bare": "length", "more": "error", "ours": "length", "long": "error"}
    assert "are 33, the context is 32" in str(heard.ends["long"].error)


def test_a_cache_that_is_too_small_is_told_the_least_that_is_enough(backbone: Backbone, tmp_path: Path) -> None:
    per_block = 2 * 16 * 2 * 32 * 4
    with pytest.raises(ValueError, match=r"give at least \d+") as refusal:
        engine_on(backbone, tmp_path, max_context=52, kv_bytes=100)
    least = int(re.findall(r"at least (\d+)", str(refusal.value))[0])
    assert least == 6 * per_block, "four blocks of a context, one to grow into, and one that is never given out"
    assert engine_on(backbone, tmp_path, max_context=52, kv_bytes=least).load.blocks == 5
    with pytest.raises(ValueError, match="less than one context of 52 tokens"):
        engine_on(backbone, tmp_path, max_context=52, kv_bytes=least - 1)


def test_one_that_another_replica_had_waits_before_those_that_came_earlier(backbone: Backbone, tmp_path: Path) -> None:
    heard = Heard()
    heard.tokens["moved"].append(7)
    engine = engine_on(backbone, tmp_path, heard=heard, max_streams=1)
    engine.submit(request("runs", (5, 6), 4))
    engine.turn()
    for name in ("first", "second"):
        engine.submit(request(name, (5, 6), 2))
    engine.submit(request("moved", (5, 6), 3, generated=(7,), attempt=1))
    engine.turn()
    assert [stream.request.id for stream in engine._streams.waiting] == ["moved", "first", "second"]
    run(engine)
    assert list(heard.ends) == ["runs", "moved", "first", "second"]
