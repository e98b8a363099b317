"""Prompts and edited embeddings in the engine: what a mixed batch answers is what the oracle of each says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.cluster.model import GraftId
from polygraft.grafts.catalogue import needs_prompt_length
from polygraft.grafts.formats import native
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.batch import Batch
from polygraft.serving.engine import Engine
from polygraft.serving.streams import Streams
from tests.grafts.oracle.row import Row, random_tensors, relative
from tests.grafts.oracle.table import ALL
from tests.serving.engines import Heard, engine_on, request, run
from tests.tiny import tiny_llama

NAMES = (
    "lora",
    "dept",
    "prompt",
    "p-tuning",
    "trainable-tokens",
    "llama-adapter",
    "prefix-mlp",
    "loreft",
    "smop",
    "idpg",
)
TOKENS = 20
ROWS = 16  # of a step, fewer than the longest prompt has


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


def saved(row: Row, backbone: Backbone, data: Path, seed: int) -> tuple[GraftId, dict[str, Tensor]]:
    values = {name: value.float() for name, value in row.values(backbone.shape, seed).items()}
    id = native.save(data / "grafts", row.graft(backbone.shape), values, backbone=backbone.fingerprint)
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
    """With little room for keys and values, streams are sent back to the queue and begin again. A prompt that virtual
    tokens are made of is computed in one step, whatever its length."""
    sent_back: list[str] = []
    preempt = Streams._preempt
    monkeypatch.setattr(Streams, "_preempt", lambda streams, s: (sent_back.append(s.request.id), preempt(streams, s)))  # type: ignore[func-returns-value]
    grafts = {name: saved(ALL[name], backbone, tmp_path, seed) for seed, name in enumerate(NAMES)}
    heard = Heard()
    little = {"kv_bytes": 64 << 10, "max_context": 64} if room == "little" else {}
    engine = engine_on(backbone, tmp_path, heard=heard, max_rows=ROWS, **little)
    for index, name in enumerate(NAMES):
        engine.submit(request(name, prompt_of(index), TOKENS, graft=grafts[name][0]))
        engine.turn()
    run(engine)
    assert bool(set(sent_back) & {"prompt", "p-tuning", "dept"}) == (room == "little")
    assert len(prompt_of(NAMES.index("smop"))) > ROWS
    for index, name in enumerate(NAMES):
        prompt, said, row = prompt_of(index), heard.tokens[name], ALL[name]
        if row.spec.reads_prompt:
            row = replace(row, soft=partial(row.soft, prompt=len(prompt)))  # type: ignore[arg-type,call-arg,misc]
        elif needs_prompt_length(row.spec):
            row = replace(row, hooks=partial(row.hooks, prompt=len(prompt)))  # type: ignore[call-arg]
        oracle = row.oracle(backbone.folder, {k: v.double() for k, v in grafts[name][1].items()}, torch.float32)
        assert heard.ends[name].finish_reason == "length" and len(said) == TOKENS
        forced = oracle.logits(torch.tensor([*prompt, *said]))[len(prompt) - 1 :].detach()
        for at, token in enumerate(said):
            error = (logits[name, at] - forced[at]).norm() / forced[at].norm()
            assert error < 1e-5, (name, at, float(error))  # fp32, teacher-forced
            assert token == int(logits[name, at].argmax())


def test_a_prompt_counts_in_the_context(backbone: Backbone, tmp_path: Path) -> None:
    graft = Row("prompt(40)").graft(backbone.shape)
    values = {k: v.float() for k, v in random_tensors(graft, 0).items()}
    id = native.save(tmp_path / "grafts", graft, values, backbone=backbone.fingerprint)
    heard = Heard()
    engine = engine_on(backbone, tmp_path, heard=heard, max_context=48)
    engine.submit(request("long", (5,) * 6, 3, graft=GraftId(id)))
    run(engine)
    assert heard.ends["long"].finish_reason == "error" and "virtual tokens" in str(heard.ends["long"].error)


@pytest.mark.parametrize("name", ["smop", "idpg", "loreft"])
def test_what_was_said_is_not_in_a_prompt_that_is_read_again(
    name: str, backbone: Backbone, tmp_path: Path, logits: dict[tuple[str, int], Tensor]
) -> None:
    """A stream that is sent back in the middle of its answer, beside others, goes on as if it had not been."""
    graft, prompt = saved(ALL[name], backbone, tmp_path, seed=2)[0], prompt_of(8)
    said: list[list[int]] = []
    rows: list[Tensor] = []
    for sent_back in (False, True):
        heard = Heard()
        engine = engine_on(backbone, tmp_path, heard=heard, max_rows=64)  # what was said comes in the same step
        engine.submit(request("whole", prompt, TOKENS, graft=graft))
        engine.submit(request("bare", prompt_of(3), TOKENS))
        while len(heard.tokens["whole"]) < 7:
            engine.turn()
        if sent_back:
            (sequence,) = (s for s in engine._streams.running if s.request.id == "whole")
            engine._streams._preempt(sequence)
            assert sequence.generated == 7 and not sequence.computed
        run(engine)
        said.append(heard.tokens["whole"])
        rows.append(torch.stack([logits["whole", at] for at in range(TOKENS)]))
    assert said[0] == said[1] and relative(rows[1], rows[0]) < 1e-6


def test_a_prompt_that_is_read_whole_is_so_when_its_stream_is_tried_alone(backbone: Backbone, tmp_path: Path) -> None:
    """After a forward that raised, with a prompt of more rows than a step has; also where another replica began."""
    id, _ = saved(ALL["smop"], backbone, tmp_path, seed=1)
    heard, prompt = Heard(), prompt_of(NAMES.index("smop"))
    engine = engine_on(backbone, tmp_path, heard=heard, max_rows=ROWS)
    engine.submit(request("alone", prompt, graft=id))
    run(engine)
    engine.submit(request("bad", (7, 10**6)))  # outside the vocabulary: the embedding raises
    engine.submit(request("beside", prompt, graft=id))
    run(engine)
    assert heard.ends["bad"].finish_reason == "error"
    assert heard.tokens["beside"] == heard.tokens["alone"] and len(heard.tokens["alone"]) == 12
    said = heard.tokens["alone"]
    heard.tokens["later"] = said[:5]  # what the client has
    engine.submit(request("later", prompt, graft=id, generated=tuple(said[:5])))
    run(engine)
    assert heard.tokens["later"] == said
