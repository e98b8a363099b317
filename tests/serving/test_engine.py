"""The engine on a tiny Llama in float32: streams that come and go answer as transformers' generate does alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from polygraft.cluster.model import ReplicaId, TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows
from polygraft.serving.engine import Engine
from polygraft.serving.messages import StepTokens
from tests.serving.engines import Heard, engine_on, request, run
from tests.tiny import tiny_llama

PROMPTS = {
    f"p{i}": tuple(int(x) for x in torch.randint(3, 500, (n,), generator=torch.Generator().manual_seed(i)))
    for i, n in enumerate((1, 5, 17, 40, 33, 2))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    """transformers' greedy continuation of each prompt, 40 tokens, no end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=40, min_new_tokens=40, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        return {
            name: model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
            for name, ids in PROMPTS.items()
        }


@pytest.fixture
def heard() -> Heard:
    return Heard()


def steps_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "replicas/r0/steps.jsonl").read_text().splitlines()]


def test_streams_that_join_and_leave_say_what_generate_says_alone(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard)
    for index, (name, ids) in enumerate(PROMPTS.items()):
        engine.submit(request(name, ids, 12 - index % 3))
        for _ in range(index):
            engine.turn()
    run(engine)
    assert heard.tokens == {name: alone[name][: 12 - i % 3] for i, name in enumerate(PROMPTS)}
    assert set(heard.reasons().values()) == {"length"}
    steps = steps_of(tmp_path)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert max(len(step["requests"]) for step in steps) >= 4
    assert any(0 < step["prefill_rows"] < step["rows"] for step in steps)  # prefill and decode in one forward
    assert all(step["rows"] <= 24 and step["grafts"] == [] for step in steps)


def test_a_prompt_longer_than_a_step_is_prefilled_in_chunks(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard, max_rows=7)
    engine.submit(request("p3", PROMPTS["p3"]))
    run(engine)
    assert heard.tokens["p3"] == alone["p3"][:12]


def test_when_blocks_run_out_the_youngest_starts_again_and_says_the_same(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    per_block = 2 * 16 * 2 * 32 * 4
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=52, kv_bytes=7 * per_block)
    for name in ("p1", "p0", "p5"):
        engine.submit(request(name, PROMPTS[name], 40))
    run(engine)
    assert heard.tokens == {name: alone[name] for name in ("p1", "p0", "p5")}
    assert engine.load.free_blocks == engine.load.blocks == 6
    steps = steps_of(tmp_path)
    once = sum(len(PROMPTS[name]) + 39 for name in ("p1", "p0", "p5"))
    assert sum(step["rows"] for step in steps) > once  # some rows were computed again
    # And its tenant pays for its prompt once, and for each token that it got.
    paid = engine._streams.tenants.ledger.counter(TenantId("t"))
    assert paid == sum(len(PROMPTS[name]) + 2 * 40 for name in ("p1", "p0", "p5"))


def test_a_preempted_stream_keeps_its_place_before_those_who_came_later(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    per_block = 2 * 16 * 2 * 32 * 4
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=52, kv_bytes=7 * per_block)
    for name in ("p5", "p1", "p0"):
        engine.submit(request(name, PROMPTS[name], 40))
    before = len(engine._streams.running)
    while len(engine._streams.running) >= before:
        before = len(engine._streams.running)
        engine.turn()
    preempted = engine._streams.waiting[0].request.id
    engine.submit(request("late", PROMPTS["p1"], 2))
    engine.turn()
    assert preempted == "p0" and [stream.request.id for stream in engine._streams.waiting] == ["p0", "late"]
    before = len(steps_of(tmp_path))
    run(engine)
    entered = {id: n for n, step in reversed([*enumerate(steps_of(tmp_path)[before:])]) for id in step["requests"]}
    assert entered["p0"] <= entered["late"] and heard.tokens["p0"] == alone["p0"]


