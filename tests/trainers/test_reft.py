"""LoReFT learns as its equation says, at the ends of what stands before the first learned token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.launch.demo.oracle.naive import Parts, after
from tests.grafts.oracle.family_prompts import noreft
from tests.grafts.oracle.row import Row, relative
from tests.tiny import tiny_llama
from tests.trainers.solo import trained
from tests.trainers.test_instance_prompts import read, trained_here
from tests.trainers.test_packed_equals_alone import a_job

TEXT = "noreft(r=2, first=2, last=1)@1"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float64, training=True)


def test_a_job_edits_the_tokens_before_the_first_learned_one(backbone: Backbone) -> None:
    job = a_job("reft", TEXT, seed=2, steps=12)
    samples, passing_by = read(job), list[int]()

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        n = job.train[next(samples)[1]].prompt
        edited = sorted({*range(min(n, 2)), n - 1})
        passing_by.append(y.shape[-2] - len(edited))
        return y.index_copy(-2, torch.tensor(edited), noreft(y[..., edited, :], p))

    before, after_training = trained_here(backbone, job)
    moved = {name: relative(after_training[name], value) for name, value in before.items()}
    row = Row(TEXT, hooks=partial(dict, {0: after(equation)}))
    expected = trained(row.oracle(backbone.folder, before, torch.float64), job)
    assert max(passing_by) > 5
    assert all(relative(after_training[name], expected[name]) < 1e-9 < 1e-3 < moved[name] for name in expected)
