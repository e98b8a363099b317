"""The rivals' trial, trained by PEFT: it sees the text as our packs do, and learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from search_peft import Lora
from search_work import SITES, LoraTrial, Work

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.trainers.evaluate import mean_loss
from polygraft.trainers.job import Sample
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, (8, 17), generator=chance).tolist()
    samples = tuple((tuple(row), (0.0,) * 5 + (1.0,) * 12) for row in ids)
    trials = tuple(LoraTrial(n, 4, modules, 1e-2, 0) for n, modules in enumerate(SITES.values()))
    return Work(
        folder="",
        backbone=str(tiny_llama(tmp_path_factory.mktemp("tiny"))),
        halving=True,
        order=tuple((n % 8,) for n in range(18)),
        train=samples,
        held_out=samples,
        trials=trials,
    )


def test_both_sides_see_the_same_text(work: Work) -> None:
    backbone = Backbone.load(Path(work.backbone), torch.float32)
    graft = BoundGraft(parse("lora(r=1)"), backbone.shape)
    nothing = {tensor.name: torch.zeros(tensor.shape) for tensor in graft.tensors}
    ours = mean_loss(backbone, graft, nothing, [Sample(ids, weights) for ids, weights in work.held_out])
    assert Lora(work, "float32", 1).bare() == pytest.approx(ours, rel=1e-5)


def test_trials_follow_each_other_on_one_model_from_rung_to_rung(work: Work) -> None:
    lora = Lora(work, "float32", 1)
    bare = lora.bare()
    for trial in work.trials:
        stages = lora.train(trial, work.stops(18), 18)
        assert [step for step, _ in [next(stages), next(stages), next(stages)]] == [2, 6, 18]
        assert lora.held_out() < bare
        stages.close()
        assert lora.bare() == bare  # nothing of it is left
