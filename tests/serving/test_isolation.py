"""One request makes a step raise, at each place of it: that request ends with an error, and its neighbours, on grafts
of several methods and drawn at a temperature, say what they say alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache
from polygraft.serving import engine as engine_module
from polygraft.serving import streams as streams_module
from polygraft.serving.batch import Batch
from polygraft.serving.blocks import Blocks
from polygraft.serving.engine import Engine
from polygraft.serving.request import GenerationRequest
from polygraft.serving.residency import Residency
from polygraft.serving.sequence import Sequence
from polygraft.serving.steps import StepLog
from tests.serving.engines import Heard, engine_on, request, run
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

TEXTS = ("lora(r=4)", "prefix(3)", "serial(4)", "ia3", "prefix(2) + lora(r=2)")  # the last is the culprit's
TOKENS = 8
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 11))]


class Poison(RuntimeError):
    """What the culprit makes raise."""


@dataclass(frozen=True)
class Culprit:
    """Its request, and after how many of its tokens the fault strikes."""

    request: GenerationRequest
    after: int

    def strikes(self, sequence: Sequence) -> bool:
        return sequence.request.id == self.request.id and sequence.generated >= self.after


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture(scope="module")
def data(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def neighbours(backbone: Backbone, data: Path) -> dict[str, tuple[GenerationRequest, list[int]]]:
    """Requests, and what each says alone; the one on the last graft is the culprit's."""
    grafts: list[GraftId | None] = [None]
    for seed, text in enumerate(TEXTS):
        bound = BoundGraft(parse(text), backbone.shape)
        values = random_tensors(bound, seed)
        grafts.append(GraftId(native.save(data / "grafts", bound, values, backbone=backbone.fingerprint)))
    made: dict[str, tuple[GenerationRequest, list[int]]] = {}
    for index, graft in enumerate(grafts):
        prompt = tuple(torch.randint(3, 490, (3 + 4 * index,), generator=torch.Generator().manual_seed(index)).tolist())
        one = request(f"m{index}", prompt, TOKENS, graft=graft, temperature=1.1, seed=1000 + index)
        heard = Heard()
        engine = engine_on(backbone, data, heard=heard)
        engine.submit(one)
        run(engine)
        made[one.id] = one, heard.tokens[one.id]
    return made


def wrap(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, raises: Callable[..., bool], after: bool = False
) -> None:
    """Make `owner.name` raise whenever `raises` says so of its arguments, before its work or after it."""
    whole = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        poisoned = raises(*args, **options)
        result = whole(*args, **options) if after or not poisoned else None
        if poisoned:
            raise Poison(name)
        return result

    monkeypatch.setattr(owner, name, wrapped)


def in_batch(culprit: Culprit) -> Callable[..., bool]:
    return lambda _, batch, *others: any(culprit.strikes(chunk.sequence) for chunk in batch.chunks)


def plant(place: str, culprit: Culprit, patch: pytest.MonkeyPatch) -> None:
    id, graft, strikes = culprit.request.id, culprit.request.graft, culprit.strikes
    match place:
        case "taking in":
            wrap(patch, Engine, "_check_tokens", lambda _, request: request.id == id)
        case "reading its graft":
            wrap(patch, Residency, "fetch", lambda _, wanted: wanted == graft)
        case "attaching its graft":
            wrap(patch, Sequence, "attach_graft", lambda sequence, _: strikes(sequence))
        case "the policy":
            wrap(
                patch,
                streams_module,
                "admit_streams",
                lambda waiting, running, **_: any(one.id == id for one in (*waiting, *running)),
            )
        case "what is computed of it":
            wrap(patch, Blocks, "match", lambda _, owner, *__: owner[1] == graft)
        case "cache blocks":
            wrap(patch, Blocks, "allocate", lambda _, holder, blocks: holder == id)
        case "its graft's prefix":
            wrap(patch, KVCache, "write_prefix", lambda _, table, resident, first: resident.id == graft)
        case "stacks":
            wrap(patch, Residency, "compose", lambda _, grafts: graft in grafts)
        case "collation":
            wrap(patch, Sequence, "prompt", lambda sequence, *_: strikes(sequence))
        case "the forward":
            wrap(patch, Engine, "_forward", in_batch(culprit))
        case "the logits":
            wrap(patch, Engine, "_forward", in_batch(culprit), after=True)
        case "sampling":
            wrap(
                patch,
                engine_module,
                "sample",
                lambda _, draws: any(one.seed == culprit.request.seed and one.index >= culprit.after for one in draws),
            )
        case "the end":
            wrap(patch, Sequence, "finish_reason", lambda sequence, token: strikes(sequence))
        case _:
            raise AssertionError(place)


