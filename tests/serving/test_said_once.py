"""What an engine is asked twice before a step, and labels, are answered once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.head import Head
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.messages import StepTokens
from tests.grafts.oracle.row import random_tensors
from tests.serving.engines import engine_on, request, run
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


def test_of_attempts_that_come_between_two_steps_the_last_one_runs_and_whoever_came_beside_them(
    backbone: Backbone, tmp_path: Path
) -> None:
    heard: list[StepTokens] = []
    engine = engine_on(backbone, tmp_path)
    engine.listen("", lambda step, _: heard.extend(step))
    for attempt in range(3):
        engine.submit(request("a", (3, 4), 2, attempt=attempt))
    engine.submit(request("b", (5,), 1))
    run(engine)
    ends = {(said.request, said.attempt): (said.finish_reason, said.index) for said in heard if said.finish_reason}
    assert ends == {
        ("a", 0): ("cancelled", 0),
        ("a", 1): ("cancelled", 0),
        ("a", 2): ("length", 1),
        ("b", 0): ("length", 0),
    }
    assert len(heard) == 5 and engine.load.free_blocks == engine.load.blocks


def test_a_text_that_is_classified_is_answered_by_its_labels_alone(backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(replace(parse("lora(r=2, at=attn.q)"), head=Head(("bad", "good"))), backbone.shape)
    values = {name: value.float() for name, value in random_tensors(graft, 1).items()}
    id = GraftId(native.save(Folders(tmp_path).grafts, graft, values, backbone=backbone.fingerprint))
    heard: list[StepTokens] = []
    engine = engine_on(backbone, tmp_path)
    engine.listen("", lambda step, _: heard.extend(step))
    engine.submit(request("a", (3, 4, 5), 1, graft=id, classifies=True))
    run(engine)
    (said,) = heard
    assert (said.token, said.finish_reason) == (None, "stop")
    assert said.probabilities is not None and sum(said.probabilities) == pytest.approx(1)
