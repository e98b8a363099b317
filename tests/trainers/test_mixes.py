"""Mixtures of experts end with the same bits in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainers.test_packed_equals_alone import assert_as_alone, backbone_of, folder, jobs_of, run, together

__all__ = ["folder"]  # the fixture
MIXES = {
    "molora": "molora(r=2, experts=4, at=attn.[qv]|ffn.down)",
    "top": "molora(r=2, experts=3, at=attn.v, top=2)",
    "lora": "lora(r=8, at=attn.[qv], dropout=0.2)",
    "hydralora": "hydralora(r=4, at=attn.q|ffn.up)",
    "moelora": "moelora(r=8, experts=4, at=attn.[qv])",
    "unipelt": "unipelt-al(r=4, size=8)",
    "same": "unipelt-al(r=4, size=8)",
    "fused": "ia3(at=attn.o, feedforward=attn.q) + molora(r=2, experts=2, at=attn.q) + lora(r=2, at=attn.q)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_twenty_steps_in_company_leave_the_bits_of_twenty_steps_alone(dtype: torch.dtype, folder: Path) -> None:
    backbone = backbone_of(folder, dtype)
    jobs = jobs_of(20, MIXES)
    assert_as_alone(run(together(backbone, jobs)), jobs, backbone)
