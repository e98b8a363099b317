"""What prompts of one tenant and graft have in common is computed once, and no text is other for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.cluster.model import GraftId, TenantId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.batch import Batch
from polygraft.serving.blocks import Blocks
from polygraft.serving.engine import Engine
from polygraft.serving.prefixes import Match
from polygraft.serving.request import GenerationRequest
from tests.serving.engines import Heard, engine_on, request, run
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

BARE = "bare"
SHARING = ("lora(r=4)", "prefix(5)", "prefix(40)", "prompt(6)", "dept(4, rows=30, r=2)")
WHOLE = ("smop(4, k=3)", "loreft(r=4, first=2, last=1)")  # what they do depends on where the prompt ends
TEXT = tuple(torch.randint(3, 500, (300,), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def grafts(backbone: Backbone, data: Path) -> dict[str, GraftId | None]:
    made: dict[str, GraftId | None] = {BARE: None}
    for seed, method in enumerate((*SHARING, *WHOLE)):
        bound = BoundGraft(parse(method), backbone.shape)
        values = random_tensors(bound, seed)
        made[method] = GraftId(native.save(data / "grafts", bound, values, backbone=backbone.fingerprint))
    return made


@dataclass
class Asked:
    """An engine, and what it says to one request after the other."""

    engine: Engine
    heard: Heard

    def __call__(self, wanted: GenerationRequest) -> tuple[int, int]:
        """How many rows were computed for it, and how many of its tokens were not."""
        before = self.engine.load.tally
        self.heard.tokens[wanted.id] = [*wanted.generated]
        self.engine.submit(wanted)
        run(self.engine)
        after = self.engine.load.tally
        return after.rows - before.rows, after.prefix_hits - before.prefix_hits


def asked(backbone: Backbone, data: Path, **settings: int) -> Asked:
    heard = Heard()
    return Asked(engine_on(backbone, data, heard=heard, **{"max_rows": 64, **settings}), heard)


def read_in(engine: Engine, grafts: Iterable[GraftId | None]) -> None:
    """So that who is computed when does not depend on the time that reading takes."""
    wanted = [graft for graft in grafts if graft is not None]
    for graft in wanted:
        engine.expect(graft)
    while any(engine.expects(graft) for graft in wanted):
        engine.turn()
        time.sleep(0.001)
    assert set(engine.load.resident) == set(wanted)


@pytest.mark.parametrize("room", ["plenty", "little"])
def test_texts_have_the_same_bits_whether_what_they_share_is_computed_once_or_for_each(
    room: str, backbone: Backbone, data: Path, grafts: dict[str, GraftId | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and drawn, beginning alike for as many tokens as there are streams of a graft, and some more."""
    logits: dict[tuple[str, int], Tensor] = {}
    sampled = Engine._sample

    def recording(engine: Engine, batch: Batch, rows: Tensor) -> list[int | None]:
        logits.update({(s.request.id, s.generated): row.clone() for s, row in zip(batch.sampled, rows, strict=True)})
        return sampled(engine, batch, rows)

    monkeypatch.setattr(Engine, "_sample", recording)
    said, rows = [], []
    blocks = 400 if room == "plenty" else 18
    for cached in (False, True):
        heard = Heard()
        engine = engine_on(
            backbone, data, heard=heard, max_rows=48, prefix_cache=cached, kv_bytes=(blocks + 1) * 8192, max_streams=8
        )
        read_in(engine, grafts.values())
        for turn in range(4):
            for method, graft in grafts.items():
                prompt = (*TEXT[: 18 + 5 * turn], *TEXT[100 + turn : 110 + 2 * turn])
                drawn = {"temperature": 0.9, "seed": turn} if turn % 2 else {}
                engine.submit(request(f"{method} {turn}", prompt, 36, graft=graft, **drawn))
                engine.turn()
        run(engine)
        assert set(heard.reasons().values()) == {"length"} and engine.load.free_blocks == engine.load.blocks
        said.append((dict(heard.tokens), {at: row.numpy().tobytes() for at, row in logits.items()}))
        rows.append(engine.load.tally.rows)
        logits.clear()
    assert said[0] == said[1]
    assert rows[1] < rows[0] - 100
    assert room == "plenty" or engine.load.tally.preemptions