def test_a_stream_that_comes_back_is_not_the_youngest_again(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    """Else it would have to leave each time, whoever came after it."""
    per_block = 2 * 16 * 2 * 32 * 4
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=52, kv_bytes=7 * per_block)
    for name in ("p1", "p0"):
        engine.submit(request(name, PROMPTS[name], 40))
    for _ in range(10):
        engine.turn()
    engine.submit(request("bob", (5,), 36, tenant=TenantId("bob")))  # the last to enter
    left, beside = set(), set()
    while engine.turn():
        running = engine._streams.running
        assert [stream.entered for stream in running] == sorted(stream.entered or 0 for stream in running)
        left |= {stream.request.id for stream in engine._streams.waiting}
        if "bob" in {stream.request.id for stream in running}:
            beside |= left & {stream.request.id for stream in running}
    assert beside - {"bob"}  # one of the others left and came back while bob was there
    assert heard.tokens["p1"] == alone["p1"] and heard.tokens["p0"] == alone["p0"]


def test_an_end_token_ends_the_stream_and_is_told(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    end = alone["p1"][4]
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("p1", PROMPTS["p1"], eos_ids=(end,)))
    run(engine)
    cut = alone["p1"].index(end) + 1
    assert heard.tokens["p1"] == alone["p1"][:cut] and heard.reasons() == {"p1": "stop"}


def test_a_stream_taken_over_goes_on_with_the_tokens_it_would_have_had(backbone: Backbone, tmp_path: Path) -> None:
    whole, rest = Heard(), Heard()
    sampled = {"temperature": 1.3, "top_p": 0.9, "seed": 42}
    engine = engine_on(backbone, tmp_path, heard=whole)
    engine.submit(request("p2", PROMPTS["p2"], **sampled))  # type: ignore[arg-type]
    run(engine)
    rest.tokens["p2"] = whole.tokens["p2"][:5]
    other = engine_on(backbone, tmp_path, heard=rest)
    other.submit(request("p2", PROMPTS["p2"], generated=tuple(whole.tokens["p2"][:5]), attempt=1, **sampled))  # type: ignore[arg-type]
    run(other)
    assert rest.tokens == whole.tokens and rest.ends["p2"].attempt == 1


def test_a_sampled_stream_does_not_depend_on_its_neighbours(backbone: Backbone, tmp_path: Path) -> None:
    solo, mixed = Heard(), Heard()
    one = request("p1", PROMPTS["p1"], temperature=1.0, seed=7)
    engine = engine_on(backbone, tmp_path, heard=solo)
    engine.submit(one)
    run(engine)
    engine = engine_on(backbone, tmp_path, heard=mixed)
    for index, (name, ids) in enumerate(PROMPTS.items()):
        engine.submit(one if name == "p1" else request(name, ids, temperature=0.8, seed=index))
    run(engine)
    assert mixed.tokens["p1"] == solo.tokens["p1"]


def test_a_cancelled_stream_ends_and_gives_its_blocks_back(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard)
    for name in ("p0", "p3"):
        engine.submit(request(name, PROMPTS[name]))
    for _ in range(4):
        engine.turn()
    engine.cancel("p3")
    engine.cancel("nobody")
    run(engine)
    assert heard.reasons() == {"p0": "length", "p3": "cancelled"}
    assert heard.tokens["p0"] == alone["p0"][:12]
    assert engine.load.free_blocks == engine.load.blocks


def test_the_queue_is_bounded_tenant_by_tenant(backbone: Backbone, tmp_path: Path) -> None:
    engine = engine_on(backbone, tmp_path, max_streams=2, max_queued=1)
    ann = [engine.submit(request(f"a{i}", (5,))) for i in range(5)]
    assert ann[:3] == [None] * 3 and None not in ann[3:]
    bob = [engine.submit(request(f"b{i}", (5,), tenant=TenantId("bob"))) for i in range(4)]
    assert bob[:3] == [None] * 3 and bob[3] is not None
    run(engine)
    assert engine.submit(request("a5", (5,))) is None


