"""MeZO: jobs trained by forward passes alone, in any company and as the paper's loop does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.grammar import parse
from polygraft.grafts.spec import SpecError
from polygraft.kernels.common.noise import normal
from polygraft.launch.demo.oracle.naive import lora, naive
from polygraft.trainers.job import TrainJob
from polygraft.trainers.lanes import gradient
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, backbone_of, jobs_of, pack_of, run

MIXED = {
    "mezo lora": "lora(r=4) + mezo",
    "lora": "lora(r=8, at=attn.[qv], dropout=0.2)",
    "mezo union": "prefix(4) + bitfit(at=attn.*) + ia3(at=ffn.up, feedforward=attn.q) + mezo(0.05)",
    "mezo dropped": "lora(r=4, at=attn.[qv], dropout=0.3) + mezo",
    "mezo generated": "vera(r=8) + mezo(eps=0.001)",
    "mezo prompt": "prompt(3) + mezo(0.1)",
    "bitfit": "bitfit",
    "mezo gated": "molora(r=2, experts=2, at=attn.q) + dora(r=2, at=attn.v) + mezo",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [MIXED], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], steps: int, dtype: torch.dtype, folder: Path
) -> None:
    backbone = backbone_of(folder, dtype)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_the_steps_are_those_of_the_papers_loop(folder: Path) -> None:
    """Algorithm 1 in float64 on transformers' own model: perturb, lose, perturb back, lose, step along the same z."""
    backbone = backbone_of(folder, torch.float64)
    job = a_job("job", "lora(r=3, alpha=6, at=attn.[qv]) + mezo(0.01)", seed=3, steps=8)
    pack = PackRunner(backbone)
    slab = pack.admit(job).slab
    theta = {name: value.clone() for name, value in slab.tensors.items()}
    while pack.jobs["job"].step < 8:
        pack.step()
    start = {name: value.clone() for name, value in theta.items()}
    for step in range(8):
        flat = normal(job.key(step), sum(value.numel() for value in theta.values()), torch.float64)
        z = dict(zip(theta, flat.split([value.numel() for value in theta.values()]), strict=True))

        def moved(distance: float, z: dict[str, Tensor] = z) -> dict[str, Tensor]:
            return {name: value + distance * z[name].view_as(value) for name, value in theta.items()}

        above, below = (loss(folder, job, step, moved(distance)) for distance in (0.01, -0.01))
        slope, rate = (above - below) / 0.02, job.learning_rate(step)
        for name, value in theta.items():
            value -= rate * (slope * z[name].view_as(value) + job.config.weight_decay * value)
    assert job.config.weight_decay > 0
    for name, value in slab.tensors.items():
        assert (value - start[name]).norm() > 1e-4
        assert (value - theta[name]).norm() <= 1e-8 * (theta[name] - start[name]).norm(), name


def test_the_direction_is_standard_normal_and_another_at_every_step() -> None:
    z, other = (normal(key, 200_000, torch.float64) for key in (7, 8))
    assert torch.equal(z, normal(7, 200_000, torch.float64)) and torch.equal(z[:100], normal(7, 100, torch.float64))
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1
    assert abs(torch.corrcoef(torch.stack([z, other]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([z[1:], z[:-1]]))[0, 1]) < 0.01


def test_nothing_is_kept_for_a_backward_and_the_loss_falls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> list[float]:
        raise AssertionError("a forward with a backward")

    monkeypatch.setattr(gradient, "forward_backward", never)
    job = a_job("job", "lora(r=4) + mezo", seed=0, steps=300)
    job = replace(job, config=replace(job.config, learning_rate=3e-3, batch_size=9, epochs=300, micro_rows=400))
    pack = PackRunner(backbone_of(folder, torch.float32))
    slab = pack.admit(job).slab
    before = pack.evaluate("job", job.train)
    while not pack.jobs["job"].finished:
        (stepped,) = pack.step().stepped
        assert not stepped.skipped
    assert pack.evaluate("job", job.train) < before - 0.05
    assert not slab.exp_avg.count_nonzero()


def test_a_step_is_resumed_where_it_was(folder: Path) -> None:
    backbone = backbone_of(folder, torch.float32)
    job = a_job("job", "lora(r=4) + mezo", seed=1, steps=8)
    pack = pack_of(backbone, [job])
    while pack.jobs["job"].step < 3:
        pack.step()
    left = pack.remove("job")
    pack.restore(RunningJob(job, left.slab, step=left.step))
    assert_as_alone(run(pack), [job], backbone)


def test_mezo_alone_is_no_graft_and_no_distance_is_none() -> None:
    with pytest.raises(SpecError, match="name at least one method"):
        parse("mezo")
    with pytest.raises(SpecError, match=r"eps: 0\.0"):
        parse("lora + mezo(0)")


def loss(folder: Path, job: TrainJob, step: int, values: dict[str, Tensor]) -> float:
    """Of global batch `step`, by the naive model."""
    model = naive(folder, {0: lora(2.0)}, values, torch.float64)
    total = weight = 0.0
    for sample in (job.train[i] for i in job.batch(step)):
        ids, weights = torch.tensor(sample.ids), torch.tensor(sample.weights[1:], dtype=torch.float64)
        losses = F.cross_entropy(model.logits(ids[:-1]), ids[1:], reduction="none")
        total, weight = total + float((losses.detach() * weights).sum()), weight + float(weights.sum())
    return total / weight