PLACES = (
    "taking in",
    "reading its graft",
    "attaching its graft",
    "the policy",
    "what is computed of it",
    "cache blocks",
    "its graft's prefix",
    "stacks",
    "collation",
    *(WHILE_IT_SPEAKS := ("the forward", "the logits", "sampling", "the end")),
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", PLACES)
def test_what_one_request_makes_raise_ends_that_request_alone(  # noqa: PLR0913
    backbone: Backbone,
    data: Path,
    neighbours: dict[str, tuple[GenerationRequest, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    logged: list[logging.LogRecord],
    place: str,
    seed: int,
) -> None:
    drawn = random.Random(f"{place}/{seed}")
    *innocent, last = neighbours
    name = drawn.choice(["a", "m15", "z"])  # among its neighbours' rows: first, in the middle, last
    wanted = replace(neighbours[last][0], id=name)
    culprit = Culprit(
        wanted, drawn.randrange(3) if place in ("the forward", "the logits", "sampling", "the end") else 0
    )
    plant(place, culprit, monkeypatch)
    heard = Heard()
    engine = engine_on(backbone, data, heard=heard)
    order = [wanted, *(neighbours[one][0] for one in innocent)]
    drawn.shuffle(order)
    for one in order:
        assert engine.submit(one) is None
        for _ in range(drawn.randrange(3)):
            engine.turn()
    run(engine)
    assert {one: heard.tokens[one] for one in innocent} == {one: neighbours[one][1] for one in innocent}
    assert heard.reasons() == {**dict.fromkeys(innocent, "length"), name: "error"}
    assert heard.tokens[name] == neighbours[last][1][: culprit.after]
    assert heard.ends[name].code is None and any(f"request {name} failed" in line.getMessage() for line in logged)
    assert engine.load.free_blocks == engine.load.blocks and not engine._streams.residency._pins
    engine.submit(replace(neighbours[innocent[0]][0], id="next"))
    run(engine)
    assert heard.tokens["next"] == neighbours[innocent[0]][1]


def test_a_step_that_cannot_be_logged_hurts_nobody(
    backbone: Backbone,
    data: Path,
    neighbours: dict[str, tuple[GenerationRequest, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrap(monkeypatch, StepLog, "write", lambda *_: True)
    assert said_together(backbone, data, neighbours).tokens == {one: said for one, (_, said) in neighbours.items()}


def test_an_ingress_that_cannot_be_told_hurts_no_other(
    backbone: Backbone, data: Path, neighbours: dict[str, tuple[GenerationRequest, list[int]]]
) -> None:
    def broken(*_: object) -> None:
        raise Poison("listener")

    heard = Heard()
    engine = engine_on(backbone, data, heard=heard)
    engine.listen("broken", broken)
    for index, (one, _) in enumerate(neighbours.values()):
        engine.submit(replace(one, ingress="broken") if index == 1 else one)
    run(engine)
    assert heard.tokens == {one: said for index, (one, (_, said)) in enumerate(neighbours.items()) if index != 1}


@pytest.mark.parametrize("seed", SEEDS)
def test_where_memory_is_short_for_all_together_they_are_computed_apart_and_nobody_ends(
    backbone: Backbone,
    data: Path,
    neighbours: dict[str, tuple[GenerationRequest, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    room = random.Random(seed).randrange(4, 12)  # rows: less than most prompts have
    sizes: list[int] = []
    whole = Engine._forward

    def short(engine: Engine, batch: Batch) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > room:
            raise MemoryError("DefaultCPUAllocator: can't allocate memory")
        return whole(engine, batch)

    monkeypatch.setattr(Engine, "_forward", short)
    heard = said_together(backbone, data, neighbours)
    assert heard.tokens == {one: said for one, (_, said) in neighbours.items()}
    assert set(heard.reasons().values()) == {"length"} and max(sizes) > room


def test_a_request_that_has_no_memory_alone_is_told_so_and_ends_alone(
    backbone: Backbone,
    data: Path,
    neighbours: dict[str, tuple[GenerationRequest, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Engine._forward

    def short(engine: Engine, batch: Batch) -> Any:
        if any(chunk.sequence.request.id == "m2" for chunk in batch.chunks):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory")
        return whole(engine, batch)

    monkeypatch.setattr(Engine, "_forward", short)
    heard = said_together(backbone, data, neighbours)
    assert heard.reasons() == {**dict.fromkeys(neighbours, "length"), "m2": "error"}
    assert heard.ends["m2"].code == "out_of_memory" and "alloc_cpu" not in str(heard.ends["m2"].error)
    assert all(heard.tokens[one] == said for one, (_, said) in neighbours.items() if one != "m2")


def said_together(backbone: Backbone, data: Path, requests: dict[str, tuple[GenerationRequest, list[int]]]) -> Heard:
    heard = Heard()
    engine = engine_on(backbone, data, heard=heard)
    for one, _ in requests.values():
        engine.submit(one)
    run(engine)
    return heard