def test_nobody_takes_more_of_the_queue_than_is_left_for_others(backbone: Backbone, tmp_path: Path) -> None:
    engine = engine_on(backbone, tmp_path, max_streams=2, max_queued=100, max_queued_in_all=10)
    for name, places in (("ann", 6), ("bob", 3), ("eve", 2), ("joe", 1)):  # of 12 places half, then half of the rest
        taken = [engine.submit(request(f"{name}{i}", (5,), tenant=TenantId(name))) for i in range(20)]
        assert [answer is None for answer in taken] == [True] * places + [False] * (20 - places), name
    run(engine)


def test_a_refused_request_is_told_when_a_place_will_be_free_and_then_gets_it(
    backbone: Backbone, tmp_path: Path
) -> None:
    now = [100.0]
    settings = ServeSettings(max_streams=1, max_queued=3, max_context=128, kv_bytes=4 << 20)
    engine = Engine(backbone, settings, replica=ReplicaId("r0"), data=tmp_path, clock=lambda: now[0])
    engine.listen("", Heard())
    for index in range(8):  # a request takes 4 steps of 2 s: its prompt and 3 tokens
        while engine.submit(request(f"a{index}", (5,), 4)) is not None:
            now[0] += 2.0
            engine.turn()
    told = [engine.submit(request(f"late{index}", (5,), 4)) for index in range(3)]
    waits = [full.retry_after_s for full in told if full is not None]
    assert len(waits) == 3 and waits[0] == pytest.approx(8.0, abs=2.0)
    assert waits[1:] == pytest.approx([2 * waits[0], 3 * waits[0]])  # each has its own place to wait for
    start = now[0]
    for index, wait in enumerate(waits):
        while now[0] < start + wait:
            now[0] += 2.0
            engine.turn()
        assert engine.submit(request(f"late{index}", (5,), 4)) is None


def test_a_poisoned_row_fails_only_its_own_request(
    folder: Path, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    backbone = Backbone.load(folder, torch.float32)
    poison = next(id for id in range(3, 500) if all(id not in (*ids, *alone[name]) for name, ids in PROMPTS.items()))
    backbone.embedding = backbone.embedding.clone()
    backbone.embedding[poison] = float("nan")
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("bad", (9, poison, 11)))
    for name in ("p1", "p2"):
        engine.submit(request(name, PROMPTS[name]))
    run(engine)
    assert heard.reasons() == {"bad": "error", "p1": "length", "p2": "length"}
    assert {name: heard.tokens[name] for name in ("p1", "p2")} == {name: alone[name][:12] for name in ("p1", "p2")}
    # Its blocks are cleaned before somebody else gets them.
    engine.submit(request("p3", PROMPTS["p3"]))
    run(engine)
    assert heard.tokens["p3"] == alone["p3"][:12]


@pytest.mark.parametrize("bad", ["a", "p15", "z"])  # rows are laid out by id: first, in the middle, last
def test_a_stream_that_makes_the_forward_raise_is_found_and_ended_alone(
    backbone: Backbone,
    tmp_path: Path,
    alone: dict[str, list[int]],
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    bad: str,
) -> None:
    whole = Backbone.forward

    def raising(self: Backbone, rows: Rows, *others: Any) -> Any:
        assert 499 not in rows.ids.tolist(), "a poisoned row"
        return whole(self, rows, *others)

    monkeypatch.setattr(Backbone, "forward", raising)
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("p1", PROMPTS["p1"]))
    engine.submit(request(bad, (7, 499)))
    engine.submit(request("p2", PROMPTS["p2"]))
    run(engine)
    assert heard.reasons() == {bad: "error", "p1": "length", "p2": "length"}
    assert heard.tokens["p1"] == alone["p1"][:12] and heard.tokens["p2"] == alone["p2"][:12]
    together = [step["requests"] for step in steps_of(tmp_path)][-1]
    assert together == ["p1", "p2"]  # who was tried alone and is innocent goes on in company


@pytest.mark.parametrize("wrong", [512, 10**6, -1])
def test_a_token_that_the_model_does_not_have_ends_its_request_before_any_forward(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard, wrong: int
) -> None:
    """On a GPU an id beyond the embedding would end the process; -1 would be some graft's virtual token."""
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("p1", PROMPTS["p1"]))
    engine.submit(request("bad", (7, wrong)))
    run(engine)
    assert heard.reasons() == {"bad": "error", "p1": "length"} and heard.ends["bad"].code == "unknown_token"
    assert heard.tokens["p1"] == alone["p1"][:12]
    assert all("bad" not in step["requests"] for step in steps_of(tmp_path))