@pytest.mark.parametrize("method", [BARE, *SHARING])
def test_the_same_prompt_again_costs_what_is_left_of_its_last_block_and_one_row_where_that_is_full(
    method: str, backbone: Backbone, data: Path, grafts: dict[str, GraftId | None]
) -> None:
    ask, graft = asked(backbone, data), grafts[method]
    virtual = BoundGraft(parse(method), backbone.shape).virtual_length if graft else 0
    prefix = BoundGraft(parse(method), backbone.shape).prefix_length if graft else 0
    assert ask(request("first", TEXT[:40], 1, graft=graft)) == (40 + virtual, 0)
    behind = (prefix + virtual + 40) % 16 or 1
    assert ask(request("again", TEXT[:40], 20, graft=graft)) == (behind + 19, 40 + virtual - behind)
    assert ask(request("more", TEXT[:40], 20, graft=graft)) == (20, 39 + virtual)
    assert ask.heard.tokens["again"] == ask.heard.tokens["more"]
    # The next turn of the chat, and a stream that another replica had.
    chat = (*TEXT[:40], *ask.heard.tokens["again"][:-1], 7, 8, 9)
    assert ask(request("turn", chat, 1, graft=graft))[0] < 20
    moved = request("moved", TEXT[:40], 20, graft=graft, generated=tuple(ask.heard.tokens["again"][:9]), attempt=1)
    assert ask(moved)[0] == 11
    assert ask.heard.tokens["moved"] == ask.heard.tokens["again"]


def test_who_begins_like_another_computes_what_is_its_own(backbone: Backbone, data: Path) -> None:
    ask = asked(backbone, data)
    ask(request("first", TEXT[:60], 1))
    assert ask(request("alike", (*TEXT[:37], *TEXT[200:230]), 1)) == (30, 37)
    tally = ask.engine.load.tally
    assert (tally.prefix_queries, tally.prefix_hits) == (127, 37)


