"""SMoP and IDPG learn as the papers say: prompts of the tokens before the first learned one, and a noisy router."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.generated import _ROUTER
from polygraft.grafts.runtime.rows import dropout_keys
from polygraft.kernels.common.dropout import combine
from polygraft.kernels.common.noise import normal
from polygraft.trainers.evaluate import mean_loss
from polygraft.trainers.job import Sample, TrainJob
from polygraft.trainers.runner import PackRunner
from tests.grafts.oracle.family_instance import generated
from tests.grafts.oracle.row import Row, Values, relative
from tests.tiny import tiny_llama
from tests.trainers.solo import trained
from tests.trainers.test_packed_equals_alone import a_job

STEPS = 12


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float64, training=True)


def read(job: TrainJob) -> Iterator[tuple[int, int]]:
    """(step, number) of every sample in the order in which a loop over its global batches reads them."""
    return ((step, number) for step in range(job.steps_total) for number in job.batch(step))


def trained_here(backbone: Backbone, job: TrainJob) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors before, for an oracle to train, and after."""
    pack = PackRunner(backbone)
    slab = pack.admit(job).slab
    before = {name: value.clone() for name, value in slab.tensors.items()}
    while not pack.jobs[job.id].finished:
        pack.step()
    return before, dict(slab.tensors)


def test_a_noisy_router_trains_as_the_papers_equation_with_the_same_noise(backbone: Backbone) -> None:
    """p = softmax(L x (1 + z)), c = argmax p, [p_c P_c; E(x)] (Choi et al. 2023)."""
    job = a_job("smop", "smop(3, k=4)", seed=3, steps=STEPS)
    samples, chosen = read(job), set()

    def noisy(ids: Tensor, x: Tensor, p: Values) -> Tensor:
        step, number = next(samples)
        key = combine(dropout_keys((job.key(step), number), 1)[0], _ROUTER)
        z = normal(int(key), 4, x.dtype)
        scores = p["0.0.embed.G"] @ x[: job.train[number].prompt].mean(0)
        shares = torch.softmax(scores * (1 + z), 0)
        best = int(shares.argmax())
        chosen.add(best)
        return torch.cat([shares[best] * p["0.0.embed.p"].view(4, 3, -1)[best], x])

    before, after = trained_here(backbone, job)
    moved = {name: relative(after[name], value) for name, value in before.items()}
    expected = trained(Row("smop(3, k=4)", soft=noisy).oracle(backbone.folder, before, torch.float64), job)
    assert chosen == set(range(4)), "noise tries them all"
    assert all(relative(after[name], expected[name]) < 1e-9 < 1e-3 < moved[name] for name in expected)


def test_a_generated_prompt_reads_what_stands_before_the_first_learned_token(backbone: Backbone) -> None:
    job = a_job("idpg", "idpg(2, hidden=5)", seed=2, steps=STEPS)
    samples = read(job)

    def equation(ids: Tensor, x: Tensor, p: Values) -> Tensor:
        return generated(ids, x, p, prompt=job.train[next(samples)[1]].prompt)

    before, after = trained_here(backbone, job)
    assert before["0.0.embed.p"].count_nonzero() == 0 and all(after[name].count_nonzero() for name in after)
    expected = trained(Row("idpg(2, hidden=5)", soft=equation).oracle(backbone.folder, before, torch.float64), job)
    assert all(relative(after[name], expected[name]) < 1e-9 for name in expected)


def test_held_out_losses_are_without_noise(backbone: Backbone) -> None:
    """In pieces of any size, and for a graft that was trained with noise as for the same without."""
    job = a_job("smop", "smop(3, k=4)", seed=1, steps=1)
    _, values = trained_here(backbone, job)
    losses = [
        mean_loss(backbone, BoundGraft(parse(text), backbone.shape), values, job.train, rows)
        for text, rows in (("smop(3, k=4)", 768), ("smop(3, k=4, noise=0)", 768), ("smop(3, k=4)", 30))
    ]
    assert losses[0] == losses[1] and abs(losses[0] - losses[2]) < 1e-12 * losses[0]


def test_the_prompt_of_a_sample_ends_before_its_first_learned_token() -> None:
    def prompt(*weights: float) -> int:
        return Sample(tuple(range(len(weights))), weights).prompt

    assert prompt(0.0, 0.0, 0.0, 1.0, 1.0) == 3 and prompt(0.0, 1.0, 0.0, 1.0) == 1
    assert prompt(0.0, 0.0, 0.0, 1.0) == 3 and prompt(0.0, 0.0, 0.0) == 2  # the last token is only predicted


def test_a_noisy_graft_is_saved_with_its_noise(backbone: Backbone, tmp_path: Path) -> None:
    job = a_job("smop", "smop(3, k=2, noise=0.5)", seed=4, steps=1)
    values = {name: value.float() for name, value in trained_here(backbone, job)[1].items()}
    identity = native.save(tmp_path, job.graft, values, backbone="b")
    assert native.load(tmp_path / identity, shape=backbone.shape, backbone="b").graft == job.graft