def test_a_missing_graft_fails_only_its_own_request(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("bad", (7, 8), graft="0" * 32))
    engine.submit(request("p1", PROMPTS["p1"]))
    run(engine)
    assert heard.reasons() == {"bad": "error", "p1": "length"}
    assert "graft.json" in str(heard.ends["bad"].error)
    assert heard.tokens["p1"] == alone["p1"][:12]


def test_a_request_beyond_the_context_is_refused_by_the_engine_too(
    backbone: Backbone, tmp_path: Path, heard: Heard
) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("long", tuple(range(3, 123)), 9))
    run(engine)
    assert heard.reasons() == {"long": "error"} and "129" in str(heard.ends["long"].error)
    assert heard.ends["long"].code == "context_length_exceeded"


def test_a_cache_smaller_than_one_context_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kv_bytes"):
        engine_on(backbone, tmp_path, max_context=512, kv_bytes=100_000)


def test_the_thread_serves_stops_and_tells_those_who_wait(backbone: Backbone, tmp_path: Path, heard: Heard) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard, max_streams=1)
    engine.start()
    assert engine.healthy(5.0)
    for name in ("p1", "p2"):
        engine.submit(request(name, PROMPTS[name], 80))
    engine.stop()
    assert heard.reasons()["p2"] == "cancelled" and not engine.healthy(5.0)
    assert engine.submit(request("p3", PROMPTS["p3"])) is not None


def test_a_newer_attempt_ends_the_older_one_of_its_request_alone(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]]
) -> None:
    heard: list[StepTokens] = []
    engine = engine_on(backbone, tmp_path)
    engine.listen("", lambda step, _: heard.extend(step))
    for name in ("p1", "p2"):
        engine.submit(request(name, PROMPTS[name]))
    for _ in range(4):
        engine.turn()
    given = tuple(said.token for said in heard if said.request == "p1" and said.token is not None)
    assert given == tuple(alone["p1"][: len(given)]) and given
    engine.submit(request("p1", PROMPTS["p1"], generated=given, attempt=1))
    run(engine)
    ends = {(said.request, said.attempt): said.finish_reason for said in heard if said.finish_reason}
    assert ends == {("p1", 0): "cancelled", ("p1", 1): "length", ("p2", 0): "length"}
    second = [said.token for said in heard if said.request == "p1" and said.attempt == 1]
    assert second == alone["p1"][len(given) : 12]


def test_a_cancel_meets_the_request_that_came_just_before_it(backbone: Backbone, tmp_path: Path, heard: Heard) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("p1", PROMPTS["p1"]))
    engine.cancel("p1")
    run(engine)
    assert heard.reasons() == {"p1": "cancelled"} and not heard.tokens["p1"]


def test_an_ingress_that_leaves_takes_its_own_requests_and_no_others(
    backbone: Backbone, tmp_path: Path, alone: dict[str, list[int]], heard: Heard
) -> None:
    engine = engine_on(backbone, tmp_path, heard=heard)
    first, second = Heard(), Heard()
    engine.listen("other", first)
    engine.submit(request("p1", PROMPTS["p1"], ingress="other"))
    engine.submit(request("p2", PROMPTS["p2"]))
    engine.turn()
    engine.listen("other", second)  # connected again before the old connection was seen to end
    assert not engine.leave("other", first)
    engine.turn()
    assert {stream.request.id for stream in engine._streams.running} == {"p1", "p2"} and engine.hears("other")
    assert engine.leave("other", second) and not engine.hears("other")
    engine.turn()
    assert {stream.request.id for stream in engine._streams.running} == {"p2"}
    run(engine)
    assert heard.tokens["p2"] == alone["p2"][:12]
    assert engine.load.free_blocks == engine.load.blocks