def test_what_waits_is_looked_up_again_only_when_there_may_be_more_of_it(
    backbone: Backbone, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    match = Blocks.match

    def noted(blocks: Blocks, owner: object, ids: list[int], before: Match) -> Match:
        looked.append(f"{ids[-1]}")
        return match(blocks, owner, ids, before)

    monkeypatch.setattr(Blocks, "match", noted)
    ask = asked(backbone, data, max_streams=2, max_context=160)
    for name in ("a", "b"):
        ask.engine.submit(request(name, (*TEXT[:40], 3 + ord(name), *TEXT[40:48]), 60))
    while len(ask.heard.tokens) < 2:
        ask.engine.turn()
    for n in range(2):
        ask.engine.submit(request(f"{n}", (*TEXT[:40], n, n), 60))
    seen = []
    for _ in range(30):
        looked.clear()
        ask.engine.turn()
        seen.append(len(looked))
    assert seen == [2, *[0] * 29] and ask.engine.load.waiting == 2


def test_a_tenant_pays_for_what_is_computed_of_its_prompts(backbone: Backbone, data: Path) -> None:
    ask = asked(backbone, data)
    paid = [0.0]
    for name, prompt in (("a", TEXT[:60]), ("b", TEXT[:40]), ("c", (*TEXT[:37], 3, 4, 5)), ("d", TEXT[:41])):
        ask(request(name, prompt, 1))
        paid.append(ask.engine._streams.tenants.ledger.counter(TenantId("t")))
    assert [after - before - 2 for before, after in pairwise(paid)] == [60, 1, 3, 1]


def test_no_tenant_and_no_graft_has_what_was_computed_for_another(
    backbone: Backbone, data: Path, grafts: dict[str, GraftId | None]
) -> None:
    bound = BoundGraft(parse(SHARING[0]), backbone.shape)
    version = GraftId(native.save(data / "grafts", bound, random_tensors(bound, 99), backbone=backbone.fingerprint))
    ask = asked(backbone, data)
    owners = [
        (TenantId("t"), None),
        (TenantId("u"), None),
        (TenantId("t"), grafts[SHARING[0]]),
        (TenantId("t"), version),
    ]
    for turn, hits in ((0, 0), (1, 32)):
        for n, (tenant, graft) in enumerate(owners):
            assert ask(request(f"{turn}.{n}", TEXT[:40], 2, tenant=tenant, graft=graft))[1] == hits


@pytest.mark.parametrize("method", WHOLE)
def test_where_the_end_of_the_prompt_counts_nothing_is_shared(
    method: str, backbone: Backbone, data: Path, grafts: dict[str, GraftId | None]
) -> None:
    ask = asked(backbone, data)
    for name in ("a", "b"):
        assert ask(request(name, TEXT[:40], 2, graft=grafts[method]))[1] == 0
    assert ask.engine.load.tally.prefix_queries == 0 and ask.heard.tokens["a"] == ask.heard.tokens["b"]


def test_what_is_kept_for_later_keeps_nobody_out(backbone: Backbone, tmp_path: Path) -> None:
    """In a cache of fifteen blocks, of which each stream needs four, the same streams are in each step."""
    logs = []
    for cached in (False, True):
        engine = engine_on(backbone, tmp_path / f"{cached}", kv_bytes=16 * 8192, prefix_cache=cached)
        for n in range(12):
            engine.submit(request(f"{n}", TEXT[20 * n : 20 * n + 55], 4))
        run(engine)
        lines = (tmp_path / f"{cached}/replicas/r0/steps.jsonl").read_text().splitlines()
        logs.append([line[line.index('"rows"') :] for line in lines])
        assert engine.load.free_blocks == engine.load.blocks and not engine.load.tally.preemptions
    assert logs[0] == logs[1]
    kept = engine._streams.blocks
    assert len(kept._known_free) > kept.total // 2


def test_a_stream_that_had_to_leave_finds_again_what_it_had(backbone: Backbone, data: Path) -> None:
    ask = asked(backbone, data)
    ask.engine.submit(request("a", TEXT[:20], 30))
    while len(ask.heard.tokens["a"]) < 20:
        ask.engine.turn()
    (sequence,) = ask.engine._streams.running
    ask.engine._streams._preempt(sequence)
    run(ask.engine)
    assert ask.engine.load.tally.rows == 20 + 29 + 39 % 16


def test_who_finds_more_than_its_step_was_planned_for_computes_what_is_left(backbone: Backbone, data: Path) -> None:
    """Of blocks that begin alike the newest are looked at; who enters before it is given some of these, and then an
    older one, which goes on longer as it does, is among them."""
    ask = asked(backbone, data, max_rows=256, kv_bytes=37 * 8192)
    ask(request("old", TEXT[:17], 1))
    for n in range(32):
        ask(request(f"newer {n}", (*TEXT[:3], *TEXT[60 + 5 * n : 74 + 5 * n]), 1))
    ask(request("old again", TEXT[:17], 1))
    before = ask.engine.load.tally.rows
    ask.engine.submit(request("before", TEXT[200:290], 1))
    ask(request("target", (*TEXT[:10], *TEXT[50:60]), 4))
    assert ask.engine.load.tally.rows - before == 90 + 10 + 3
    assert len(ask.heard.tokens["target"]) == 4


@pytest.mark.parametrize("after", [0, 5])
def test_what_a_stream_that_failed_had_is_computed_anew(
    after: int, backbone: Backbone, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are not finite; its prompt is another's that ended well."""
    ask = asked(backbone, data)
    if after:
        ask(request("good", TEXT[:80], 8))
    forward = Engine._forward

    def poisoned(engine: Engine, batch: Batch) -> object:
        for chunk in batch.chunks:
            if chunk.sequence.request.id == "bad" and chunk.sequence.computed and chunk.sequence.generated == after:
                engine._streams.cache.data[:, list(engine._streams.blocks.table("bad"))] = torch.nan
        return forward(engine, batch)

    monkeypatch.setattr(Engine, "_forward", poisoned)
    ask(request("bad", TEXT[:80], 8))
    assert ask.heard.reasons()["bad"] == "error" and len(ask.heard.tokens["bad"]) == after
    assert ask(request("next", TEXT[:80], 8)) == (87, 0)
    monkeypatch.undo()
    alone = asked(backbone, data, prefix_cache=False)
    assert alone(request("alone", TEXT[:80], 8)) == (87, 0)
    assert ask.heard.tokens["next"] == alone.heard.tokens["alone"]
