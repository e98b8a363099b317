"""Mixed equals alone: grafts of every method and the bare backbone in one batch, against hook-based models of each."""

from __future__ import annotations

import json
import time
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
from polygraft.serving.engine import Engine
from tests.serving.engines import Heard, engine_on, request, run
from tests.serving.naive import Solo, random_tensors
from tests.tiny import tiny_llama

METHODS = (
    "lora(r=4, at=attn.*)",
    "lora(r=7)",
    "dora(r=4)",
    "ia3",
    "bitfit",
    "prefix(10)",
    "serial(8)",
    "parallel(12)",
    "prefix(3) + parallel(4)@1 + lora(r=2, at=attn.[qv])",
)
TOKENS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32)


@pytest.fixture(scope="module")
def data(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact folder with one graft of each method."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def grafts(backbone: Backbone, data: Path) -> dict[GraftId, tuple[BoundGraft, dict[str, Tensor]]]:
    saved = {}
    for seed, text in enumerate(METHODS):
        graft = BoundGraft(parse(text), backbone.shape)
        values = random_tensors(graft, seed)
        id = native.save(data / "grafts", graft, values, backbone=backbone.fingerprint)
        saved[GraftId(id)] = (graft, values)
    return saved


def prompt_of(index: int) -> tuple[int, ...]:
    made = torch.Generator().manual_seed(100 + index)
    return tuple(torch.randint(3, 500, (3 + 5 * index % 23,), generator=made).tolist())


def test_every_method_answers_in_a_mixed_batch_as_it_does_alone(
    folder: Path,
    backbone: Backbone,
    data: Path,
    grafts: dict[GraftId, tuple[BoundGraft, dict[str, Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits: dict[tuple[str, int], Tensor] = {}
    sampled = Engine._sample

    def recording(engine: Engine, batch: Batch, found: Tensor) -> list[int | None]:
        for sequence, row in zip(batch.sampled, found, strict=True):
            logits[sequence.request.id, sequence.generated] = row.clone()
        return sampled(engine, batch, found)

    monkeypatch.setattr(Engine, "_sample", recording)
    heard = Heard()
    engine = engine_on(backbone, data, heard=heard, max_rows=40)
    for index, graft in enumerate([None, *grafts]):
        engine.submit(request(str(graft), prompt_of(index), TOKENS, graft=graft))
        for _ in range(index % 3):
            engine.turn()
    run(engine)

    for index, graft in enumerate([None, *grafts]):
        bound, values = grafts[graft] if graft else (None, {})
        solo = Solo(folder, backbone.shape, bound, values)
        prompt, said = prompt_of(index), heard.tokens[str(graft)]
        assert said == solo.greedy(prompt, TOKENS), METHODS[index - 1] if index else "bare"
        forced = solo.logits([*prompt, *said])[len(prompt) - 1 :]
        for at in range(TOKENS):
            error = (logits[str(graft), at] - forced[at]).norm() / forced[at].norm()
            assert error < 1e-5, (bound and bound.spec.method, at, float(error))  # fp32, teacher-forced

    steps = [json.loads(line) for line in (data / "replicas/r0/steps.jsonl").read_text().splitlines()]
    decode = [step for step in steps if step["prefill_rows"] == 0]
    assert max(len(step["grafts"]) for step in decode) >= 4
    assert max(len(step["methods"]) for step in decode) >= 4


def test_grafts_move_in_and_out_of_a_small_budget(
    backbone: Backbone, data: Path, grafts: dict[GraftId, tuple[BoundGraft, dict[str, Tensor]]]
) -> None:
    free, tight = Heard(), Heard()
    largest = max(sum(4 * value.numel() for value in values.values()) for _, values in grafts.values())
    for heard, budget in ((free, 1 << 30), (tight, largest)):
        engine = engine_on(backbone, data, heard=heard, graft_bytes=budget)
        for index, graft in enumerate(grafts):
            engine.submit(request(graft, prompt_of(index), 4, graft=graft))
        run(engine, 2000)
    assert tight.tokens == free.tokens and set(tight.reasons().values()) == {"length"}
    assert sum(4 * v.numel() for g in engine.load.resident for v in grafts[g][1].values()) <= largest


def test_a_graft_that_does_not_fit_beside_those_in_use_is_not_kept_out_by_younger_streams(
    backbone: Backbone, data: Path, grafts: dict[GraftId, tuple[BoundGraft, dict[str, Tensor]]]
) -> None:
    size = {graft: sum(4 * value.numel() for value in values.values()) for graft, (_, values) in grafts.items()}
    small, large = min(size, key=lambda g: size[g]), max(size, key=lambda g: size[g])
    heard = Heard()
    engine = engine_on(backbone, data, heard=heard, graft_bytes=size[large])
    engine.submit(request("first", prompt_of(0), 40, graft=small))
    while engine.load.resident != (small,):
        engine.turn()
    engine.submit(request("large", prompt_of(1), 2, graft=large))
    for index in range(100):  # always one more of the small graft's before the last of them ends
        engine.submit(request(f"small{index}", prompt_of(2), 3, graft=small))
        engine.turn()
        if "large" in heard.ends:
            break
        time.sleep(0.01)
    assert heard.ends["large"].finish_reason == "length"
    run(engine, 2000)
    assert set(heard.reasons().values()) == {"length"}


def test_a_graft_larger_than_the_budget_fails_alone(
    backbone: Backbone, data: Path, grafts: dict[GraftId, tuple[BoundGraft, dict[str, Tensor]]]
) -> None:
    heard = Heard()
    engine = engine_on(backbone, data, heard=heard, graft_bytes=1000)
    engine.submit(request("big", prompt_of(0), 4, graft=next(iter(grafts))))
    engine.submit(request("bare", prompt_of(1), 4))
    run(engine)
    assert heard.reasons() == {"big": "error", "bare": "length"} and "1000" in str(heard.ends["big"].error)


@pytest.mark.parametrize(
    ("text", "largest", "dtype"),
    [
        ("lora(r=4)", 3.4e38, torch.bfloat16),  # rounds to infinity
        ("lora(r=4)", 3e38, torch.float32),  # times alpha / r
        ("lora(r=4, alpha=3e38)", 10.0, torch.float32),
        ("vera(r=4)", 3e38, torch.float32),  # its B is a product
        ("ia3", 3.4e38, torch.bfloat16),
    ],
)
def test_a_graft_that_overflows_as_it_is_computed_with_is_refused_and_meets_no_other(
    folder: Path, tmp_path: Path, text: str, largest: float, dtype: torch.dtype
) -> None:
    backbone = Backbone.load(folder, dtype)
    saved = []
    for seed, (method, factor) in enumerate((("lora(r=4)", 1.0), (text, largest))):
        bound = BoundGraft(parse(method), backbone.shape)
        values = random_tensors(bound, seed)
        values = {name: value / value.abs().max() * factor for name, value in values.items()}
        id = native.save(tmp_path / "grafts", bound, values, backbone=backbone.fingerprint)
        saved.append(GraftId(id))
    alone, beside = Heard(), Heard()
    for heard, tenants in ((alone, {"good": saved[0]}), (beside, {"good": saved[0], "bad": saved[1]})):
        engine = engine_on(backbone, tmp_path, heard=heard)
        for tenant, graft in tenants.items():
            engine.submit(request(tenant, (5, 6, 7), 6, graft=graft, tenant=TenantId(tenant)))
        run(engine)
    assert beside.reasons() == {"good": "length", "bad": "error"} and "not finite" in str(beside.ends["bad"].error)
    assert beside.tokens["good"] == alone.tokens["good"]


def test_a_graft_for_another_backbone_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(parse("ia3"), backbone.shape)
    values = random_tensors(graft, 0)
    id = native.save(tmp_path / "grafts", graft, values, backbone="f" * 64)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard)
    engine.submit(request("foreign", (5, 6), graft=id))
    run(engine)
    assert heard.reasons() == {"foreign": "error"} and "backbone" in str(heard.ends["foreign"].error)
