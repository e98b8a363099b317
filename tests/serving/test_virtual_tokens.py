"""Prompts and edited embeddings in the engine: what a mixed batch answers is what the oracle of each says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.cluster.model import GraftId
from polygraft.grafts.formats import native
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.batch import Batch
from polygraft.serving.engine import Engine
from polygraft.serving.streams import Streams
from tests.grafts.oracle.row import Row, random_tensors
from tests.grafts.oracle.table import ALL
from tests.serving.engines import Heard, engine_on, request, run
from tests.tiny import tiny_llama

NAMES = ("lora", "dept", "prompt", "p-tuning", "trainable-tokens", "llama-adapter", "prefix-mlp", "loreft")
TOKENS = 20


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


def saved(row: Row, backbone: Backbone, data: Path, seed: int) -> tuple[GraftId, dict[str, Tensor]]:
    values = {name: value.float() for name, value in row.values(backbone.shape, seed).items()}
    id = native.save(data / "grafts", row.spec, values, shape=backbone.shape, backbone=backbone.fingerprint)
    return GraftId(id), values


def prompt_of(index: int) -> tuple[int, ...]:
    made = torch.Generator().manual_seed(200 + index)
    return (37, *torch.randint(3, 500, (2 + 7 * index % 19,), generator=made).tolist(), 338)


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Tensor]:
    """What every token is sampled from, by request and index."""
    found: dict[tuple[str, int], Tensor] = {}
    sampled = Engine._sample

    def recording(engine: Engine, batch: Batch, rows: Tensor) -> list[int | None]:
        for sequence, row in zip(batch.sampled, rows, strict=True):
            found[sequence.request.id, sequence.generated] = row.clone()
        return sampled(engine, batch, rows)

    monkeypatch.setattr(Engine, "_sample", recording)
    return found


@pytest.mark.parametrize("room", ["plenty", "little"])
def test_a_mixed_batch_answers_as_each_oracle(
    room: str,
    backbone: Backbone,
    tmp_path: Path,
    logits: dict[tuple[str, int], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With little room for keys and values, streams are sent back to the queue and begin again."""
    sent_back: list[str] = []
    preempt = Streams._preempt
    monkeypatch.setattr(Streams, "_preempt", lambda streams, s: (sent_back.append(s.request.id), preempt(streams, s)))
    grafts = {name: saved(ALL[name], backbone, tmp_path, seed) for seed, name in enumerate(NAMES)}
    heard = Heard()
    little = {"kv_bytes": 64 << 10, "max_context": 64} if room == "little" else {}
    engine = engine_on(backbone, tmp_path, heard=heard, max_rows=16, **little)
    for index, name in enumerate(NAMES):
        engine.submit(request(name, prompt_of(index), TOKENS, graft=grafts[name][0]))
        engine.turn()
    run(engine)
    assert bool(set(sent_back) & {"prompt", "p-tuning", "dept"}) == (room == "little")
    for index, name in enumerate(NAMES):
        oracle = ALL[name].oracle(backbone.folder, {k: v.double() for k, v in grafts[name][1].items()}, torch.float32)
        prompt, said = prompt_of(index), heard.tokens[name]
        assert heard.ends[name].finish_reason == "length" and len(said) == TOKENS
        forced = oracle.logits(torch.tensor([*prompt, *said]))[len(prompt) - 1 :].detach()
        for at, token in enumerate(said):
            error = (logits[name, at] - forced[at]).norm() / forced[at].norm()
            assert error < 1e-5, (name, at, float(error))  # fp32, teacher-forced
            assert token == int(logits[name, at].argmax())


def test_a_prompt_counts_in_the_context(backbone: Backbone, tmp_path: Path) -> None:
    spec = Row("prompt(40)")
    values = {k: v.float() for k, v in random_tensors(spec.spec, backbone.shape, 0).items()}
    id = native.save(tmp_path / "grafts", spec.spec, values, shape=backbone.shape, backbone=backbone.fingerprint)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=48)
    engine.submit(request("long", (5,) * 6, 3, graft=GraftId(id)))
    run(engine)
    assert heard.ends["long"].finish_reason == "error" and "virtual tokens" in str(heard.ends["long"].error)
