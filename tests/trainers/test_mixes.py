"""Mixtures of experts end with the same bits in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.compose import combined, lorahub
from polygraft.trainers.evaluate import mean_loss
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, backbone_of, jobs_of, pack_of, run

MIXES = {
    "molora": "molora(r=2, experts=4, at=attn.[qv]|ffn.down)",
    "top": "molora(r=2, experts=3, at=attn.v, top=2)",
    "lora": "lora(r=8, at=attn.[qv], dropout=0.2)",
    "hydralora": "hydralora(r=4, at=attn.q|ffn.up)",
    "job-gated-experts": "job-gated-experts(r=8, experts=4, at=attn.[qv])",
    "unipelt": "unipelt-al(r=4, size=8)",
    "same": "unipelt-al(r=4, size=8)",
    "fused": "ia3(at=attn.o, feedforward=attn.q) + molora(r=2, experts=2, at=attn.q) + lora(r=2, at=attn.q)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [MIXES], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], steps: int, dtype: torch.dtype, folder: Path
) -> None:
    backbone = backbone_of(folder, dtype)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_few_examples_choose_the_weights_of_loras_that_were_trained_apart(folder: Path) -> None:
    """LoRAHub: better on the few than no graft, each member, and their mean."""
    backbone = backbone_of(folder, torch.float32)
    jobs = [a_job(name, "lora(r=4, at=attn.[qv])", seed=seed, steps=30) for seed, name in enumerate(("one", "two"))]
    pack = pack_of(backbone, jobs)
    slabs = {job.id: pack.jobs[job.id].slab for job in jobs}
    run(pack)
    members, few = [slabs[job.id].tensors for job in jobs], (*jobs[0].train[:2], *jobs[1].train[:2])
    layout = jobs[0].graft.tensors
    found = lorahub(layout, members, lambda values: mean_loss(backbone, jobs[0].graft, values, few), steps=40)
    assert found.loss == mean_loss(backbone, jobs[0].graft, found.tensors, few)
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        assert found.loss < mean_loss(backbone, jobs[0].graft, combined(layout, members, weights), few)
